"""Single products of tcgen05 (sm_100) in programs written for it: layouts, signs, tensor memory.

Where operands lie in shared memory is said here once more, in the notation of "Canonical Layouts" of NVIDIA's PTX ISA.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)

from benchmarks.ptx import Fault
from benchmarks.ptx.machine import Machine
from benchmarks.ptx.parsing import parse

K = 16
SWIZZLED = {128: (3, 2), 64: (2, 4), 32: (1, 6)}  # bytes -> bits that are moved, number in the descriptor
OPERANDS = 1024  # where they begin in the program's shared memory
A_AT, B_AT = 2048, 2048 + 32768  # addresses, 1,024 of which a card keeps
THREADS = 128


@dataclass(frozen=True)
class Operand:
    """One of a product, of `rows` along M or N and 16 along K."""

    rows: int
    across: bool = False  # elements along M or N beside each other
    swizzle: int = 128
    gap: int = 0  # bytes that lie between groups, behind what they need

    def strides(self) -> tuple[int, int]:
        """LBO and SBO in bytes."""
        if not self.across:
            return 16, 8 * self.swizzle + self.gap
        stride = 8 * self.swizzle + self.gap
        return 2 * stride, stride  # 16 along K, then on along M or N

    def descriptor(self, start: int) -> int:
        leading, stride = self.strides()
        kind = SWIZZLED[self.swizzle][1]
        return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | 1 << 46 | kind << 61

    def places(self, start: int) -> np.ndarray:
        """Addresses (rows, 16). T = 8 elements of 16 bits are 128 bits; s = 8, 4 or 2 of these are the swizzle.
        K-major: ((8, m), (T, 2k)) : ((s T, SBO), (1, T)). MN-major: ((T, s, m), (8, k)) : ((1, T, LBO), (s T, SBO))."""
        T, s, (leading, stride) = 8, self.swizzle // 16, (x // 2 for x in self.strides())
        if self.across:
            shape, steps = ((T, s, -1), (8, -1)), ((1, T, leading), (s * T, stride))
        else:
            shape, steps = ((8, -1), (T, -1)), ((s * T, stride), (1, T))
        row, column = (layout(n, *pair) for n, *pair in zip((self.rows, K), shape, steps))
        bits = SWIZZLED[self.swizzle][0]
        at = start + 2 * (row[:, None] + column[None, :])
        return at ^ ((at >> 7 & ((1 << bits) - 1)) << 4)


def layout(count: int, shape: tuple[int, ...], steps: tuple[int, ...]) -> np.ndarray:
    """Offsets of 0 to count - 1 in a layout of CuTe's; -1: as far as it goes."""
    left, found = np.arange(count), np.zeros(count, np.int64)
    for size, step in zip(shape, steps):
        found += (left % size if size > 0 else left) * step
        left = left // size if size > 0 else left * 0
    return found


