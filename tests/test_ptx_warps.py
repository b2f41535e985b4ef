"""What threads do together in PTX as benchmarks.ptx runs it: fragments, matrices, copies, branches."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from ptx_by_hand import aligned, launch, threads

from benchmarks.ptx import Fault
from benchmarks.ptx.copying import Descriptor

LANES = np.arange(32)
rng = np.random.default_rng(0)


def small(*shape):
    """Integers whose products and sums float32 holds."""
    return np.random.default_rng(1).integers(-8, 9, shape).astype(np.float32)


def bits(x, kind):
    """float32 as patterns of 16 bits; exact for small integers."""
    return x.astype(np.float16).view(np.uint16) if kind == "f16" else (x.view(np.uint32) >> 16).astype(np.uint16)


# --- lanes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [0, 1, 5, 16, 31, 33])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles_take_from_a_lane_that_exists_and_say_whether(mode, by):
    a = rng.integers(0, 2**32, 64, dtype=np.uint32)
    end = "0" if mode == "up" else "31"
    body = f"shfl.sync.{mode}.b32 {{}}, %a, {by}, {end}, -1; {{}}"
    found = threads(body.format("%z|%p1", ""), a, out="u4", warps=2)
    exists = threads(body.format("%r1|%p1", "selp.b32 %z, 1, 0, %p1;"), a, out="u4", warps=2)
    for thread in range(64):
        lane, step = thread % 32, by % 32
        source = {"up": lane - step, "down": lane + step, "bfly": lane ^ step, "idx": step}[mode]
        within = 0 <= source < 32
        assert found[thread] == a[thread - lane + (source if within else lane)] and exists[thread] == within


def test_one_lane_of_each_warp_is_elected():
    body = "elect.sync %r1|%p1, -1; selp.b32 %z, 1, 0, %p1;"
    found = threads(body, out="u4", warps=2).reshape(2, 32)
    named = threads("elect.sync %z|%p1, -1;", out="u4", warps=2).reshape(2, 32)
    assert (found.sum(1) == 1).all() and (named == found.argmax(1)[:, None]).all()


@pytest.mark.parametrize("special", ["tid.x", "laneid", "ctaid.x", "ctaid.y", "ctaid.z", "nctaid.y", "ntid.x"])
def test_a_thread_knows_where_it_is(special):
    out = aligned(np.zeros((2, 3, 2, 64), np.uint32))
    launch(
        """mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z; mad.lo.s32 %r4, %r3, 3, %r2;
        mad.lo.s32 %r4, %r4, 2, %r1; mov.u32 %r5, %tid.x; mad.lo.s32 %r4, %r4, 64, %r5; mad.wide.u32 %rd1, %r4, 4, %rd0;
        mov.u32 %r6, %SPECIAL; st.global.b32 [%rd1], %r6;""".replace("SPECIAL", special),
        out, warps=2, grid=(2, 3, 2),
    )  # fmt: skip
    z, y, x, tid = np.meshgrid(*map(np.arange, out.shape), indexing="ij")
    known = {"tid.x": tid, "laneid": tid % 32, "ctaid.x": x, "ctaid.y": y, "ctaid.z": z, "nctaid.y": 3, "ntid.x": 64}
    assert (out == known[special]).all()


# --- branches -----------------------------------------------------------------------------------


def test_threads_loop_as_often_as_each_must_and_come_together_again():
    body = """mov.u32 %r1, 0; mov.u32 %r2, 0;
    $TOP: setp.ge.u32 %p1, %r1, %a; @%p1 bra $END; add.s32 %r1, %r1, 1;
    and.b32 %r3, %r1, 1; setp.eq.b32 %p2, %r3, 0; @%p2 bra $EVEN; add.s32 %r2, %r2, 100; bra.uni $TOP;
    $EVEN: add.s32 %r2, %r2, 1; bra $TOP;
    $END: bar.sync 0; mov.b32 %z, %r2;"""
    a = np.arange(64, dtype=np.uint32)[::-1] % 37
    found = threads(body, a, out="u4", warps=2)
    assert found.tolist() == [100 * ((n + 1) // 2) + n // 2 for n in a.tolist()]


def test_a_predicate_keeps_threads_out_and_a_return_ends_them():
    out = aligned(np.full(32, 7, np.uint32))
    launch("""mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 10; @%p1 ret; mad.wide.u32 %rd1, %r1, 4, %rd0;
           setp.gt.u32 %p2, %r1, 20; @!%p2 mov.b32 %r1, 1; st.global.b32 [%rd1], %r1;""", out)  # fmt: skip
    assert out.tolist() == [7] * 10 + [1] * 11 + list(range(21, 32))


def test_every_block_begins_with_registers_that_hold_nothing():
    out = aligned(np.zeros(4, np.float32))
    launch("""mov.u32 %r1, %ctaid.x; mad.wide.u32 %rd1, %r1, 4, %rd0; mov.u32 %r2, %tid.x; setp.ne.b32 %p1, %r2, 0;
           @%p1 ret; st.global.b32 [%rd1], %r9; mov.b32 %r9, 0;""", out, grid=(4, 1, 1))  # fmt: skip
    assert np.isnan(out).all()


# --- matrices -----------------------------------------------------------------------------------


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_are_dealt_out_and_collected(count, across):
    """Lane l gets of matrix i row l // 4 (with .trans: column), elements 2 (l % 4) and the next."""
    given = aligned(rng.integers(0, 65536, (count, 8, 8), dtype=np.uint16))
    dealt, back = aligned(np.zeros((count, 32, 2), np.uint16)), aligned(np.zeros((count, 8, 8), np.uint16))
    names = ", ".join(f"%r{10 + i}" for i in range(count))
    form = f"sync.aligned.m8n8.x{count}{'.trans' if across else ''}.shared.b16"
    rows = f"mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, {8 * count}; mad.wide.u32 %rd5, %r1, 16, %rd0;"
    store = "\n".join(
        f"mad.wide.u32 %rd6, %r1, 4, %rd1; st.global.b32 [%rd6+{128 * i}], %r{10 + i};" for i in range(count)
    )
    launch(
        f"""{rows} mov.b32 %r2, global_smem; mad.lo.s32 %r2, %r1, 16, %r2;
        @%p1 ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%rd5]; @%p1 st.shared.v4.b32 [%r2], {{%r3, %r4, %r5, %r6}};
        bar.sync 0; ldmatrix.{form} {{{names}}}, [%r2]; {store} bar.sync 0; stmatrix.{form} [%r2+1024], {{{names}}};
        bar.sync 0; mad.wide.u32 %rd7, %r1, 16, %rd2;
        @%p1 ld.shared.v4.b32 {{%r3, %r4, %r5, %r6}}, [%r2+1024];
        @%p1 st.global.v4.b32 [%rd7], {{%r3, %r4, %r5, %r6}};""",
        given, dealt, back,
    )  # fmt: skip
    for i in range(count):
        for lane in range(32):
            row, column = lane // 4, 2 * (lane % 4)
            wanted = [given[i, column + j, row] if across else given[i, row, column + j] for j in range(2)]
            assert dealt[i, lane].tolist() == wanted
    assert (back == given).all()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("k", [8, 16])
