"""Compiled kernels with one instruction taken out or changed, and small work that runs each of them.

A mutant is noticed if the emulation faults or its numbers differ in a bit: run twice, they are the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from unittest import mock

import torch
from ptx_by_hand import fences

from benchmarks.ptx import Fault, emulated, machine
from kernels import linear_relu2, muon, residual_norm, softcapped_loss
from kernels.attention import attention

LEFT_OUT = {  # what keeps threads, copies and tensor cores apart
    "bar.sync": r"^\s*bar\.sync",
    "bar.warp.sync": r"^\s*bar\.warp\.sync",
    "fence.proxy.async": r"^\s*fence\.proxy\.async",
    "wgmma.fence": r"^\s*wgmma\.fence",
    "wgmma.wait_group": r"^\s*wgmma\.wait_group",
    "cp.async.wait_group": r"^\s*cp\.async\.wait_group",
    "cp.async.bulk.wait_group": r"^\s*cp\.async\.bulk\.wait_group",
    "mbarrier.try_wait": r"^\s*mbarrier\.try_wait",
}
CHANGED = {  # one operand
    "constant of add": r"^\s*add\.s(32|64)\s.*, -?\d+;",
    "constant of a shift": r"^\s*sh[lr]\.[bus](32|64)\s.*, \d+;",
    "sense of a predicate": r"^\s*@!?%p\d+ (?!bra)",
    "sense of a branch": r"^\s*@!?%p\d+ bra",
    "register of a product": r"^\s*(mma\.sync|wgmma\.mma_async|fma\.rn)",
    "place of a matrix": r"^\s*(ldmatrix|stmatrix)",
}
KINDS = LEFT_OUT | CHANGED


def sites(text: str) -> dict[str, list[int]]:
    """Kind -> numbers of the lines that are of it."""
    lines = text.split("\n")
    return {kind: [i for i, line in enumerate(lines) if re.match(pattern, line)] for kind, pattern in KINDS.items()}


def mutated(text: str, kind: str, at: int) -> str:
    lines = text.split("\n")
    lines[at] = _left_out(lines[at], kind) if kind in LEFT_OUT else _changed(lines[at], kind)
    return "\n".join(lines)


def _left_out(line: str, kind: str) -> str:
    if kind == "mbarrier.try_wait":  # as if it were always done
        return f"\tmov.pred {line.split()[1].rstrip(',')}, -1;"
    return ""


def _changed(line: str, kind: str) -> str:
    if kind in ("constant of add", "constant of a shift"):
        head, _, number = line.rstrip().rstrip(";").rpartition(", ")
        return f"{head}, {int(number) * 2 or 2};"
    if kind.startswith("sense"):
        return re.sub(r"@(!?)(%p\d+)", lambda found: f"@{'' if found[1] else '!'}{found[2]}", line)
    if kind == "place of a matrix":  # the next matrix, or the next eight columns
        return re.sub(r"\[(%\w+)(?:\+(\d+))?\]", lambda found: f"[{found[1]}+{int(found[2] or 0) + 16}]", line)
    if "wgmma" in line:  # the sum does not go on, or begins with what was there
        parts = line.rstrip().rstrip(";").split(", ")
        place = next(i for i, part in enumerate(parts) if i > 1 and re.fullmatch(r"%p\d+|0|1", part))
        parts[place] = "0" if parts[place] != "0" else "1"
        return ", ".join(parts) + ";"
    if "mma" in line:  # the first two registers of A change places
        groups = re.findall(r"\{[^}]*\}", line)
        names = groups[1].strip("{}").replace(" ", "").split(",")
        return line.replace(groups[1], "{" + ",".join([names[1], names[0], *names[2:]]) + "}", 1)
    head, a, b, c = line.rstrip().rstrip(";").split(", ")
    return f"{head}, {a}, {c}, {b};"


def outcome(work: Callable[[], Sequence[torch.Tensor]], target: int, change: object = None) -> list[torch.Tensor] | str:
    """What the work gives, or the fault."""
    torch.manual_seed(0)
    with mock.patch.object(machine, "LONGEST", 200_000), emulated(target, change, fences=fences(target)):
        try:
            return [x.detach().clone() for x in work()]
        except (Fault, NotImplementedError) as error:
            return f"{type(error).__name__}: {error}"


def noticed(right: Sequence[torch.Tensor], found: Sequence[torch.Tensor] | str) -> bool:
    """NaN at the same places is the same."""
    return isinstance(found, str) or any(not torch.equal(a.nan_to_num(7e5), b.nan_to_num(7e5))
                                         for a, b in zip(right, found, strict=True))  # fmt: skip


def texts(work: Callable[[], Sequence[torch.Tensor]], target: int) -> dict[str, str]:
    """Kernel -> its PTX, of all that the work compiles."""
    found: dict[str, str] = {}

    def look(name: str, text: str) -> str:
        key = f"{name}#{sum(other.split('#')[0] == name for other in found)}"
        if text not in found.values():
            found[key] = text
        return text

    assert not isinstance(outcome(work, target, look), str)
    return found


def instead(old: str, new: str) -> Callable[[str, str], str]:
    """A change of one kernel's PTX, and of no other's."""
    return lambda name, text: new if text == old else text


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


def attended(length: int, head: int, window: int) -> Callable[[], list[torch.Tensor]]:
    def work() -> list[torch.Tensor]:
        q, k, v = (random(1, length, heads, head).requires_grad_() for heads in (2, 1, 1))
        angle = torch.outer(torch.arange(length), torch.arange(head // 2) * 0.01)
        y = attention(q, k, v, angle.cos(), angle.sin(), window)
        return [y, *torch.autograd.grad(y, (q, k, v), random(*y.shape))]

    return work


def mlp(rows: int, width: int, hidden: int) -> Callable[[], list[torch.Tensor]]:
    def work() -> list[torch.Tensor]:
        x, w = random(rows, width).requires_grad_(), random(hidden, width, scale=width**-0.5).requires_grad_()
        out = random(width, hidden, scale=hidden**-0.5).requires_grad_()
        y = linear_relu2.mlp(x, w, out)
        return [y, *torch.autograd.grad(y, (x, w, out), random(rows, width))]

    return work


def loss() -> list[torch.Tensor]:
    x, head = random(16, 32).requires_grad_(), torch.randn(700, 32).requires_grad_()
    total = softcapped_loss.softcapped_loss(x, head, torch.randint(700, (16,)), 15.0)
    return [total, *torch.autograd.grad(total, (x, head))]


def norm() -> list[torch.Tensor]:
    x, x0 = (random(24, 96).requires_grad_() for _ in range(2))
    a, b = torch.tensor([0.7], requires_grad=True), torch.tensor([0.3], requires_grad=True)
    _, y = residual_norm.residual_norm(x, x0, a, b)
    return [y, *torch.autograd.grad(y, (x, x0, a, b), random(24, 96))]


def symmetric(side: int, inner: int) -> Callable[[], list[torch.Tensor]]:
    def work() -> list[torch.Tensor]:
        x = random(2, side, inner, scale=(side * inner) ** -0.5)
        return [muon.polar_express(x, 2)]

    return work


def forward(work: Callable[[], Sequence[torch.Tensor]]) -> Callable[[], list[torch.Tensor]]:
    """What the work gives first, without gradients."""

    def only() -> list[torch.Tensor]:
        with torch.no_grad(), mock.patch.object(torch.autograd, "grad", lambda *_: ()):
            return list(work())[:1]

    return only