@dataclass(frozen=True)
class Product:
    a: Operand
    b: Operand
    kinds: tuple[str, str] = ("bf16", "bf16")
    negated: tuple[bool, bool] = (False, False)
    add: bool = False  # to what stores put there before
    lane: int = 0  # of 64 rows: 0 or 16
    stored: bool = False  # A comes by tcgen05.st, not from shared memory

    def word(self) -> int:
        kinds = ["f16", "bf16"].index(self.kinds[0]) << 7 | ["f16", "bf16"].index(self.kinds[1]) << 10
        flags = [*self.negated, self.a.across, self.b.across]
        more = sum(flag << 13 + i for i, flag in enumerate(flags))
        return 1 << 4 | kinds | more | self.b.rows >> 3 << 17 | self.a.rows >> 4 << 24

    def lanes(self) -> np.ndarray:
        """Of A's rows: each of 128, or 16 of each warp's 32."""
        row = np.arange(self.a.rows)
        return row if self.a.rows == 128 else self.lane + row // 16 * 32 + row % 16

    def numbers(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A (m, 16), B (n, 16) and what D is before (m, n): what its types can hold."""
        rng = np.random.default_rng(seed)
        a, b = (rng.integers(-32, 33, (x.rows, K)) / 8 for x in (self.a, self.b))
        return a, b, rng.standard_normal((self.a.rows, self.b.rows)).astype(np.float32)

    def wanted(self, a: np.ndarray, b: np.ndarray, before: np.ndarray) -> np.ndarray:
        sign = -1 if self.negated[0] != self.negated[1] else 1
        return (sign * (a @ b.T) + (before if self.add else 0)).astype(np.float32)


def bits(x: np.ndarray, kind: str) -> np.ndarray:
    """16-bit patterns of numbers that bf16 and f16 hold exactly."""
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


# --- programs -----------------------------------------------------------------------------------

ALLOCATE = "@%p0 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [global_smem], {columns};"
FREE = "@%p0 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r4, {columns};"
MULTIPLY = "@%p1 tcgen05.mma.cta_group::1.kind::f16 [%r8+0], {a}, %rd9, %r7, %p3;"
COMMIT = "@%p1 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r9];"
LOOP = """waiting:
  mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r9], 0;
  @!%p2 bra.uni waiting;"""
LOADED = "tcgen05.wait::ld.sync.aligned;"
PROGRAM = """.version 8.7
.target sm_100a
.visible .entry product(.param .u64 product_param_0, .param .u64 product_param_1, .param .u64 product_param_2,
  .param .u64 product_param_3)
{{
  .reg .pred %p<4>;
  .reg .b32 %r<500>;
  .reg .b64 %rd<12>;
  ld.param.b64 %rd0, [product_param_0];
  ld.param.b64 %rd1, [product_param_1];
  ld.param.b64 %rd2, [product_param_2];
  ld.param.b64 %rd3, [product_param_3];
  mov.u32 %r0, %tid.x;
  shl.b32 %r1, %r0, 4;
  mov.b32 %r2, global_smem;
  add.s32 %r3, %r2, %r1;
  add.s32 %r9, %r2, 8;
  mad.wide.u32 %rd4, %r0, 16, %rd0;
  mad.wide.u32 %rd5, %r0, {pitch}, %rd1;
  mad.wide.u32 %rd6, %r0, {pitch}, %rd2;
  mad.wide.u32 %rd7, %r0, 32, %rd3;
  setp.lt.u32 %p0, %r0, 32;
  setp.eq.u32 %p1, %r0, 0;
  mov.pred %p3, {add};
  {allocate}
  @%p0 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
  @%p1 mbarrier.init.shared::cta.b64 [%r9], 1;
  {copies}
  bar.sync 0;
  {first}
  shl.b32 %r5, %r0, 16;
  and.b32 %r5, %r5, 6291456;
  add.s32 %r6, %r4, %r5;
  add.s32 %r8, %r4, {lane};
  {before}
  fence.proxy.async.shared::cta;
  bar.sync 0;
  mov.b32 %r7, {word};
  mov.b64 %rd8, {a_descriptor};
  mov.b64 %rd9, {b_descriptor};
  {multiply}
  {commit}
  {loop}
  {load}
  {loaded}
  {stores}
  bar.sync 0;
  {free}
  ret;
}}
"""


def program(product: Product, **parts: Any) -> str:
    """128 threads copy the operands' bytes (parameter 0) to shared memory, one multiplies, each writes what it loads
    of D (parameter 1). Parameters 2 and 3: D before, and A where it is stored, a row for each lane. parts: in their
    place."""
    n = product.b.rows
    d, a = ([f"%r{first + i}" for i in range(count)] for first, count in ((100, n), (400, 8)))
    columns = max(32, 1 << (n + 7).bit_length())
    copies = [
        f"ld.global.v4.b32 {{%r10,%r11,%r12,%r13}}, [%rd4+{at}];\n"
        f"st.shared::cta.v4.b32 [%r3+{at + OPERANDS}], {{%r10,%r11,%r12,%r13}};"
        for at in range(0, image_size(product), 16 * THREADS)
    ]
    stored = [*(put(d, "%rd6", 0) if product.add else ()), *(put(a, "%rd7", n) if product.stored else ())]
    fill = {
        "pitch": 4 * n,
        "add": -int(product.add),
        "lane": product.lane << 16,
        "copies": "\n".join(copies),
        "allocate": ALLOCATE.format(columns=columns),
        "first": "ld.shared.b32 %r4, [global_smem];",
        "before": "\n".join(stored),
        "word": product.word(),
        "a_descriptor": product.a.descriptor(A_AT),
        "b_descriptor": product.b.descriptor(B_AT),
        "multiply": MULTIPLY.format(a=f"[%r8+{n}]" if product.stored else "%rd8"),
        "commit": COMMIT,
        "loop": LOOP,
        "load": "\n".join(pieces(f"tcgen05.ld.{ROWS}.x8.b32 {{{{{{}}}}}}, [%r6+{{}}];", d, 0)),
        "loaded": LOADED,
        "stores": "\n".join(f"st.global.b32 [%rd5+{4 * i}], {name};" for i, name in enumerate(d)),
        "free": FREE.format(columns=columns),
    }
    return PROGRAM.format(**fill | parts)


ROWS = "sync.aligned.32x32b"


def pieces(line: str, registers: list[str], column: int) -> list[str]:
    """Eight registers at a time."""
    return [line.format(",".join(registers[i : i + 8]), column + i) for i in range(0, len(registers), 8)]


def put(registers: list[str], address: str, column: int) -> list[str]:
    """A row of memory into a lane's columns."""
    loads = [f"ld.global.b32 {name}, [{address}+{4 * i}];" for i, name in enumerate(registers)]
    stores = [f"tcgen05.st.{ROWS}.x8.b32 [%r6+{column + i}], {{{','.join(registers[i : i + 8])}}};"
              for i in range(0, len(registers), 8)]  # fmt: skip
    return [*loads, *stores, "tcgen05.wait::st.sync.aligned;"]


