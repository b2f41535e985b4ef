"""Single PTX instructions as benchmarks.ptx runs them, against plain formulas of NVIDIA's PTX ISA."""

from __future__ import annotations

import math
import operator
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("triton")

from ptx_by_hand import FORMATS, decoded, flush, launch, packed, rounded, same, signed, threads

few = settings(max_examples=12)


def lanes(bits, edges=()):
    """32 numbers of so many bits, edges among them."""
    known = [0, 1, 2, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1, *edges]
    one = st.one_of(st.sampled_from(known), st.integers(0, (1 << bits) - 1), st.integers(0, 40))
    return st.lists(one, min_size=32, max_size=32)


EDGES = {  # zeros, infinities, NaN, largest, least normal, least subnormal, one, just beside one
    "f32": (0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F7FFFFF, 0x00800000, 0x00000001, 0x807FFFFF, 0x3F800000,
            0x3F800001, 0xBF7FFFFF, 0x33800000),
    "f16": (0x8000, 0x7C00, 0xFC00, 0x7E00, 0x7BFF, 0x0400, 0x0001, 0x83FF, 0x3C00, 0x3C01, 0xBBFF, 0x1000),
    "bf16": (0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x7F7F, 0x0080, 0x0001, 0x807F, 0x3F80, 0x3F81, 0xBF7F, 0x3B80),
}  # fmt: skip


def numbers(kind):
    bits = 8 * np.dtype(FORMATS[kind][3]).itemsize
    near = st.integers(0, (1 << bits) - 1) if kind == "f16" else st.sampled_from(range(bits))
    middle = {"f32": 0x3F800000, "f16": 0x3C00, "bf16": 0x3F80}[kind]
    one = st.one_of(
        st.sampled_from(EDGES[kind]), st.integers(0, (1 << bits) - 1), near.map(lambda x: middle ^ 1 << x % bits)
    )
    return st.lists(one, min_size=32, max_size=32)


# --- integers -----------------------------------------------------------------------------------


