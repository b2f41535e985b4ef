"""What benchmarks.ptx finds wrong: each kernel with one fault, and the same kernel without it."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch
import triton
import triton.language as tl
from ptx_by_hand import aligned, launch, made

from benchmarks.ptx import Fault, emulated
from benchmarks.ptx.copying import Descriptor

START = (
    "mov.u32 %r1, %tid.x; mad.lo.s32 %r2, %r1, 4, 1024; xor.b32 %r3, %r1, {partner}; mad.lo.s32 %r3, %r3, 4, 1024;\n"
)


def both(kernel, fault, words, *given, **options):
    """The kernel runs; with the line replaced or left out it is found."""
    launch(kernel, *given, **options)
    for old, new in fault.items():
        assert old in kernel
        with pytest.raises(Fault, match=words):
            launch(kernel.replace(old, new, 1), *given, **options)


# --- shared memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("partner", [1, 32])
def test_a_read_of_what_another_thread_wrote_needs_a_barrier(partner):
    kernel = START.format(partner=partner) + "st.shared.b32 [%r2], %r1; bar.sync 0; ld.shared.b32 %r4, [%r3];"
    both(kernel, {"bar.sync 0;": ""}, r"shared memory\+\d+: block 0, thread \d+ reads what .* wrote", warps=2)


@pytest.mark.parametrize("partner", [1, 32])
def test_a_write_over_what_another_thread_reads_needs_a_barrier(partner):
    kernel = (
        START.format(partner=partner)
        + """st.shared.b32 [%r2], %r1; bar.sync 0; ld.shared.b32 %r4, [%r3]; bar.sync 0;
        st.shared.b32 [%r2], %r4;"""
    )
    both(kernel, {"bar.sync 0;\n        st": "st"}, "writes what .* read", warps=2)


def test_a_write_over_what_another_thread_wrote_needs_a_barrier():
    kernel = START.format(partner=1) + "st.shared.b32 [%r2], %r1; bar.sync 0; st.shared.b32 [%r3], %r1;"
    both(kernel, {"bar.sync 0;": ""}, "writes where .* wrote")


def test_threads_of_one_instruction_write_one_place_only_if_they_write_the_same():
    kernel = START.format(partner=1) + "mov.b32 %r5, 3; st.shared.b32 [1024], %r5;"
    both(kernel, {"mov.b32 %r5, 3": "mov.b32 %r5, %r1"}, "different values")


def test_a_barrier_of_a_warp_is_enough_within_it_and_not_beyond():
    kernel = START.format(partner=1) + "st.shared.b32 [%r2], %r1; bar.warp.sync -1; ld.shared.b32 %r4, [%r3];"
    both(kernel, {"%r1, 1;": "%r1, 32;", "bar.warp.sync -1;": ""}, "reads what .* wrote", warps=2)


def test_all_threads_of_a_warp_come_to_its_barrier():
    kernel = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32; @%p1 bar.warp.sync -1;"
    both(kernel, {"%r1, 32": "%r1, 31"}, "threads of a warp are missing", warps=2)


def test_readers_of_several_warps_are_all_remembered():
    """All threads read a word, warp 0's last among them: a barrier of warp 1 does not order warp 0's reads."""
    kernel = """mov.u32 %r1, %tid.x; setp.eq.b32 %p1, %r1, 40; mov.b32 %r5, 7; @%p1 st.shared.b32 [1024], %r5;
        bar.sync 0; ld.shared.b32 %r4, [1024]; bar.warp.sync -1; bar.sync 0; @%p1 st.shared.b32 [1024], %r5;"""
    both(kernel, {"bar.warp.sync -1; bar.sync 0;": "bar.warp.sync -1;"}, "writes what .* read", warps=2)


def test_what_nobody_wrote_is_nan():
    out = aligned(np.zeros(32, np.float32))
    launch(
        "mov.u32 %r1, %tid.x; mad.wide.u32 %rd5, %r1, 4, %rd0; ld.shared.b32 %r2, [1024]; st.global.b32 [%rd5], %r2;",
        out,
    )
    assert np.isnan(out).all()


@pytest.mark.parametrize("place", ["1023", "5120", "5118", "1020"])
def test_shared_memory_has_an_end_and_a_beginning(place):
    kernel = "mov.b32 %r2, 5116; st.shared.b32 [%r2], 1;"
    both(kernel, {"5116": place}, "shared memory: 4 bytes at .*outside|no multiple", shared=4096)


@pytest.mark.parametrize(("op", "good", "bad"), [("b32", 1028, 1026), ("v2.b32", 1032, 1028), ("v4.b32", 1040, 1032)])
def test_vectors_lie_at_multiples_of_their_size(op, good, bad):
    registers = "{%r4, %r5, %r6, %r7}" if "v4" in op else "{%r4, %r5}" if "v2" in op else "%r4"
    kernel = f"mov.b32 %r2, {good}; ld.shared.{op} {registers}, [%r2];"
    both(kernel, {str(good): str(bad)}, "no multiple of")
    array = aligned(np.zeros(8, np.uint32))
    kernel = f"add.s64 %rd1, %rd0, {good - 1024}; ld.global.{op} {registers}, [%rd1];"
    both(kernel, {f"%rd0, {good - 1024}": f"%rd0, {bad - 1024}"}, "no multiple of", array)


def test_matrices_lie_at_multiples_of_16_bytes_and_take_whole_warps():
    kernel = """mov.u32 %r1, %tid.x; and.b32 %r2, %r1, 7; mad.lo.s32 %r2, %r2, 16, 1024; setp.lt.u32 %p1, %r1, 32;
        @%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r3}, [%r2];"""
    both(kernel, {"16, 1024": "16, 1032"}, "no multiple of 16", warps=2)
    both(kernel, {"%r1, 32;": "%r1, 40;"}, "threads of a warp are missing", warps=2)


def test_before_sm_80_lanes_whose_rows_are_not_read_have_an_address_too():
    kernel = """mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 8; mad.lo.s32 %r2, %r1, 16, 1024;
        @!%p1 mov.b32 %r2, 1024; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r3}, [%r2];"""
    both(kernel, {"%r2, 1024; ld": "%r2, 8; ld"}, "outside|no multiple", target="75")
    launch(kernel.replace("%r2, 1024; ld", "%r2, 8; ld"), target="80")


# --- barriers -----------------------------------------------------------------------------------


def test_all_threads_come_to_a_barrier():
    kernel = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 64; @%p1 bar.sync 0;"
    both(kernel, {"%r1, 64": "%r1, 32"}, "a barrier that not all threads", warps=2)
    kernel = """mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 64; @!%p1 bra $OTHER; bar.sync 0;
        $OTHER: mov.b32 %r2, 0;"""
    both(kernel, {"%r1, 64": "%r1, 63"}, "a barrier that not all threads", warps=2)


def test_a_loop_without_an_end_is_ended(monkeypatch):
    monkeypatch.setattr("benchmarks.ptx.machine.LONGEST", 1000)
    kernel = "mov.b32 %r1, 0; $TOP: add.s32 %r1, %r1, 1; setp.lt.s32 %p1, %r1, 9; @%p1 bra $TOP;"
    both(kernel, {"%r1, 1;": "%r1, 0;"}, "no end after")


# --- global memory ------------------------------------------------------------------------------


def test_threads_share_a_tensor_behind_a_barrier_and_blocks_not_at_all():
    array = aligned(np.zeros(64, np.uint32))
    kernel = """mov.u32 %r1, %tid.x; mad.wide.u32 %rd1, %r1, 4, %rd0; xor.b32 %r2, %r1, 1;
        mad.wide.u32 %rd2, %r2, 4, %rd0; st.global.b32 [%rd1], %r1; bar.sync 0; ld.global.b32 %r3, [%rd2];"""
    both(kernel, {"bar.sync 0;": ""}, r"array0\+\d+: .* reads what .* wrote", array)
    with pytest.raises(Fault, match="block"):
        launch(kernel, array, grid=(2, 1, 1))


BLOCKS = """mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mad.lo.s32 %r3, %r2, 32, %r1; mad.wide.u32 %rd1, %r3, 4, %rd0;
    {first} bar.sync 0; {second}"""


@pytest.mark.parametrize(("first", "second", "words"), [
    ("st.global.b32 [%rd1], %r1;", "ld.global.b32 %r4, [%rd1];", "another block"),
    ("ld.global.b32 %r4, [%rd1];", "st.global.b32 [%rd1], %r4;", "another block"),
    ("st.global.b32 [%rd1], %r1;", "", "another block"),
    ("red.global.add.f32 [%rd1], 0f3F800000;", "ld.global.b32 %r4, [%rd1];", "another block"),
    ("red.global.add.f32 [%rd1], 0f3F800000;", "st.global.b32 [%rd1], %r1;", "another block"),
])  # fmt: skip
def test_blocks_do_not_touch_what_others_write(first, second, words):
    """Each block has places of its own; with one place for all threads of all blocks it is found."""
    array = aligned(np.zeros(96, np.float32))
    kernel = BLOCKS.format(first=first, second=second)
    launch(kernel, array, grid=(3, 1, 1))
    for place in ("mad.lo.s32 %r3, %r2, 0, %r1;", "mov.b32 %r3, 5; mov.b32 %r1, 5;"):
        for seed in range(3):
            with pytest.raises(Fault, match=words):
                launch(kernel.replace("mad.lo.s32 %r3, %r2, 32, %r1;", place), array, grid=(3, 1, 1), seed=seed)


def test_blocks_may_sum_into_one_place():
    array = aligned(np.zeros(1, np.float32))
    launch("red.global.add.f32 [%rd0], 0f3F800000;", array, grid=(3, 1, 1), warps=2)
    assert array[0] == 192


@pytest.mark.parametrize("offset", [-4, 128, 126])
def test_global_memory_ends_with_its_tensors(offset):
    array = aligned(np.zeros(32, np.uint32))
    kernel = "add.s64 %rd1, %rd0, 124; ld.global.b32 %r1, [%rd1];"
    both(kernel, {"124": str(offset)}, "outside|no multiple", array)
    both(kernel.replace("ld.global.b32 %r1, [%rd1]", "st.global.b32 [%rd1], 0"), {"124": str(offset)},
         "outside|no multiple", array)  # fmt: skip


# --- asynchronous copies ------------------------------------------------------------------------

COPY = """mov.u32 %r1, %tid.x; mad.wide.u32 %rd1, %r1, 16, %rd0; mad.lo.s32 %r2, %r1, 16, 1024; xor.b32 %r3, %r1, 1;
    mad.lo.s32 %r3, %r3, 16, 1024; cp.async.cg.shared.global [%r2], [%rd1], 16; cp.async.commit_group;
    cp.async.wait_group 0; bar.sync 0; ld.shared.b32 %r4, [%r3];
