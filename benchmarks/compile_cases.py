"""Every configuration of the kernels that is shipped, as what `benchmarks.compiled` takes."""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl

from benchmarks import compile_attention
from benchmarks.compiled import Case, Compiled
from kernels import embedded_norm, gated_embedding, linear_relu2, muon, residual_norm, softcapped_loss

ACC = {"ACC": tl.float32}
WARPS, STAGES = 4, 3  # Triton's own, where a launch says nothing


def product(target: int, odd: bool) -> str:
    """The tensor cores' instruction; where sizes are odd, that of any of them will do."""
    if odd:
        return "mma.sync or wgmma.mma_async or tcgen05.mma"
    return {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(target, "mma.sync")


def mlp(target: int, dtype: str) -> Iterator[Case]:
    """Forward and backward, and what stands in where the sizes do not divide."""
    for name, table in (("forward", linear_relu2.FORWARD), ("backward", linear_relu2.BACKWARD)):
        if (shipped := table.get(target)) is None:
            continue
        backward = name == "backward"
        for tiles in (shipped, linear_relu2.ODD):
            constants = {"BACKWARD": backward, **ACC, "WIDEN": False, **linear_relu2.constants(tiles)}
            sizes = dict.fromkeys(("M", "N", "K"), "i32")
            if tiles.tma:
                kernel = linear_relu2._by_tma
                right = (tiles.k, tiles.n) if backward else (tiles.n, tiles.k)
                blocks = {"A": (tiles.m, tiles.k), "B": right, "Y": (tiles.m, tiles.n), "OUT": (tiles.m, tiles.n)}
                types = {n: f"tensordesc<{dtype}[{rows}, {columns}]>" for n, (rows, columns) in blocks.items()}
            else:
                kernel = linear_relu2._by_pointers
                types = dict.fromkeys(("A", "B", "Y", "OUT"), f"*{dtype}")
                constants["EVEN_K"] = tiles is shipped
            aligned = ("M", "N", "K") if tiles is shipped else ()
            at = (tiles.warps, tiles.stages, aligned, product(target, odd=tiles is not shipped))
            for kind, scale, none in (("", {}, {"R": None}), (" of a norm", {"R": "*fp32"}, {})):
                label = f"mlp{kind} {name} {dtype}{'' if tiles is shipped else ' odd'}"
                yield Case(label, kernel, target, types | scale | sizes, constants | none, *at)


def passes(target: int, dtype: str) -> Iterator[Case]:
    """What goes over a product of torch's in the MLP: 16 bytes at once, or it would cost more than its traffic."""
    constants = {**ACC, "BLOCK": linear_relu2.FLAT}
    for name, kernel, arrays in (
        ("forward", linear_relu2._squared, ("H",)),
        ("backward", linear_relu2._times_root, ("D", "Y")),
    ):
        for kind, scale, none in (("", {}, {"R": None}), (" of what is scaled", {"R": "*fp32"}, {})):
            types = dict.fromkeys(arrays, f"*{dtype}") | scale | {"N": "i32"}
            at = (WARPS, STAGES, ("N",), "ld.global.v4.b32")
            yield Case(f"mlp pass {name}{kind} {dtype}", kernel, target, types, constants | none, *at)


def loss(target: int, dtype: str) -> Iterator[Case]:
    """A row in registers at the usual vocabulary and at the widest, and one in blocks."""
    row = softcapped_loss.ROWS[target]
    types = {"Z": f"*{dtype}", "TARGETS": "*i64", "LOSSES": "*fp32", "cap": "fp32"}
    for vocab in sorted({8192, row.held, 50257, 65536}):
        block, held, warps = softcapped_loss.shape(vocab, row)
        constants = {"V": vocab, "SCALE": 256.0 if dtype == "fp16" else 1.0, **ACC, "BLOCK": block, "HELD": held}
        yield Case(f"loss of {vocab} {dtype}", softcapped_loss._chunk, target, types, constants, warps, 2)


BACKWARDS: tuple[tuple[str, dict[str, str], dict[str, bool | None]], ...] = (  # kind, pointers, what is fixed
    ("", {}, {"Y": None, "TIMES_R": False}),
    (" with the norm", {"Y": "*bf16"}, {"TIMES_R": False}),
    (" of the norm alone", {}, {"D": None, "Y": None, "TIMES_R": False}),
    (" of what is scaled", {}, {"Y": None, "TIMES_R": True}),
)


def norm(target: int, stream: str) -> Iterator[Case]:
    """The weighted sum over a stream of this type, and the plain one with a branch in bfloat16."""
    for channels in (128, 768, residual_norm.WIDEST):
        for scaled in (True, False):
            inner = stream if scaled else ("fp16" if target == 75 else "bf16")
            scalars = dict.fromkeys(("A", "B"), "*fp32") if scaled else {}
            none = {} if scaled else {"A": None, "B": None}
            sizes = {"N": "i32", "C": "i32", "eps": "fp32"}
            label = f"{'weighted' if scaled else 'plain'} norm of {channels} {stream}"
            options = residual_norm.constants(channels, residual_norm.FORWARD[target])
            warps = options.pop("num_warps")
            arrays = {"X": f"*{stream}", "X0": f"*{inner}", "OUT": f"*{stream}", "Y": "*bf16"}
            constants = {"SCALED": scaled, **ACC, **options, **none}
            alone = ({"R": "*fp32"}, dict.fromkeys(("X0", "OUT", "Y")))
            for more, less in (({}, {"R": None}),) if scaled else (({}, {"R": None}), alone):
                types = {n: t for n, t in arrays.items() if n not in less} | more | scalars | sizes
                given = (types, constants | less, warps, 3, ("C",))
                yield Case(label + (", its scale alone" if more else ""), residual_norm._forward, target, *given)
            tile = residual_norm.BACKWARD[target]
            options = residual_norm.constants(channels, tile)
            warps = options.pop("num_warps")
            most = residual_norm.registers(warps, tile)
            arrays = dict.fromkeys(("D", "X", "DX"), f"*{stream}") | {"DY": "*bf16", "DX0": f"*{inner}"}
            arrays |= {"SUMS": "*fp32"} | ({"X0": f"*{inner}"} if scaled else {})
            constants = {"SCALED": scaled, "BOTH": stream != inner or scaled, **ACC, **options, **none}
            constants |= {} if scaled else {"X0": None}
            for kind, more, fixed in BACKWARDS:
                types = {n: t for n, t in arrays.items() if n not in fixed} | more | scalars | sizes
                given = (types, constants | fixed, warps, 3, ("C",))
                yield Case(f"{label} backward{kind}", residual_norm._backward, target, *given, most=most)


def norm_again(target: int, dtype: str) -> Iterator[Case]:
    """The norm alone, as a backward makes it again: of the weighted sum, and of one tensor."""
    for channels in (128, 768, residual_norm.WIDEST):
        options = residual_norm.constants(channels, residual_norm.FORWARD[target])
        warps = options.pop("num_warps")
        for scaled in (True, False):
            types = {"X": f"*{dtype}", "Y": f"*{dtype}", "N": "i32", "C": "i32", "eps": "fp32"}
            types |= {"X0": f"*{dtype}", "A": "*fp32", "B": "*fp32"} if scaled else {}
            constants = {"OUT": None, "R": None, "SCALED": scaled, **ACC, **options}
            constants |= {} if scaled else dict.fromkeys(("X0", "A", "B"))
            label = f"{'weighted' if scaled else 'plain'} norm of {channels} {dtype} again"
            yield Case(label, residual_norm._forward, target, types, constants, warps, STAGES, ("C",))


def embeddings(target: int, dtype: str) -> Iterator[Case]:
    """The norm of an embedding and the gated value embeddings, forward and backward."""
    numbers = {"TOKENS": "*i64", "N": "i32", "C": "i32", "eps": "fp32"}
    for channels in (128, 768, residual_norm.WIDEST):
        options = residual_norm.constants(channels, residual_norm.FORWARD[target])
        warps = options.pop("num_warps")
        for kernel, arrays in (
            (embedded_norm._forward, {"TABLE": "*fp32", "OUT": f"*{dtype}"}),
            (embedded_norm._backward, {"DN": f"*{dtype}", "TABLE": "*fp32", "DTABLE": "*fp32"}),
        ):
            label = f"embedded norm{kernel.__name__} of {channels} {dtype}"
            yield Case(label, kernel, target, arrays | numbers, {**ACC, **options}, warps, STAGES, ("C",))
    for head in (32, 48, 64, 128):
        constants = {"H": 6, "D": head, "DP": max(64, head) if head > 32 else 32, "ROWS": gated_embedding.ROWS, **ACC}
        arrays = {"GATES": f"*{dtype}", "TABLE": "*fp32", "TOKENS": "*i64", "N": "i32", "stride": "i32"}
        for kernel, more in (
            (gated_embedding._add, {"V": f"*{dtype}"}),
            (gated_embedding._backward, {"DV": f"*{dtype}", "DG": "*fp32", "DTABLE": "*fp32"}),
        ):
            label = f"gated embedding{kernel.__name__} of {head} {dtype}"
            yield Case(label, kernel, target, more | arrays, constants, WARPS, STAGES, ("stride",))


def symmetric(target: int, dtype: str, tiles: muon.Tiles, odd: bool) -> Iterator[Case]:
    """X X^T of a wide and of a tall matrix, and b A + c A A. A stride of 1 is a constant to Triton."""
    sizes = dict.fromkeys(("m", "n", "stride_l"), "i32") | {"alpha": "fp32", "beta": "fp32"}
    kinds = (("", False, "stride_n", "stride_m"), (" of a transpose", False, "stride_m", "stride_n"))
    for kind, add, fixed, free in (*kinds, (" plus", True, "stride_n", "stride_m")):
        types = dict.fromkeys(("X", "D", "OUT") if add else ("X", "OUT"), f"*{dtype}") | sizes | {free: "i32"}
        constants = {"ADD": add, "EVEN_K": not odd, **ACC, "WIDEN": False, fixed: 1} | ({} if add else {"D": None})
        constants |= {"SIDE": tiles.side, "BLOCK_K": tiles.k}
        aligned = () if odd else ("m", "n", "stride_l", free)
        label = f"symmetric{kind} {dtype}{' odd' if odd else ''}"
        at = (tiles.warps, tiles.stages, aligned, product(target, odd))
        yield Case(label, muon._symmetric, target, types, constants, *at)


def optimizer(target: int, dtype: str) -> Iterator[Case]:
    """The symmetric products and what stands around them."""
    if (shipped := muon.SYMMETRIC.get(target)) is not None:
        for tiles in (shipped, muon.ODD):
            yield from symmetric(target, dtype, tiles, odd=tiles is not shipped)
    types = dict.fromkeys(("G", "M", "SQUARES", "RATES"), "*fp32") | {"size": "i32"}
    yield Case("momentum", muon._momentum, target, types, {**ACC, "BLOCK": muon.FLAT}, WARPS, STAGES, ("size",))
    strides = dict.fromkeys(("stride_l", "stride_r", "stride_d"), "i32")
    types = {"X": f"*{dtype}", "MEANS": "*fp32", "SECOND": "*fp32", "R": "i32", "D": "i32"} | strides
    types |= {"beta2": "fp32"}
    constants = {**ACC, "BLOCK_R": muon.KEPT, "BLOCK_D": muon.REDUCED}
    yield Case(
        "means of squares", muon._means, target, types, constants, WARPS, STAGES, ("R", "D", "stride_l", "stride_r")
    )
    types = dict.fromkeys(("MEANS", "SECOND", "LENGTHS"), "*fp32") | {"R": "i32", "floor": "fp32"}
    yield Case("length", muon._length, target, types, {**ACC, "BLOCK": 1024}, WARPS, STAGES, ("R",))
    types = {"W": "*fp32", "X": f"*{dtype}"} | dict.fromkeys(("SECOND", "LENGTHS", "RATES"), "*fp32")
    types |= dict.fromkeys(("m", "n", "stride_l", "stride_m", "stride_n"), "i32") | {"boost": "fp32", "floor": "fp32"}
    for per_row in (True, False):
        constants = {"PER_ROW": per_row, **ACC, "BLOCK_M": muon.UPDATED[0], "BLOCK_N": muon.UPDATED[1]}
        yield Case("update", muon._update, target, types, constants, WARPS, STAGES, ("m", "n", "stride_l", "stride_m"))


def attention(target: int) -> Iterator[Case]:
    """Forward, backward and the passes over memory, for each size of heads that has tiles of its own."""
    if target not in compile_attention.TARGETS:
        return
    for head in (32, 64, 128):
        yield from compile_attention.parts(target, head)


def cases(target: int) -> list[Case]:
    """All for one of `kernels.targets.TARGETS`."""
    narrow = "fp16" if target == 75 else "bf16"
    found = [*mlp(target, narrow), *loss(target, narrow), *norm(target, narrow), *optimizer(target, narrow)]
    found += passes(target, narrow)
    if narrow == "bf16":
        found += [*mlp(target, "fp16"), *passes(target, "fp16")]
    found += [*norm_again(target, narrow), *norm_again(target, "fp32"), *embeddings(target, narrow)]
    return found + list(norm(target, "fp32")) + list(attention(target))


def missing(case: Case, found: Compiled) -> bool:
    """Whether an instruction that must be there is not."""
    return bool(case.expected) and not any(map(found.count, case.expected.split(" or ")))


def wrong(target: int) -> list[str]:
    """All cases for this target compiled; what does not fit the card or misses its tensor cores, a line each."""
    lines = []
    for case in cases(target):
        found = case.compile()
        lines += [f"{case.label}: {problem}" for problem in found.problems()]
        if missing(case, found):
            lines.append(f"{case.label}: no {case.expected} for sm_{target}")
    return lines