def quotient(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else -1


def remainder(a, b):
    return a - quotient(a, b) * b if b else -1


OF_TWO = {
    "add": operator.add, "sub": operator.sub, "mul.lo": operator.mul, "div": quotient, "rem": remainder, "min": min,
    "max": max,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("op", OF_TWO)
def test_integers_of_two_operands_wrap_around(op, kind):
    bits = int(kind[1:])
    number = (lambda x: signed(x, bits)) if kind[0] == "s" else (lambda x: x)

    @few
    @given(lanes(bits), lanes(bits))
    def holds(a, b):
        found = threads(
            f"{op}.{kind} %z, %a, %b;", *(np.array(x, f"u{bits // 8}") for x in (a, b)), out=f"u{bits // 8}"
        )
        wanted = [OF_TWO[op](number(x), number(y)) & ((1 << bits) - 1) for x, y in zip(a, b)]
        assert found.tolist() == wanted

    holds()


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_products_are_wide_high_and_added_to(kind):
    bits, dtype = int(kind[1:]), f"u{int(kind[1:]) // 8}"
    number = (lambda x: signed(x, bits)) if kind[0] == "s" else (lambda x: x)

    @few
    @given(lanes(bits), lanes(bits), lanes(64))
    def holds(a, b, c):
        x, y, mask = np.array(a, dtype), np.array(b, dtype), (1 << bits) - 1
        products = [number(p) * number(q) for p, q in zip(a, b)]
        assert threads(f"mul.hi.{kind} %z, %a, %b;", x, y, out=dtype).tolist() == [p >> bits & mask for p in products]
        more = np.array([n & mask for n in c], dtype)
        found = threads(f"mad.lo.{kind} %z, %a, %b, %c;", x, y, more, out=dtype)
        assert found.tolist() == [(p + n) & mask for p, n in zip(products, c)]
        found = threads(f"mad.hi.{kind} %z, %a, %b, %c;", x, y, more, out=dtype)
        assert found.tolist() == [((p >> bits) + n) & mask for p, n in zip(products, c)]
        if bits == 32:
            found = threads(f"mad.wide.{kind} %z, %a, %b, %c;", x, y, np.array(c, "u8"), out="u8")
            assert found.tolist() == [(p + n) & (2**64 - 1) for p, n in zip(products, c)]

    holds()


@few
@given(lanes(32), lanes(32, edges=(31, 32, 33, 63, 64, 255)))
def test_shifts_go_beyond_the_register_and_keep_the_sign(a, by):
    x, y = np.array(a, "u4"), np.array(by, "u4")
    assert threads("shl.b32 %z, %a, %b;", x, y, out="u4").tolist() == [
        p << min(q, 32) & 0xFFFFFFFF for p, q in zip(a, by)
    ]
    assert threads("shr.u32 %z, %a, %b;", x, y, out="u4").tolist() == [p >> min(q, 32) for p, q in zip(a, by)]
    found = threads("shr.s32 %z, %a, %b;", x, y, out="i4")
    assert found.tolist() == [signed(p, 32) >> min(q, 32) for p, q in zip(a, by)]


@few
@given(lanes(32), lanes(32), lanes(8, edges=(31, 32, 33)))
def test_funnels_shift_two_words_as_one(low, high, by):
    arrays = [np.array(x, "u4") for x in (low, high, by)]
    both = [p | q << 32 for p, q in zip(low, high)]
    for mode, amounts in (("wrap", [n & 31 for n in by]), ("clamp", [min(n, 32) for n in by])):
        found = threads(f"shf.l.{mode}.b32 %z, %a, %b, %c;", *arrays, out="u4")
        assert found.tolist() == [(p << n) >> 32 & 0xFFFFFFFF for p, n in zip(both, amounts)]
        found = threads(f"shf.r.{mode}.b32 %z, %a, %b, %c;", *arrays, out="u4")
        assert found.tolist() == [p >> n & 0xFFFFFFFF for p, n in zip(both, amounts)]


def field(a, start, length, bits, is_signed):
    """As the ISA's own loop: bit by bit, the sign beyond."""
    start, length, top = start & 255, length & 255, bits - 1
    sign = a >> min(start + length - 1, top) & 1 if is_signed and length else 0
    return sum((a >> start + i & 1 if i < length and start + i <= top else sign) << i for i in range(bits))


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_fields_of_bits_are_taken_out(kind):
    bits = int(kind[1:])

    @few
    @given(lanes(bits), lanes(9, edges=(31, 32, 63, 64)), lanes(9, edges=(31, 32, 63, 64)))
    def holds(a, start, length):
        arrays = np.array(a, f"u{bits // 8}"), np.array(start, "u4"), np.array(length, "u4")
        found = threads(f"bfe.{kind} %z, %a, %b, %c;", *arrays, out=f"u{bits // 8}")
        assert found.tolist() == [field(x, s, n, bits, kind[0] == "s") for x, s, n in zip(a, start, length)]

    holds()


@few
@given(lanes(32), lanes(32), lanes(16))
def test_bytes_are_permuted_and_signs_spread(a, b, selectors):
    def chosen(x, y, selector):
        pool, found = (x | y << 32).to_bytes(8, "little"), []
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = pool[nibble & 7]
            found.append((255 if byte >> 7 else 0) if nibble & 8 else byte)
        return int.from_bytes(bytes(found), "little")

    found = threads("prmt.b32 %z, %a, %b, %c;", *(np.array(x, "u4") for x in (a, b, selectors)), out="u4")
    assert found.tolist() == [chosen(*each) for each in zip(a, b, selectors)]


@few
@given(lanes(32), lanes(32))
def test_bits_and_signs(a, b):
    x, y = np.array(a, "u4"), np.array(b, "u4")
    for op, function in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
        found = threads(f"{op}.b32 %z, %a, %b;", x, y, out="u4")
        assert found.tolist() == [function(p, q) for p, q in zip(a, b)]
    assert threads("not.b32 %z, %a;", x, out="u4").tolist() == [p ^ 0xFFFFFFFF for p in a]
    assert threads("neg.s32 %z, %a;", x, out="u4").tolist() == [-p & 0xFFFFFFFF for p in a]
    assert threads("abs.s32 %z, %a;", x, out="u4").tolist() == [abs(signed(p, 32)) & 0xFFFFFFFF for p in a]


# --- floating point -----------------------------------------------------------------------------


def exact(function, kind, *values):
    """In fractions, rounded once; what is not finite as Python's floats have it."""
    if all(math.isfinite(v) for v in values):
        return rounded(function(*map(Fraction, values)), kind)
    try:
        return function(*values)
    except (OverflowError, ValueError):
        return math.nan


FUNCTIONS = {"add": (operator.add, 2), "sub": (operator.sub, 2), "mul": (operator.mul, 2),
             "fma.rn": (lambda a, b, c: a * b + c, 3)}  # fmt: skip


def values_of(bits, kind):
    return [decoded(int(x), kind) for x in bits]


def all_same(found, wanted):
    wrong = [(i, f, w) for i, (f, w) in enumerate(zip(found, wanted)) if not same(f, w)]
    assert not wrong, wrong[:3]


@pytest.mark.parametrize(
    ("ftz", "kind"), [(ftz, kind) for ftz in ("", ".ftz") for kind in FORMATS if (ftz, kind) != (".ftz", "bf16")]
)
@pytest.mark.parametrize("op", FUNCTIONS)
def test_sums_and_products_round_once(op, ftz, kind):
    function, count = FUNCTIONS[op]
    dtype = FORMATS[kind][3]

    @settings(max_examples=20)
    @given(st.tuples(*[numbers(kind)] * count))
    def holds(given_):
        found = threads(f"{op}{ftz}.{kind} %z, {', '.join(('%a', '%b', '%c')[:count])};",
                        *(np.array(x, dtype) for x in given_), out=dtype)  # fmt: skip
        wanted = []
        for each in zip(*(values_of(x, kind) for x in given_)):
            if ftz:
                wanted.append(flush(exact(function, kind, *(flush(x, kind) for x in each)), kind))
            else:
                wanted.append(exact(function, kind, *each))
        all_same(values_of(found, kind), wanted)

    holds()


def test_a_fused_product_is_not_rounded_through_float64():
    """2**24 + 1 + 2**-60 is just above the middle of two float32; float64 would drop what makes it so."""
    a, b, c = (np.full(32, x, np.float32) for x in (1 + 2**-12, 1 + 2**-12, 2.0**-70))
    wanted = rounded((1 + Fraction(1, 2**12)) ** 2 + Fraction(1, 2**70), "f32")
    assert threads("fma.rn.f32 %z, %a, %b, %c;", a, b, c, out=np.float32)[0] == wanted != np.float32((1 + 2**-12) ** 2)


@pytest.mark.parametrize(("kind", "size"), [("f16", 2), ("bf16", 2), ("f32", 4)])
def test_packed_sums_are_two_of_them(kind, size):
    @few
    @given(numbers(kind), numbers(kind), numbers(kind))
    def holds(a, b, c):
        pairs = [np.array([x, x[::-1]], f"u{size}").T.copy().view(f"u{2 * size}").ravel() for x in (a, b, c)]
        found = threads(f"fma.rn.{kind}x2 %z, %a, %b, %c;", *pairs, out=f"u{2 * size}").view(f"u{size}").reshape(32, 2)
        wanted = [exact(FUNCTIONS["fma.rn"][0], kind, *v) for v in zip(*(values_of(x, kind) for x in (a, b, c)))]
        all_same(values_of(found[:, 0], kind), wanted)
        all_same(values_of(found[:, 1], kind), wanted[::-1])

    holds()


@few
@given(numbers("bf16"), numbers("bf16"), numbers("f32"))
def test_sums_of_two_types(a, b, c):
    x, y, z = np.array(a, "u2"), np.array(b, "u2"), np.array(c, "u4")
    p, q, r = values_of(a, "bf16"), values_of(b, "bf16"), values_of(c, "f32")
    found = threads("add.rn.f32.bf16 %z, %a, %b;", x, z, out="u4")
    all_same(values_of(found, "f32"), [exact(operator.add, "f32", *v) for v in zip(p, r)])
    found = threads("sub.rn.f32.bf16 %z, %a, %b;", x, z, out="u4")
    all_same(values_of(found, "f32"), [exact(operator.sub, "f32", *v) for v in zip(p, r)])
    found = threads("fma.rn.f32.bf16 %z, %a, %b, %c;", x, y, z, out="u4")
    all_same(values_of(found, "f32"), [exact(FUNCTIONS["fma.rn"][0], "f32", *v) for v in zip(p, q, r)])


def lesser(a, b, nan):
    if math.isnan(a) or math.isnan(b):
        return math.nan if nan or (math.isnan(a) and math.isnan(b)) else (b if math.isnan(a) else a)
    return a if (a, math.copysign(1, a)) < (b, math.copysign(1, b)) else b


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("nan", ["", ".NaN"])
def test_least_and_greatest_of_numbers_nan_and_zeros(kind, nan):
    dtype = FORMATS[kind][3]

    @few
    @given(numbers(kind), numbers(kind))
    def holds(a, b):
        x, y = np.array(a, dtype), np.array(b, dtype)
        pairs = list(zip(values_of(a, kind), values_of(b, kind)))
        for op, wanted in (
            ("min", [lesser(p, q, nan) for p, q in pairs]), ("max", [-lesser(-p, -q, nan) for p, q in pairs])
        ):  # fmt: skip
            found = values_of(threads(f"{op}{nan}.{kind} %z, %a, %b;", x, y, out=dtype), kind)
            all_same(found, wanted)
            all_same([math.copysign(1, f) for f in found if f == 0], [math.copysign(1, w) for w in wanted if w == 0])

    holds()


UNARY = {
    "ex2.approx": lambda x: 2.0**x if x < 1024 else math.inf, "lg2.approx": math.log2, "rcp.approx": lambda x: 1 / x,
    "rsqrt.approx": lambda x: 1 / math.sqrt(x), "sqrt.approx": math.sqrt, "sqrt.rn": math.sqrt,
    "rcp.rn": lambda x: 1 / x,
}  # fmt: skip


@pytest.mark.parametrize("op", UNARY)
@pytest.mark.parametrize("ftz", ["", ".ftz"])
@few
@given(st.lists(st.floats(2.0**-149, 2.0**127, width=32), min_size=32, max_size=32))
def test_functions_of_one_number(op, ftz, x):
    found = threads(f"{op}{ftz}.f32 %z, %a;", np.array(x, np.float32), out=np.float32)
    for given_, got in zip(x, found.tolist()):
        given_ = flush(given_, "f32") if ftz else given_
        if not given_:
            assert got == {"ex2": 1, "lg2": -math.inf, "sqrt": 0}.get(op.split(".")[0], math.inf)
            continue
        wanted = UNARY[op](given_)
        wanted = flush(rounded(Fraction(wanted), "f32"), "f32") if ftz and math.isfinite(wanted) else wanted
        with np.errstate(over="ignore"):
            assert got == np.float32(wanted) or got == pytest.approx(wanted, rel=2**-22)


@few
@given(numbers("f32"), numbers("f32"))
def test_quotients(a, b):
    x, y = np.array(a, "u4"), np.array(b, "u4")
    for op in ("rn", "full", "approx"):
        found = values_of(threads(f"div.{op}.f32 %z, %a, %b;", x, y, out="u4"), "f32")
        for p, q, got in zip(values_of(a, "f32"), values_of(b, "f32"), found):
            if op == "approx" and 2.0**126 < abs(q) < math.inf:
                assert got == 0 if math.isfinite(p) else math.isnan(got)
            elif math.isfinite(p) and math.isfinite(q) and q:
                assert same(got, rounded(Fraction(p) / Fraction(q), "f32"))
            elif not q:
                assert math.isnan(got) if not p or math.isnan(p) else math.isinf(got)


# --- conversions, comparisons -------------------------------------------------------------------


@few
@given(numbers("f32"), numbers("f32"))
def test_numbers_become_narrow_ones(a, b):
    x, y = np.array(a, "u4"), np.array(b, "u4")
    for kind in ("f16", "bf16"):
        wanted = [[exact(lambda v: v, kind, v) for v in values_of(bits, "f32")] for bits in (a, b)]
        found = threads(f"cvt.rn.{kind}.f32 %z, %a;", x, out="u2")
        all_same(values_of(found, kind), wanted[0])
        assert {int(bits) for bits, v in zip(found, wanted[0]) if math.isnan(v)} <= {0x7FFF}
        found = threads(f"cvt.rn.{kind}x2.f32 %z, %a, %b;", x, y, out="u4").view("u2").reshape(32, 2)
        all_same(values_of(found[:, 1], kind), wanted[0])  # the first is the upper half
        all_same(values_of(found[:, 0], kind), wanted[1])


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_narrow_numbers_become_wide_ones(kind):
    bits = np.arange(0, 65536, 7, dtype=np.uint16)[: 32 * 32 * 9]
    for part in bits.reshape(-1, 1024):
        found = threads(f"cvt.f32.{kind} %z, %a;", part, out=np.float32, warps=32)
        all_same(found.tolist(), values_of(part, kind))


WHOLE = {"rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil}


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64", "s16", "u16"])
@pytest.mark.parametrize("mode", WHOLE)
def test_numbers_become_integers_cut_to_their_range(mode, kind):
    bits = int(kind[1:])
    least, most = (-(1 << bits - 1), (1 << bits - 1) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)

    @few
    @given(numbers("f32"), st.lists(st.floats(-70000, 70000, width=32), min_size=32, max_size=32))
    def holds(a, b):
        for x in (np.array(a, "u4"), np.array(b, np.float32).view("u4")):
            found = threads(f"cvt.{mode}.{kind}.f32 %z, %a;", x, out=f"{'i' if kind[0] == 's' else 'u'}{bits // 8}")
            wanted = []
            for v in values_of(x, "f32"):
                if math.isnan(v):
                    wanted.append((-(1 << 63) if kind == "s64" else 1 << 63) if bits == 64 else 0)
                else:
                    whole = WHOLE[mode](v) if math.isfinite(v) else (most if v > 0 else least)
                    wanted.append(min(max(whole, least), most))
            assert found.tolist() == wanted

    holds()


@few
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=32, max_size=32), lanes(32), lanes(64))
def test_numbers_become_whole_and_integers_numbers(x, a, b):
    for mode, function in WHOLE.items():
        assert threads(f"cvt.{mode}.f32.f32 %z, %a;", np.array(x, np.float32), out=np.float32).tolist() == [
            float(function(v)) for v in x
        ]
    assert threads("cvt.rn.f32.s32 %z, %a;", np.array(a, "u4"), out=np.float32).tolist() == [
        rounded(Fraction(signed(v, 32)), "f32") for v in a
    ]
    assert threads("cvt.rn.f32.u64 %z, %a;", np.array(b, "u8"), out=np.float32).tolist() == [
        rounded(Fraction(v), "f32") for v in b
    ]
    found = threads("cvt.rn.bf16.s32 %z, %a;", np.array(a, "u4"), out="u2")
    all_same(values_of(found, "bf16"), [rounded(Fraction(signed(v, 32)), "bf16") for v in a])


@few
@given(lanes(64))
def test_integers_are_cut_and_widened_by_their_sign(a):
    x8, x4, x2 = np.array(a, "u8"), np.array([v & 0xFFFFFFFF for v in a], "u4"), np.array([v & 0xFFFF for v in a], "u2")
    assert threads("cvt.s64.s32 %z, %a;", x4, out="i8").tolist() == [signed(v, 32) for v in a]
    assert threads("cvt.u64.u32 %z, %a;", x4, out="u8").tolist() == [v & 0xFFFFFFFF for v in a]
    assert threads("cvt.u32.u64 %z, %a;", x8, out="u4").tolist() == [v & 0xFFFFFFFF for v in a]
    assert threads("cvt.s32.s16 %z, %a;", x2, out="i4").tolist() == [signed(v, 16) for v in a]
    assert threads("cvt.s32.s8 %z, %a;", x2, out="i4").tolist() == [signed(v, 8) for v in a]
    assert threads("cvt.rn.f32.s8 %z, %a;", x4, out=np.float32).tolist() == [signed(v, 8) for v in a]
    assert threads("cvt.u32.u8 %z, %a;", x4, out="u4").tolist() == [v & 255 for v in a]


ORDERED = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt,
           "ge": operator.ge}  # fmt: skip