def test_a_product_of_one_warp(k, kind):
    """m16n8k8 and m16n8k16: the fragments as the ISA lists them."""
    a, b, c = small(16, k), small(k, 8), small(16, 8)
    left, right, sums = bits(a, kind), bits(b, kind), c.view(np.uint32)
    group, inside = LANES // 4, LANES % 4

    def pair(low, high):
        return low.astype(np.uint32) | high.astype(np.uint32) << 16

    ra = [pair(left[group + r, 2 * inside + s], left[group + r, 2 * inside + s + 1])
          for s in range(0, k, 8) for r in (0, 8)]  # fmt: skip
    rb = [pair(right[2 * inside + s, group], right[2 * inside + s + 1, group]) for s in range(0, k, 8)]
    rc = [sums[group + r, 2 * inside + s] for r in (0, 8) for s in (0, 1)]
    packed = aligned(np.stack([*ra, *rb, *rc]))
    out = aligned(np.zeros((4, 32), np.float32))
    names = [f"%r{10 + i}" for i in range(len(packed))]
    first, second, third = (", ".join(x) for x in (names[: len(ra)], names[len(ra) : -4], names[-4:]))
    loads = "\n".join(f"ld.global.b32 {name}, [%rd5+{128 * i}];" for i, name in enumerate(names))
    stores = "\n".join(f"st.global.b32 [%rd6+{128 * i}], %r{50 + i};" for i in range(4))
    launch(
        f"""mov.u32 %r1, %tid.x; mad.wide.u32 %rd5, %r1, 4, %rd0; mad.wide.u32 %rd6, %r1, 4, %rd1; {loads}
        mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {{%r50, %r51, %r52, %r53}}, {{{first}}}, {{{second}}},
        {{{third}}}; {stores}""", packed, out,
    )  # fmt: skip
    wanted = a @ b + c
    for i, (r, s) in enumerate([(0, 0), (0, 1), (8, 0), (8, 1)]):
        assert (out[i] == wanted[group + r, 2 * inside + s]).all()