def image_size(product: Product) -> int:
    last = max(product.a.places(A_AT).max(), product.b.places(B_AT).max()) + 2 - A_AT
    return -(-int(last) // (16 * THREADS)) * 16 * THREADS


def execute(product: Product, text: str, seed: int) -> np.ndarray:
    """What each of the 128 threads wrote (128, n)."""
    a, b, before = product.numbers(seed)
    image = np.full(image_size(product), 0xFF, np.uint8)  # NaN where nothing should be read
    for operand, start, x, kind in zip((product.a, product.b), (A_AT, B_AT), (a, b), product.kinds):
        if not (product.stored and operand is product.a):
            image.view(np.uint16)[(operand.places(start) - A_AT) // 2] = bits(x, kind)
    n, lanes = product.b.rows, product.lanes()
    out, d, left = (np.full((THREADS, count), np.nan, np.float32) for count in (n, n, 8))
    d[lanes] = before
    left[lanes] = bits(a, product.kinds[0]).view(np.uint32).view(np.float32)
    memory = (image, out, d, left)
    given = {f"product_param_{i}": np.uint64(x.ctypes.data).tobytes() for i, x in enumerate(memory)}
    machine = Machine(parse(text), THREADS // 32, OPERANDS + image.size, given)
    machine.launch((1, 1, 1), [(x.ctypes.data, x.nbytes, f"memory {i}") for i, x in enumerate(memory)])
    return out


def check(product: Product, seed: int = 0, **parts: Any) -> np.ndarray:
    """Asserts that D is right, on its lanes; the others'."""
    out = execute(product, program(product, **parts), seed)
    lanes = product.lanes()
    np.testing.assert_allclose(out[lanes], product.wanted(*product.numbers(seed)), rtol=1e-6, atol=1e-6)
    return np.delete(out, lanes, axis=0)


# --- products -----------------------------------------------------------------------------------

OPERAND = st.builds(Operand, st.just(0), st.booleans(), st.sampled_from([32, 64, 128]), st.sampled_from([0, 1024]))
PLAIN = Product(Operand(128), Operand(32))
HALF = Product(Operand(64), Operand(32))


@settings(max_examples=40)
@given(
    st.integers(0, 2**32), OPERAND, OPERAND, st.sampled_from([64, 128]), st.integers(1, 8), st.booleans(),
    st.sampled_from(["bf16", "f16"]), st.sampled_from(["bf16", "f16"]), st.tuples(st.booleans(), st.booleans()),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_products(seed, a, b, m, columns, lower, kind, other, negated, add, stored):
    """Every layout, sign and type; D of each number of columns; A from shared and from tensor memory."""
    a = replace(a, rows=m, across=a.across and not stored)
    b = replace(b, rows=columns * (8 if m == 64 else 16))
    product = Product(a, b, (kind, other), negated, add, 16 if lower and m == 64 else 0, stored)
    others = check(product, seed)
    assert np.isnan(others).all(), "tensor memory that nobody wrote"


def test_the_widest_product():
    check(Product(Operand(128), Operand(256, across=True)))


def test_products_alike_follow_each_other():
    """The second adds to what the first will have written, and the mbarrier tells of both."""
    product = replace(PLAIN, add=True)
    twice = MULTIPLY.format(a="%rd8") + "\n" + MULTIPLY.format(a="%rd8")
    out = execute(product, program(product, multiply=twice), 5)
    a, b, before = product.numbers(5)
    np.testing.assert_allclose(out, 2 * (a @ b.T) + before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("split", [0, 8, 16])
def test_two_halves_of_16_lanes(split):
    """tcgen05.ld.16x32bx2: threads 16 to 31 of a warp read the same lanes as 0 to 15, `split` columns on."""
    registers = ",".join(f"%r{100 + i}" for i in range(16))
    load = f"tcgen05.ld.sync.aligned.16x32bx2.x16.b32 {{{registers}}}, [%r6+0], {split};"
    out = execute(HALF, program(HALF, load=load), 3)
    wanted = HALF.wanted(*HALF.numbers(3))
    for warp, thread in itertools.product(range(4), range(32)):
        row, first = 16 * warp + thread % 16, split * (thread // 16)
        np.testing.assert_allclose(out[32 * warp + thread, :16], wanted[row, first : first + 16], rtol=1e-6)
    assert np.isnan(out[:, 16:]).all(), "registers that nothing was loaded into"


def test_two_halves_are_stored_as_they_are_loaded():
    registers = ",".join(f"%r{100 + i}" for i in range(16))
    moves = [
        *(f"add.s32 %r{100 + i}, %r0, {1000 * i};" for i in range(16)),
        f"tcgen05.st.sync.aligned.16x32bx2.x16.b32 [%r6+0], 16, {{{registers}}};",
        "tcgen05.wait::st.sync.aligned;",
    ]
    out = execute(HALF, program(HALF, before="\n".join(moves), multiply="", commit="", loop=""), 0).view(np.int32)
    for warp, lane, column in itertools.product(range(4), range(16), range(32)):
        assert out[32 * warp + lane, column] == 32 * warp + lane + 16 * (column // 16) + 1000 * (column % 16)


# --- what is noticed ----------------------------------------------------------------------------


def fails(told: str, product: Product = PLAIN, error: type[Exception] = Fault, **parts: Any) -> None:
    with pytest.raises(error, match=told):
        execute(product, program(product, **parts), 0)


def test_results_are_waited_for():
    fails(r"tcgen05.ld.*lane 0, column \d+\]: read before the product that writes it was waited for", loop="")
    fails("kept|not waited for|given back while", loop="", load="", loaded="", stores="")


def test_loads_are_waited_for_before_what_they_read_is_given_back():
    fails("tcgen05.dealloc.*given back while it is being loaded", loaded="")


def test_operands_are_left_alone_until_the_product_is_done():
    write = "st.shared::cta.b32 [%r3+1024], %r0;\n"
    fails("st.shared.*written while tensor cores or the copy engine still read it", commit=write + COMMIT)
    fails("st.shared.*written while tensor cores or the copy engine still read it", loop=write + LOOP)
    check(PLAIN, loop=LOOP + "\n" + write)


def test_tensor_memory_is_left_alone_until_the_product_is_done():
    clear = f"tcgen05.st.{ROWS}.x8.b32 [%r6+{{}}], {{{{%r0,%r0,%r0,%r0,%r0,%r0,%r0,%r0}}}};\n"
    stored = replace(PLAIN, stored=True)
    fails("tcgen05.st.*written while a product still writes it", loop=clear.format(0) + LOOP)
    fails("tcgen05.st.*written while a product still reads it", stored, loop=clear.format(32) + LOOP)
    fails("tcgen05.mma.*written by a product while another reads it", replace(stored, a=Operand(128), b=Operand(32)),
          multiply=MULTIPLY.format(a="[%r8+24]"))  # fmt: skip


def test_products_that_are_not_alike_are_not_ordered():
    narrow = replace(PLAIN, b=Operand(16)).word()
    twice = f"{MULTIPLY.format(a='%rd8')}\nmov.b32 %r7, {narrow};\n{MULTIPLY.format(a='%rd8')}"
    fails("one of another place, shape or thread still writes it", multiply=twice)


def test_a_part_of_the_block_that_waits_is_refused():
    part = "@!%p0 bra skip;\n" + LOOP + "\nskip:"
    fails("lane 32, column .*read before the product that writes it was waited for", loop=part)
    fails("part of the block waits for", error=NotImplementedError, loop=part + "bar.sync 0;")


def test_products_that_there_are_not():
    fails("a product of shape 128, 24: there is none", replace(PLAIN, b=Operand(24)))
    fails("a product of 128 rows at lane 16", lane=16 << 16)
    fails("a product of 64 rows at lane 32", HALF, lane=32 << 16)
    fails("cannot be transposed", replace(PLAIN, a=Operand(128, across=True), stored=True))


def test_a_lies_at_the_lanes_of_d():
    product = replace(HALF, stored=True)
    fails("A at lane 16 of tensor memory, D at lane 0", product, multiply="add.s32 %r5, %r8, 1048576;\n"
          + MULTIPLY.format(a="[%r5+32]"))  # fmt: skip


def test_columns_are_those_that_were_lent():
    fails("columns 0 to 7 were not lent", first="mov.b32 %r4, 0;", multiply="", commit="", loop="")
    fails("48 columns of tensor memory: powers of two", allocate=ALLOCATE.format(columns=48))
    fails("kept 64 columns", free="")
    fails("32 columns .* were not lent", free=FREE.format(columns=32))


@pytest.mark.parametrize("bits", [1 << 46, 1 << 49, 1 << 52, 3 << 61], ids=["version", "offset", "absolute", "swizzle"])
def test_unknown_descriptors_are_refused(bits: int):
    fails(r"line \d+, tcgen05.mma.*descriptor", error=NotImplementedError,
          a_descriptor=PLAIN.a.descriptor(A_AT) ^ bits)  # fmt: skip


@pytest.mark.parametrize(
    "bits", [1 << 2, 1 << 3, 1 << 4, 1 << 30, 1 << 8], ids=["sparse", "saturate", "f16", "shift", "type"]
)
def test_unknown_instruction_descriptors_are_refused(bits: int):
    fails(r"line \d+, tcgen05.mma.*instruction descriptor", error=NotImplementedError, word=PLAIN.word() ^ bits)