@few
@given(numbers("f32"), numbers("f32"))
def test_comparisons_of_numbers_and_nan(a, b):
    x, y = np.array(a, "u4"), np.array(b, "u4")
    pairs = list(zip(values_of(a, "f32"), values_of(b, "f32")))
    unordered = [math.isnan(p) or math.isnan(q) for p, q in pairs]
    for name, function in ORDERED.items():
        true = [function(p, q) and not n for (p, q), n in zip(pairs, unordered)]
        for op, wanted in ((name, true), (f"{name}u", [t or n for t, n in zip(true, unordered)])):
            body = f"setp.{op}.f32 %p1, %a, %b; selp.b32 %z, 1, 0, %p1;"
            assert threads(body, x, y, out="u4").tolist() == wanted, op
    for op, wanted in (("nan", unordered), ("num", [not n for n in unordered])):
        assert threads(f"setp.{op}.f32 %p1, %a, %b; selp.b32 %z, 1, 0, %p1;", x, y, out="u4").tolist() == wanted


@few
@given(lanes(32), lanes(32))
def test_comparisons_of_integers_join_with_a_predicate(a, b):
    x, y = np.array(a, "u4"), np.array(b, "u4")
    for kind, number in (("s32", lambda v: signed(v, 32)), ("u32", lambda v: v)):
        for name, function in ORDERED.items():
            true = [function(number(p), number(q)) for p, q in zip(a, b)]
            odd = [bool(p & 1) for p in a]
            body = "and.b32 %r1, %a, 1; setp.ne.b32 %p2, %r1, 0; setp.{0}.{1} %p1, %a, %b, {2}; selp.b32 %z, 1, 0, %p1;"
            found = threads(body.format(f"{name}.and", kind, "!%p2"), x, y, out="u4")
            assert found.tolist() == [t and not o for t, o in zip(true, odd)]
            found = threads(body.format(f"{name}.or", kind, "%p2"), x, y, out="u4")
            assert found.tolist() == [t or o for t, o in zip(true, odd)]