def laid_out(matrix, width, across):
    """The bytes of a wgmma operand (rows, 16) in shared memory at a multiple of 1024, its leading and stride offsets.

    K-major: cores of 8 rows of `width` bytes. MN-major: cores of `width` bytes of rows by 8 of k; those beside each
    other `leading` apart, those of the next 8 of k `stride` apart. In each core the 16-byte chunks change places.
    """
    rows, depth = matrix.shape
    chunk, found = width // 2, {}
    leading, stride = (8 * width * 2, 8 * width) if across else (16, 8 * width)
    for row in range(rows):
        for k in range(depth):
            if across:
                line = row // chunk * leading + k // 8 * stride + k % 8 * width + row % chunk * 2
            else:
                line = row // 8 * stride + row % 8 * width + k * 2
            unit, period = line // 16, {128: 8, 64: 4, 32: 2}[width]
            turn = line // 128 % period
            found[(unit ^ turn) * 16 + line % 16] = matrix[row, k]
    buffer = np.zeros(max(found) // 2 + 1, np.uint16)
    for place, value in found.items():
        buffer[place // 2] = value
    return buffer, leading, stride


def described(start, leading, stride, width):
    return start >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | {128: 1, 64: 2, 32: 3}[width] << 62


def to_shared(pointer, count, start):
    """Text that copies `count` words to shared memory, 128 threads at a time."""
    lines = []
    for first in range(0, count, 128):
        lines.append(f"""add.s32 %r2, %r1, {first}; setp.lt.u32 %p3, %r2, {count};
            mad.wide.u32 %rd50, %r2, 4, {pointer}; mad.lo.s32 %r3, %r2, 4, {1024 + start};
            @%p3 ld.global.b32 %r4, [%rd50]; @%p3 st.shared.b32 [%r3], %r4;""")
    return "\n".join(lines)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize(("width", "across_a", "across_b"), [
    (128, 0, 0), (64, 0, 0), (32, 0, 0), (128, 1, 0), (128, 0, 1), (64, 1, 1), (32, 0, 1),
])  # fmt: skip
@pytest.mark.parametrize("n", [8, 64])
def test_a_product_of_a_warp_group_from_shared_memory(n, width, across_a, across_b, kind):
    if across_b and n < width // 2:
        n = width // 2
    a, b = small(64, 16), small(n, 16)
    (left, la, sa), (right, lb, sb) = laid_out(bits(a, kind), width, across_a), laid_out(bits(b, kind), width, across_b)
    left, right = (np.pad(x, (0, len(x) % 2)).view(np.uint32) for x in (left, right))
    out = aligned(np.zeros((n // 2, 128), np.float32))
    names = [f"%r{20 + i}" for i in range(n // 2)]
    stores = "\n".join(f"st.global.b32 [%rd6+{512 * i}], {name};" for i, name in enumerate(names))
    ones = "\n".join(f"mov.b32 {name}, 0f40000000;" for name in names)
    at = 16384
    launch(
        f"""mov.u32 %r1, %tid.x; mad.wide.u32 %rd6, %r1, 4, %rd2; {to_shared("%rd0", len(left), 0)}
        {to_shared("%rd1", len(right), at)} fence.proxy.async.shared::cta; bar.sync 0; {ones}
        mov.b64 %rd10, {described(1024, la, sa, width)}; mov.b64 %rd11, {described(1024 + at, lb, sb, width)};
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{",".join(names)}}}, %rd10, %rd11, 1, 1, 1,
        {across_a}, {across_b}; wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; {stores}""",
        aligned(left), aligned(right), out, warps=4, shared=at + 16384,
    )  # fmt: skip
    wanted = a @ b.T + 2
    for thread in range(128):
        for i in range(n // 2):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2)
            assert out[i, thread] == wanted[row, 8 * (i // 4) + 2 * (thread % 4) + i % 2]


# --- copies -------------------------------------------------------------------------------------


def test_a_copy_of_nothing_is_zeros():
    given, out = aligned(np.arange(1, 129, dtype=np.uint32)), aligned(np.zeros(128, np.uint32))
    launch(
        """mov.u32 %r1, %tid.x; mad.wide.u32 %rd5, %r1, 16, %rd0; mad.lo.s32 %r2, %r1, 16, 1024; and.b32 %r3, %r1, 1;
        mul.lo.s32 %r3, %r3, 16; cp.async.cg.shared.global [%r2], [%rd5], 16, %r3; cp.async.commit_group;
        cp.async.wait_group 0; ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r2]; mad.wide.u32 %rd6, %r1, 16, %rd1;
        st.global.v4.b32 [%rd6], {%r4, %r5, %r6, %r7};""", given, out,
    )  # fmt: skip
    assert (out.reshape(32, 4)[::2] == 0).all() and (out.reshape(32, 4)[1::2] == given.reshape(32, 4)[1::2]).all()


TILE = """mov.u32 %r1, %tid.x; setp.eq.b32 %p1, %r1, 0; @%p1 mbarrier.init.shared::cta.b64 [{bar}], 1; bar.sync 0;
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [{bar}], {bytes}; mov.b32 %r2, {column}; mov.b32 %r3, {row};
@%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [1024], [%rd0, {{%r2, %r3}}], [{bar}];
{{ .reg .pred complete; waitLoop: mbarrier.try_wait.parity.shared::cta.b64 complete, [{bar}], 0;
@!complete bra.uni waitLoop; }}
"""


@pytest.mark.parametrize("width", [0, 32, 64, 128])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (3, 8), (-2, -3), (9, 60), (40, 0)])
def test_a_tile_is_copied_swizzled_with_zeros_outside_and_written_back_within(row, column, width):
    rows, columns, high = 13, 72, 8
    wide = (width or 48) // 2
    given = aligned(rng.integers(1, 65536, (rows, columns), dtype=np.uint16))
    out, back = aligned(np.zeros((high, wide), np.uint16)), aligned(np.zeros((rows, columns), np.uint16))
    of = Descriptor(given.ctypes.data, (rows, columns), columns, 2, (high, wide), width)
    to = Descriptor(back.ctypes.data, (rows, columns), columns, 2, (high, wide), width)
    words = high * wide // 2
    body = TILE.format(bar=9000, bytes=high * wide * 2, row=row, column=column)
    for first in range(0, words, 32):
        body += f"""add.s32 %r4, %r1, {first}; setp.lt.u32 %p2, %r4, {words}; mad.lo.s32 %r5, %r4, 4, 1024;
        mad.wide.u32 %rd10, %r4, 4, %rd3; @%p2 ld.shared.b32 %r6, [%r5]; @%p2 st.global.b32 [%rd10], %r6;"""
    body += """bar.sync 0; @%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r2, %r3}], [1024];
    cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0; @%p1 mbarrier.inval.shared::cta.b64 [9000];"""
    launch_tile(body, of, to, given, out, back)
    wanted, written = np.zeros_like(out), np.zeros_like(back)
    for i in range(high):
        for j in range(wide):
            line = (i * wide + j) * 2
            turned = line ^ ((line >> 7 & {0: 0, 32: 1, 64: 3, 128: 7}[width]) << 4)
            if 0 <= row + i < rows and 0 <= column + j < columns:
                wanted.reshape(-1)[turned // 2] = given[row + i, column + j]
                written[row + i, column + j] = given[row + i, column + j]
    assert (out == wanted).all() and (back == written).all()


def launch_tile(body, of, to, given, out, back):
    launch(body, of, to, given, out, back, shared=8192)


def test_phases_of_an_mbarrier_alternate():
    """Parity 1 of a new barrier is done; parity 0 once its copies have come; then 1 is what is waited for."""
    given = aligned(np.arange(256, dtype=np.uint16).reshape(8, 32))
    of = Descriptor(given.ctypes.data, (8, 32), 32, 2, (8, 32), 64)
    start = TILE.format(bar=4096, bytes=512, row=0, column=0)
    before = "mbarrier.try_wait.parity.shared::cta.b64 %p5, [4096], {};"
    launch(start.replace("{ .reg", before.format(1) + "{ .reg"), of, given)
    launch(start + before.format(0), of, given)
    with pytest.raises(Fault, match="waits for ever: 1 arrivals, 0 of 0 bytes"):
        launch(start + before.format(1), of, given)


@pytest.mark.parametrize(("change", "words"), [
    ({"stride": 33}, "multiples of 16"), ({"box": (300, 32)}, "256 at most"), ({"box": (8, 64)}, "wider than its"),
])  # fmt: skip
def test_a_descriptor_that_the_driver_refuses_is_refused(change, words):
    with pytest.raises(Fault, match=words):
        Descriptor(**{"base": 256, "shape": (8, 64), "stride": 64, "size": 2, "box": (8, 32), "swizzle": 64} | change)


# --- sums in memory -----------------------------------------------------------------------------


def test_atomic_sums_give_back_what_was_there_and_drop_subnormal_numbers():
    out, old = aligned(np.array([1.0, 0.0], np.float32)), aligned(np.zeros(32, np.float32))
    launch("""mov.u32 %r1, %tid.x; cvt.rn.f32.u32 %r2, %r1; atom.global.gpu.relaxed.add.f32 %r3, [%rd0], %r2;
           mad.wide.u32 %rd5, %r1, 4, %rd1; st.global.b32 [%rd5], %r3; red.global.add.f32 [%rd0+4], 0f00000001;""",
           out, old)  # fmt: skip
    assert out.tolist() == [1 + sum(range(32)), 0.0]
    assert sorted(old.tolist()) == [1 + sum(range(n)) for n in range(32)]


def test_atomic_sums_of_four():
    out = aligned(np.zeros(8, np.float32))
    launch("""mov.u32 %r1, %tid.x; and.b32 %r1, %r1, 1; mad.wide.u32 %rd5, %r1, 16, %rd0;
           mov.b32 %r2, 0f3F800000; mov.b32 %r3, 0f40000000;
           atom.global.gpu.relaxed.add.v4.f32 {%r4, %r5, %r6, %r7}, [%rd5], {%r2, %r3, %r2, %r3};""", out)  # fmt: skip
    assert out.tolist() == [16, 32, 16, 32] * 2
