"""Which forms of an instruction are known: a modifier that is not (a rounding, a saturation) is not passed over."""

from __future__ import annotations

import re

from benchmarks.ptx.parsing import Instruction

FLOAT = r"(f32|f32x2|f16|f16x2|bf16|bf16x2)"
WHOLE = r"[us](16|32|64)"
BITS = r"[bus](16|32|64)"
SUM = rf"(\.rn)?(\.ftz)?\.({FLOAT}|f64)|\.rn\.f32\.b?f16|\.{WHOLE}"
SIGNED = rf"(\.ftz)?\.({FLOAT}|f64)|\.s(16|32|64)"
LESSER = rf"(\.ftz)?(\.NaN)?\.({FLOAT}|f64)|\.{WHOLE}"
LOGIC = r"\.(pred|b16|b32|b64)"
VECTOR = r"(\.v[248])?\.([bu](8|16|32|64)|f32|f64)"
MATRIX = r"\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared(::cta)?\.b16"
L2 = r"(\.L2::(64|128|256)B)?"
HINTS = rf"(\.L1::(evict_\w+|no_allocate))?{L2}"
CONVERSIONS = (
    r"\.rn\.b?f16\.f32|\.rn\.b?f16x2\.f32|(\.ftz)?\.f32\.f16|\.f32\.bf16|\.f64\.f32|\.rn\.f32\.f64"
    r"|\.(rni|rzi|rmi|rpi)(\.ftz)?\.f32\.f32|\.(rni|rzi|rmi|rpi)\.(f16\.f16|f64\.f64)"
    rf"|\.(rni|rzi|rmi|rpi)(\.ftz)?\.{WHOLE}\.(f32|f64|f16|bf16)"
    r"|\.rn\.(f32|f64)\.[us](8|16|32|64)|\.rn\.b?f16\.[us](8|16|32)|\.[us](8|16|32|64)\.[us](8|16|32|64)"
)
ORDER = r"(lt|le|gt|ge)"
COMPARED = (
    rf"\.((eq|ne)(\.(and|or))?\.{BITS}|{ORDER}(\.(and|or))?\.{WHOLE}|(lo|ls|hi|hs)(\.(and|or))?\.u(16|32|64)"
    rf"|({ORDER}u?|eq|ne|equ|neu|num|nan)(\.(and|or))?(\.ftz)?\.(f32|f64|f16|bf16))"
)