def test_words_are_taken_apart_and_put_together():
    a = np.arange(32, dtype=np.uint32) * 0x01020304
    halves = "mov.b32 {%rs1, %rs2}, %a; mov.b32 %z, {%rs2, %rs1};"
    assert threads(halves, a, out="u4").tolist() == [(int(v) >> 16 | int(v) << 16) & 0xFFFFFFFF for v in a]
    assert threads(
        "mov.b64 {_, %r1}, %a; mov.b64 %z, {%r1, %r1};", a.astype("u8") << np.uint64(32), out="u8"
    ).tolist() == [int(v) << 32 | int(v) for v in a]


# --- what is not known --------------------------------------------------------------------------

UNKNOWN = """add.sat.s32 %r1, %r2, %r3
add.cc.u32 %r1, %r2, %r3
add.rz.f32 %r1, %r2, %r3
fma.rm.f32 %r1, %r2, %r3, %r4
fma.rn.relu.bf16x2 %r1, %r2, %r3, %r4
fma.rn.f64 %rd1, %rd2, %rd3, %rd4
mul.rp.f32 %r1, %r2, %r3
max.xorsign.abs.f32 %r1, %r2, %r3
max.f32 %r1, %r2, %r3, %r4
min.s16x2 %r1, %r2, %r3
div.rz.f32 %r1, %r2, %r3
sin.approx.f32 %r1, %r2
cvt.rz.f16.f32 %rs1, %r1
cvt.rn.relu.bf16.f32 %rs1, %r1
cvt.rn.satfinite.e4m3x2.f32 %rs1, %r1, %r2
cvt.rna.tf32.f32 %r1, %r2
cvt.sat.f32.f32 %r1, %r2
cvt.rzi.s32.f32 %rs1, %r2
setp.eq.xor.s32 %p1, %r1, %r2, %p2
setp.lt.s32 %p1|%p2, %r1, %r2
prmt.b32.f4e %r1, %r2, %r3, %r4
shfl.sync.bfly.b32 %r1, %r2, 1, 15, -1
shfl.sync.idx.b32 %r1, %r2, 0, 31, 1
shfl.sync.up.b32 %r1, %r2, 1, 31, -1
elect.sync %r1|%p1, 1
ld.global.L2::cache_hint.b32 %r1, [%rd1], %rd2
ld.global.s8 %r1, [%rd1]
ld.volatile.global.b32 %r1, [%rd1]
ld.shared::cluster.b32 %r1, [%r2]
atom.global.add.u32 %r1, [%rd1], %r2
atom.global.gpu.relaxed.add.noftz.f16 %rs1, [%rd1], %rs2
red.global.gpu.max.s32 [%rd1], %r2
ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r1}, [%r2]
ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r1, %r2}, [%r3]
mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1,%r2,%r3,%r4}, {%r5,%r6,%r7,%r8}, {%r9,%r10}, {%r1,%r2,%r3,%r4}
mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r1,%r2}, {%r5,%r6,%r7,%r8}, {%r9,%r10}, {%r1,%r2}
mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%r9,%r10}, {%r1,%r2,%r3,%r4}
bar.sync 1
bar.sync 0, 64
bar.warp.sync 15
bar.red.popc.u32 %r1, 0, %p1
fence.proxy.async.global
membar.gl
cp.async.cg.shared.global.L2::cache_hint [%r1], [%rd1], 16, %rd2
cp.async.wait_all
cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r1], [%rd1, {%r2, %r3}], [%r4], %rs1
mbarrier.try_wait.shared::cta.b64 %p1, [%r1], %rd1
mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r1], %r2
mov.u32 %r1, %clock
vote.sync.ballot.b32 %r1, %p1, -1
call foo
brx.idx %r1, table""".splitlines()  # noqa: E501


@pytest.mark.parametrize("text", UNKNOWN, ids=lambda text: text.split()[0])
def test_what_is_not_known_is_named_with_its_line_and_not_computed(text):
    with pytest.raises(NotImplementedError, match=r"line 1\d: ") as caught:
        launch(f"{text};")
    assert text.split()[0] in str(caught.value)


def test_nothing_is_known_of_the_other_lanes_bits():
    """A packed pair is low half first."""
    found = threads("mov.b32 {%rs1, %rs2}, %a; cvt.u32.u16 %z, %rs1;", packed([(7, 9)] * 32), out="u4")
    assert set(found.tolist()) == {7}
