"""Mistakes that ports of the reference model make, with what they compute: so that a backend that departs is told how.

    python -m benchmarks.faults --write     # make the numbers again, by the CPU recipe with each mistake

A fault is an edit of the CPU recipe. Its numbers on the reference checkpoint (`faults.json`, as `reference.json` has
them) are shipped, so that a machine without PyTorch finds the mistake in its own backend as well. A softcap is found
whatever its value is: it is fitted to some logits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

import backends
from backends import reference
from core.errors import UserError

NUMBERS = Path(__file__).with_name("faults.json")
SAMPLED = 256  # logits of which the values themselves are shipped
SOFTCAP = 15.0
FITTED = 1e-3  # of the logits' rms: the most by which a fitted softcap may miss
SAME_FAULT = 2.0  # times the reference's tolerance: what two backends with the same mistake may differ by


@dataclass(frozen=True)
class Fault:
    name: str
    says: str
    edits: Sequence[tuple[str, str]]  # of the CPU recipe: what stands there once, and what it becomes


FAULTS: Sequence[Fault] = (
    # --- attention ---
    Fault(
        "window dropped",
        "the sliding window is dropped: every layer sees the whole context",
        [("else sequence_len // 2 for c", "else sequence_len for c")],
    ),
    Fault(
        "window one short",
        "the sliding window is one token too short: a token must see itself and `window` tokens before it",
        [("distance > window", "distance >= window")],
    ),
    Fault(
        "last window short",
        "the last layer has a short window; it must see the whole context",
        [("for i in range(DEPTH - 1)] + [sequence_len]", "for i in range(DEPTH - 1)] + [sequence_len // 2]")],
    ),
    Fault(
        "interleaved RoPE",
        "RoPE turns neighbouring channels (interleaved); channel i belongs with channel i + D/2",
        [
            ("a, b = x.chunk(2, dim=-1)", "a, b = x[..., 0::2], x[..., 1::2]"),
            ("torch.cat((b, a), dim=-1)", "torch.stack((b, a), dim=-1).flatten(-2)"),
            (
                "torch.cat((cos, cos), dim=-1), torch.cat((sin, -sin), dim=-1)",
                "torch.stack((cos, cos), dim=-1).flatten(-2), torch.stack((sin, -sin), dim=-1).flatten(-2)",
            ),
        ],
    ),
    Fault(
        "backward RoPE",
        "RoPE turns the other way round: the sign of the sines is wrong",
        [("torch.cat((sin, -sin), dim=-1)", "torch.cat((-sin, sin), dim=-1)")],
    ),
    Fault(
        "RoPE base",
        "RoPE has the base 100000; the reference has 10000",
        [("ROPE_BASE = 10000.0", "ROPE_BASE = 100000.0")],
    ),
    Fault(
        "no RoPE",
        "queries and keys are not turned by RoPE",
        [("torch.outer(torch.arange(length", "torch.outer(0 * torch.arange(length")],
    ),
    Fault(
        "no QK-norm",
        "queries and keys are not normed (QK-norm is missing)",
        [
            ("y = y * r  # not", "r = torch.ones_like(r)  # not"),
            (
                "dx = torch.addcmul(dy, y, (dy * y).mean(dim=-1, keepdim=True), value=-1).mul_(r)\n"
                "        return dx.to(dq.dtype)",
                "dx = dy\n        return dx.to(dq.dtype)",
            ),
        ],
    ),
    Fault(
        "unscaled attention",
        "attention scores are not divided by sqrt(D)",
        [("angle.cos() * HEAD_DIM**-0.25, angle.sin() * HEAD_DIM**-0.25", "angle.cos(), angle.sin()")],
    ),
    # --- value embeddings, residuals, norms, MLP ---
    Fault("no value embeddings", "value embeddings are not added to the values", [("(v + 2 *", "(v + 0 *")]),
    Fault(
        "value gate halved",
        "the gate of the value embeddings lacks its factor 2",
        [("(v + 2 *", "(v + 1 *")],
    ),
    Fault(
        "no x0 residual",
        "the embedding is not fed into every layer (x0_lambdas have no effect)",
        [("+ skip[i] * x0", "+ 0 * skip[i] * x0")],
    ),
    Fault(
        "no embedding norm",
        "the embedding is not normed",
        [
            (
                'Norm.apply(F.embedding(tokens, self.weights["transformer.wte.weight"]), torch.float32)',
                'F.embedding(tokens, self.weights["transformer.wte.weight"])',
            )
        ],
    ),
    Fault(
        "no final norm",
        "the stream is not normed before the head",
        [("return Norm.apply(x, self.dtype)", "return x.to(self.dtype)")],
    ),
    Fault(
        "ReLU",
        "the MLP has ReLU; the reference squares it (ReLU²)",
        [("return h * h", "return h.clone()"), ("return (dy * h).mul_(2)", "return dy * (h > 0)")],
    ),
    # --- optimizer ---
    Fault(
        "no NorMuon scale",
        "Muon's updates are not divided by their running RMS (NorMuon's scale is missing)",
        [("        g *= scale * (length / rescaled.clamp_min(1e-10))\n", "")],
    ),
    Fault(
        "NorMuon length",
        "NorMuon does not restore the length of the update",
        [("g *= scale * (length / rescaled.clamp_min(1e-10))", "g *= scale")],
    ),
    Fault(
        "NorMuon axis",
        "NorMuon's second moment averages over the wrong axis",
        [
            ("self.axis = -1 if m >= n else -2", "self.axis = -2 if m >= n else -1"),
            (
                "(len(params), m, 1) if m >= n else (len(params), 1, n)",
                "(len(params), 1, n) if m >= n else (len(params), m, 1)",
            ),
        ],
    ),
    Fault(
        "decay not cautious",
        "weight decay is not cautious: it works on all entries, and not only where the update shrinks them",
        [("weights * shrinks", "weights")],
    ),
    Fault("no weight decay", "there is no weight decay", [("weights * shrinks", "weights * 0")]),
    Fault(
        "no boost for tall matrices",
        "Muon's rate of tall matrices lacks the factor sqrt(rows / columns)",
        [("self.boost = max(1.0, m / n) ** 0.5", "self.boost = 1.0")],
    ),
    Fault(
        "Newton-Schulz",
        "Muon orthogonalises by the quintic Newton-Schulz iteration; the reference uses Polar Express",
        [("in POLAR_EXPRESS[:MUON_STEPS]", "in 5 * [(3.4445, -4.7750, 2.0315)]")],
    ),
    Fault("plain momentum", "Muon does not orthogonalise", [("orthogonalise(grads.lerp_", "(grads.lerp_"),
                                                            ("momentum), self.dtype)", "momentum))")]),
    Fault(
        "Adam without bias correction",
        "AdamW lacks its bias correction",
        [("torch._foreach_add_(steps, 1)", "torch._foreach_add_(steps, 10**6)")],
    ),
    Fault(
        "Adam rate",
        "AdamW's rates are not scaled by the width of the model",
        [("narrow = (model.dim / 768) ** -0.5", "narrow = 1.0")],
    ),
    Fault(
        "no warm-down",
        "the learning rate does not fall with progress",
        [("left = (1.0 - progress) / WARMDOWN_RATIO", "left = 1.0")],
    ),
)  # fmt: skip


def broken(fault: Fault) -> bytes:
    """The CPU recipe with this mistake."""
    source = backends.load("cpu").recipe().decode("utf-8")
    for old, new in fault.edits:
        if source.count(old) != 1:
            raise UserError(f"{fault.name}: {old!r} stands {source.count(old)} times in the recipe", "mend the edit")
        source = source.replace(old, new)
    return source.encode("utf-8")


# --- naming ------------------------------------------------------------------------------------


def name(found: Mapping[str, np.ndarray]) -> list[str]:
    """What is wrong with a backend that computed these arrays, the likeliest first; else where it parts."""
    shipped = json.loads(NUMBERS.read_text(encoding="utf-8"))
    cap = softcap(found["logits"], shipped["logits"]) if "logits" in found else None
    if cap is not None and abs(cap - SOFTCAP) > FITTED * SOFTCAP:
        return [f"the softcap is {cap:.4g}; the reference has {SOFTCAP:g}" if cap < 1e3 else "there is no softcap"]
    matching = sorted((distance, says) for distance, says in _matches(found, shipped["faults"]))
    return [matching[0][1]] if matching else list(parts(found))


def _matches(found: Mapping[str, np.ndarray], faults: Mapping[str, Any]) -> Iterator[tuple[float, str]]:
    """(sum of differences in units of the tolerance, what it says) of faults that explain all arrays."""
    own = {array: reference.numbers(values) for array, values in found.items()}
    for fault in FAULTS:
        wanted = faults.get(fault.name, {})
        if own.keys() != wanted.keys():
            continue
        worst = [_away(own[array], wanted[array]) / reference.TOLERANCE[array.split()[0]] for array in wanted]
        if max(worst) <= SAME_FAULT:
            yield sum(worst), fault.says


def _away(found: Sequence[float], wanted: Sequence[float]) -> float:
    size = max(abs(wanted[0]), 1e-12)
    away = max(abs(a - b) for a, b in zip(found, wanted, strict=True)) / size
    return away if np.isfinite(away) else float("inf")


def softcap(logits: np.ndarray, shipped: Sequence[float]) -> float | None:
    """The s for which s * tanh(z / s) gives these logits, z being the reference's before its softcap; inf: none.

    None where no s does: then something else is wrong.
    """
    from scipy.optimize import minimize_scalar

    got = np.ravel(logits)[sampled(np.size(logits))].astype(np.float64)
    wanted = np.asarray(shipped)
    z = SOFTCAP * np.arctanh(np.clip(wanted / SOFTCAP, -1 + 1e-9, 1 - 1e-9))
    size = float(np.sqrt(np.mean(wanted**2)))

    def miss(inverse: float) -> float:
        capped = z if inverse < 1e-6 else np.tanh(z * inverse) / inverse
        return float(np.sqrt(np.mean((capped - got) ** 2))) / size

    if not np.isfinite(got).all():
        return None
    best = minimize_scalar(miss, bounds=(0.0, 1.0), method="bounded", options={"xatol": 1e-9})
    inverse = 0.0 if miss(0.0) <= miss(best.x) else float(best.x)
    if miss(inverse) > FITTED:
        return None
    return 1 / inverse if inverse > 1e-3 else float("inf")


def sampled(size: int) -> np.ndarray:
    """Places of the shipped logits among all (flat)."""
    return np.random.default_rng(7).integers(0, size, SAMPLED)


def parts(found: Mapping[str, np.ndarray]) -> Iterator[str]:
    """Which arrays depart, from the front to the back of a step: the first is where to look."""
    failed = [c for c in reference.compare(found, reference.reference()) if not c.passed]
    kinds = {kind: [c for c in failed if c.name.split()[0] == kind] for kind in ("logits", "loss", "gradient", "step")}
    if kinds["logits"]:
        yield f"the forward pass: logits depart by {kinds['logits'][0].difference:.1%} of their size"
    elif kinds["loss"]:
        yield f"the loss, by {kinds['loss'][0].difference:.1%}; the logits agree"
    elif kinds["gradient"]:
        yield f"the backward pass: {_listed([c.name for c in kinds['gradient']])}; logits and loss agree"
    elif kinds["step"]:
        names = [c.name for c in kinds["step"]]
        matrices = sum("transformer.h." in n for n in names)
        whose = "Muon" if matrices == len(names) else "AdamW" if not matrices else "Muon and AdamW"
        yield f"the optimizer ({whose}): {_listed(names)}; gradients agree"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# --- the shipped numbers -----------------------------------------------------------------------


def make() -> dict[str, Any]:
    """What the shipped file holds: numbers of each fault, and sampled logits of the reference itself."""
    device = backends.load("cpu").open_device()
    faults = {}
    for fault in FAULTS:
        found = reference.computed(broken(fault), device)
        faults[fault.name] = {array: [float(f"{x:.8g}") for x in reference.numbers(v)] for array, v in found.items()}
    logits = reference.compute("cpu")["logits"]
    return {"faults": faults, "logits": [float(f"{x:.8g}") for x in logits.ravel()[sampled(logits.size)]]}


@click.command(help="Make the numbers of all known mistakes again, by the CPU recipe.")
@click.option("--write", is_flag=True, required=True)
def main(write: bool) -> None:
    NUMBERS.write_text(json.dumps(make(), separators=(",", ":")).replace('},"', '},\n"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