# What the instruction begins with -> its other parts, and how many operands it has.
FORMS: dict[str, tuple[str, tuple[int, ...]]] = {
    "add": (SUM, (3,)),
    "sub": (SUM, (3,)),
    "mul": (rf"(\.rn)?(\.ftz)?\.({FLOAT}|f64)|\.(lo|hi|wide)\.{WHOLE}", (3,)),
    "mad": (rf"\.(lo|hi|wide)\.{WHOLE}", (4,)),
    "fma": (rf"\.rn(\.ftz)?\.{FLOAT}|\.rn\.f32\.b?f16", (4,)),
    "div": (rf"\.(full|approx|rn)(\.ftz)?\.f32|\.rn\.f64|\.{WHOLE}", (3,)),
    "rem": (rf"\.{WHOLE}", (3,)),
    "min": (LESSER, (3,)),
    "max": (LESSER, (3,)),
    "neg": (SIGNED, (2,)),
    "abs": (SIGNED, (2,)),
    "not": (LOGIC, (2,)),
    "and": (LOGIC, (3,)),
    "or": (LOGIC, (3,)),
    "xor": (LOGIC, (3,)),
    "shl": (r"\.b(16|32|64)", (3,)),
    "shr": (rf"\.{BITS}", (3,)),
    "shf": (r"\.[lr]\.(wrap|clamp)\.b32", (4,)),
    "bfe": (r"\.[us](32|64)", (4,)),
    "prmt": (r"\.b32", (4,)),
    "ex2": (r"\.approx(\.ftz)?\.(f32|f16|f16x2)|\.approx\.ftz\.bf16(x2)?", (2,)),
    "lg2": (r"\.approx(\.ftz)?\.f32", (2,)),
    "rcp": (r"\.(approx|rn)(\.ftz)?\.f32|\.rn\.f64", (2,)),
    "rsqrt": (r"\.approx(\.ftz)?\.f32", (2,)),
    "sqrt": (r"\.(approx|rn)(\.ftz)?\.f32|\.rn\.f64", (2,)),
    "tanh": (r"\.approx\.(f32|b?f16(x2)?)", (2,)),
    "mov": (rf"\.(pred|{BITS}|f32|f64)", (2,)),
    "selp": (rf"\.({BITS}|f32|f64)", (4,)),
    "setp": (COMPARED, (3, 4)),
    "cvt": (CONVERSIONS, (2, 3)),
    "cvta": (r"(\.to)?\.global\.u64|\.param\.u64", (2,)),
    "shfl": (r"\.sync\.(up|down|bfly|idx)\.b32", (5,)),
    "elect": (r"\.sync", (2,)),
    "ld.param": (r"\.([bus](16|32|64)|f32|f64)", (2,)),
    "ld.shared": (rf"(::cta)?{VECTOR}", (2,)),
    "st.shared": (rf"(::cta)?{VECTOR}", (2,)),
    "ld.global": (rf"(\.(ca|cg|cs|lu|cv|nc))?{HINTS}{VECTOR}", (2,)),
    "st.global": (rf"(\.(wb|cg|cs|wt))?{HINTS}{VECTOR}", (2,)),
    "atom.global": (r"(\.(cta|gpu|sys|relaxed|acq_rel|acquire|release))*\.add(\.v[24])?\.f32", (3,)),
    "red.global": (r"(\.(cta|gpu|sys|relaxed|release))*\.add(\.v[24])?\.f32", (2,)),
    "ldmatrix": (MATRIX, (2,)),
    "stmatrix": (MATRIX, (2,)),
    "mma.sync": (r"\.aligned\.m16n8k(8|16)\.row\.col\.f32\.(f16\.f16|bf16\.bf16)\.f32", (4,)),
    "wgmma.mma_async": (r"\.sync\.aligned\.m64n\d+k16\.f32\.(f16\.f16|bf16\.bf16)", (7, 8)),
    "wgmma.fence": (r"\.sync\.aligned", (0,)),
    "wgmma.commit_group": (r"\.sync\.aligned", (0,)),
    "wgmma.wait_group": (r"\.sync\.aligned", (1,)),
    "bar.sync": (r"", (1,)),
    "barrier.sync": (r"(\.aligned)?", (1,)),
    "bar.warp.sync": (r"", (1,)),
    "fence.proxy.async": (r"(\.shared::cta)?", (0,)),
    "cp.async.c": (rf"(a|g)\.shared(::cta)?\.global{L2}", (3, 4)),
    "cp.async.commit_group": (r"", (0,)),
    "cp.async.wait_group": (r"", (1,)),
    "cp.async.bulk.commit_group": (r"", (0,)),
    "cp.async.bulk.wait_group": (r"(\.read)?", (1,)),
    "cp.async.bulk.tensor.2d.shared": (r"::(cta|cluster)\.global(\.tile)?\.mbarrier::complete_tx::bytes", (3,)),
    "cp.async.bulk.tensor.2d.global": (r"\.shared::cta(\.tile)?\.bulk_group", (2,)),
    "mbarrier.init": (r"(\.shared(::cta)?)?\.b64", (2,)),
    "mbarrier.inval": (r"(\.shared(::cta)?)?\.b64", (1,)),
    "mbarrier.arrive.expect_tx": (r"(\.release\.cta)?(\.shared(::cta)?)?\.b64", (3,)),
    "mbarrier.try_wait": (r"\.parity(\.acquire\.cta)?(\.shared(::cta)?)?\.b64", (3, 4)),
}  # fmt: skip
LONGEST_FIRST = sorted(FORMS, key=len, reverse=True)


def check(instruction: Instruction) -> None:
    """Raises NotImplementedError where a known instruction has a form that is not."""
    for start in LONGEST_FIRST:
        if instruction.op.startswith(start):
            rest = instruction.op[len(start) :]
            if start.isalpha() and rest and not rest.startswith("."):
                continue  # "cvta" is no "cvt"
            pattern, counts = FORMS[start]
            if not re.fullmatch(pattern, rest):
                raise NotImplementedError("this form is not known")
            if len(instruction.operands) not in counts:
                raise NotImplementedError(f"{len(instruction.operands)} operands")
            return