"""


def test_a_copy_is_waited_for_and_then_told_by_a_barrier():
    array = aligned(np.zeros(128, np.uint32))
    fault = {"wait_group 0; bar": "wait_group 1; bar", "cp.async.wait_group 0;": "", "cp.async.commit_group;": ""}
    both(COPY, fault, "still being copied", array)
    both(COPY, {"bar.sync 0;": ""}, "reads what .* wrote", array)
    both(COPY, {"ld.shared.b32 %r4, [%r3];": "cp.async.cg.shared.global [%r2], [%rd1], 16; cp.async.commit_group;"},
         "ended while copies", array)  # fmt: skip
    both(COPY, {"cp.async.wait_group 0;": "st.shared.b32 [%r2], %r1; cp.async.wait_group 0;"}, "written while", array)
    both(COPY, {"16, 1024; xor": "16, 1028; xor"}, "no multiple of 16", array)


def test_the_newest_groups_may_still_be_on_their_way():
    array = aligned(np.zeros(128, np.uint32))
    more = "mad.lo.s32 %r5, %r1, 16, 2048; cp.async.cg.shared.global [%r5], [%rd1], 16; cp.async.commit_group;"
    kernel = COPY.replace("cp.async.wait_group 0;", more + "cp.async.wait_group 1;") + "cp.async.wait_group 0;"
    both(kernel, {"wait_group 1;": "wait_group 2;"}, "still being copied", array)


# --- tensor cores of a warp group ---------------------------------------------------------------

NAMES = ",".join(f"%r{20 + i}" for i in range(4))
GROUP = f"""mov.u32 %r1, %tid.x; mad.lo.s32 %r2, %r1, 16, 1024; mov.b32 %r3, 0; mov.b32 %r20, %r3; mov.b32 %r21, %r3;
    mov.b32 %r22, %r3; mov.b32 %r23, %r3;
    st.shared.v4.b32 [%r2], {{%r3, %r3, %r3, %r3}}; st.shared.v4.b32 [%r2+2048], {{%r3, %r3, %r3, %r3}};
    fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;
    mov.b64 %rd10, {1024 >> 4 | 1 << 16 | 16 << 32 | 3 << 62};
    mov.b64 %rd11, {5120 >> 4 | 1 << 16 | 16 << 32 | 3 << 62};
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{{NAMES}}}, %rd10, %rd10, 1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; bar.sync 0; st.shared.b32 [%r2], %r3;
    mad.wide.u32 %rd5, %r1, 4, %rd0; st.global.b32 [%rd5], %r20;"""


def test_tensor_cores_read_what_is_fenced_and_told():
    out = aligned(np.ones(128, np.float32))
    both(GROUP, {"fence.proxy.async.shared::cta;": "", "fence.proxy.async.shared::cta; bar.sync 0;": "bar.sync 0;"},
         "without a fence", out, warps=4, shared=8192)  # fmt: skip
    both(GROUP, {"bar.sync 0; wgmma": "wgmma"}, "without a barrier", out, warps=4, shared=8192)
    both(GROUP, {"wgmma.fence.sync.aligned;": ""}, "no wgmma.fence", out, warps=4, shared=8192)
    twice = GROUP.replace(
        "wgmma.wait",
        """wgmma.fence.sync.aligned; wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16
        {%r30,%r31,%r32,%r33}, {%r3,%r3,%r3,%r3}, %rd10, 0, 1, 1, 0; wgmma.commit_group.sync.aligned; wgmma.wait""",
        1,
    )
    both(twice, {"wgmma.fence.sync.aligned; wgmma": "wgmma"}, "no wgmma.fence", out, warps=4, shared=8192)
    both(GROUP, {"%rd10, %rd10, 1": "%rd10, %rd11, 1"}, "outside", out, warps=4, shared=4096 + 128)
    assert not out.any()


def test_what_tensor_cores_read_and_write_is_left_alone_until_it_is_waited_for():
    out = aligned(np.ones(128, np.float32))
    both(GROUP, {"wgmma.wait_group.sync.aligned 0;": ""}, "tensor cores or the copy engine still read", out, warps=4,
         shared=8192)  # fmt: skip
    both(GROUP, {"aligned 0; bar.sync 0;": "aligned 0;"}, "writes what .* read", out, warps=4, shared=8192)
    both(
        GROUP, {"wgmma.wait_group": "mov.b32 %r20, 0; wgmma.wait_group"}, "%r20 was written", out, warps=4, shared=8192
    )
    late = GROUP.replace("wgmma.wait_group.sync.aligned 0; bar.sync 0; st.shared.b32 [%r2], %r3;", "")
    with pytest.raises(Fault, match="ended while"):
        launch(late, out, warps=4, shared=8192)
    launch(late + "wgmma.wait_group.sync.aligned 0;", out, warps=4, shared=8192)
    assert np.isnan(out).all()  # the sums were read before they were waited for


# --- the copy engine ----------------------------------------------------------------------------

ENGINE = """mov.u32 %r1, %tid.x; setp.eq.b32 %p1, %r1, 5; mad.lo.s32 %r2, %r1, 8, 1024; mov.b32 %r3, 0;
    @%p1 mbarrier.init.shared::cta.b64 [2048], 1; bar.sync 0; setp.eq.b32 %p2, %r1, 6;
    @%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [2048], 256;
    @%p2 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [1024], [%rd0, {%r3, %r3}], [2048];
    { .reg .pred complete; waitLoop: mbarrier.try_wait.parity.shared::cta.b64 complete, [2048], %r3;
    @!complete bra.uni waitLoop; }
    ld.shared.v2.b32 {%r4, %r5}, [%r2]; bar.sync 0; st.shared.v2.b32 [%r2], {%r5, %r4};
    fence.proxy.async.shared::cta; bar.sync 0;
    @%p2 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r3, %r3}], [1024];
    cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0; bar.sync 0; st.shared.b32 [%r2], %r3;
    @%p2 mbarrier.inval.shared::cta.b64 [2048];"""


def engine(kernel):
    given, out = (aligned(np.arange(128, dtype=np.uint16).reshape(8, 16) * n) for n in (1, 0))
    tiles = [Descriptor(x.ctypes.data, (8, 16), 16, 2, (8, 16), 32) for x in (given, out)]
    launch(kernel, *tiles, given, out, shared=2048)
    return given, out


def test_the_copy_engine_is_waited_for_fenced_and_told():
    given, out = engine(ENGINE)
    assert (out.view(np.uint32).reshape(-1, 2) == given.view(np.uint32).reshape(-1, 2)[:, ::-1]).all()
    waits = ENGINE[ENGINE.index("{ .reg") : ENGINE.index("ld.shared.v2")]
    for old, new, words in (
        (waits, "", "still being copied"),
        ("[2048], 256;", "[2048], 512;", "waits for ever: 0 arrivals, 256 of 512"),
        ("@%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [2048], 256;", "", "waits for ever: 1 arrivals"),
        ("[2048], %r3;", "[2048], 2;", "parity 2"),
        ("[2048], 1; bar.sync 0;", "[2048], 1;", "reads what .* wrote"),
        ("@%p1 mbarrier.init.shared::cta.b64 [2048], 1;", "", "no mbarrier"),
        ("[2048], 1; bar.sync 0;", "[2048], 2; bar.sync 0;", "waits for ever: 1 arrivals"),
        ("@%p2 mbarrier.arrive", "mbarrier.arrive", "more arrivals"),
        ("@%p1 mbarrier.init", "@!%p1 mbarrier.init", "started by several"),
        ("@%p1 mbarrier.init", "@%p1 mbarrier.init.shared::cta.b64 [2048], 1; @%p1 mbarrier.init", "an mbarrier lies"),
        ("@%p2 mbarrier.inval", "mbarrier.inval", "ended by several"),
        ("fence.proxy.async.shared::cta;", "", "without a fence"),
        ("fence.proxy.async.shared::cta; bar.sync 0;", "fence.proxy.async.shared::cta;", "without a barrier"),
        ("cp.async.bulk.wait_group.read 0;", "", "still read"),
        ("wait_group.read 0; bar.sync 0;", "wait_group.read 0;", "writes what .* read"),
        ("cp.async.bulk.commit_group;", "", "still read"),
        ("[%rd0, {%r3", "[%rd2, {%r3", "no descriptor"),
        ("bar.sync 0; st.shared.v2", "bar.sync 0; st.shared.b32 [2048], %r3; st.shared.v2", "an mbarrier"),
        ("[1024], [%rd0", "[1040], [%rd0", "no multiple of 128"),
    ):  # fmt: skip
        assert old in ENGINE
        with pytest.raises(Fault, match=words):
            engine(ENGINE.replace(old, new, 1))


def test_a_thread_may_give_to_the_copy_engine_what_it_wrote_itself():
    array = aligned(np.zeros((1, 8), np.uint16))
    kernel = """mov.u32 %r1, %tid.x; setp.eq.b32 %p1, %r1, 3; setp.eq.b32 %p2, %r1, 3; mov.b32 %r3, 0;
        @%p1 st.shared.v4.b32 [1024], {%r3, %r3, %r3, %r3}; fence.proxy.async.shared::cta;
        @%p2 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd0, {%r3, %r3}], [1024];
        cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;"""
    tile = Descriptor(array.ctypes.data, (1, 8), 8, 2, (1, 8), 0)
    both(kernel, {"%p1, %r1, 3": "%p1, %r1, 4"}, "without a barrier", tile, array)


def test_what_the_copy_engine_writes_is_read_only_behind_a_full_wait():
    read = "mov.b64 %rd9, %rd3; ld.global.b32 %r7, [%rd9];"
    engine(ENGINE + "cp.async.bulk.wait_group 0; @!%p2 bra $OUT; " + read + " $OUT: mov.b32 %r8, 0;")
    with pytest.raises(Fault, match="still being copied"):
        engine(ENGINE + "@!%p2 bra $OUT; " + read + " $OUT: mov.b32 %r8, 0;")


# --- kernels of Triton --------------------------------------------------------------------------


@triton.jit
def sums(X, OUT, STRIDE: tl.constexpr, ATOMIC: tl.constexpr, N: tl.constexpr):
    x = tl.load(X + tl.program_id(0) * N + tl.arange(0, N))
    if ATOMIC:
        tl.atomic_add(OUT + tl.arange(0, N), x)
    else:
        tl.store(OUT + tl.program_id(0) * STRIDE + tl.arange(0, N), x)


@pytest.mark.parametrize("target", [75, 90])
def test_programs_of_a_kernel_that_write_one_place_are_found(target):
    x, out = torch.randn(4, 256), torch.zeros(4, 256)
    with emulated(target) as names:
        sums[(4,)](x, out, 256, False, 256)
        total = torch.zeros(256)
        sums[(4,)](x, total, 0, True, 256)
        with pytest.raises(Fault, match="another block"):
            sums[(4,)](x, out, 128, False, 256)
        with pytest.raises(Fault, match="OUT of 4096 bytes: outside"):
            sums[(4,)](x, out, 260, False, 256)
    assert torch.equal(out[0], x[0]) and torch.allclose(total, x.sum(0), atol=1e-5)
    assert names == ["sums"] * 4


def test_a_change_is_made_of_one_emulation_and_none_later():
    x, out = torch.randn(4, 256), torch.zeros(4, 256)
    for change, fails in ((None, False), (lambda name, text: text.replace("ctaid.x", "ctaid.y"), True), (None, False)):
        with emulated(90, change) as names:
            if fails:
                with pytest.raises(Fault, match="block"):
                    sums[(4,)](x, out, 256, False, 256)
            else:
                sums[(4,)](x, out, 256, False, 256)
                assert names == ["sums"]


def test_nothing_is_left_of_a_launch_that_was_ended():
    """All launches of a kernel are by one machine."""
    source, result = aligned(np.arange(32, dtype=np.uint32)), aligned(np.zeros(32, np.uint32))
    machine, storages = made(
        """mov.u32 %r1, %tid.x; mad.lo.s32 %r2, %r1, 4, 1024; mad.wide.u32 %rd10, %r1, 4, %rd0;
        cp.async.ca.shared.global [%r2], [%rd10], 4; cp.async.commit_group;
        mad.wide.u32 %rd11, %r1, 4, %rd1; st.global.b32 [%rd11], %r1; cp.async.wait_group 0;
        ld.shared.b32 %r3, [%r2]; mul.lo.s32 %r3, %r3, 3; st.global.b32 [%rd11], %r3;""",
        source,
        result,
    )
    for _ in range(2):
        with pytest.raises(Fault, match="outside"):
            machine.launch((1, 1, 1), storages[:1])
        machine.launch((1, 1, 1), storages)
        assert (result == 3 * source).all()
        result[:] = 0
