"""Why a proposal is not run, found without running anything."""

from __future__ import annotations

import ast
import difflib
import functools
import warnings

from core.contract import Proposal
from core.ledger import Experiment, Ledger
from core.recipe import fingerprint
from core.syntax import parse

REPAIRS = 2  # failed experiments that a researcher may answer with a repair of the same idea, one after another


def objection(ledger: Ledger, proposal: Proposal) -> str:
    """Why a researcher's proposal is not run; "" if it is.

    A researcher says with `detail["repairs"] = n` that it mends the failed experiment n; how often is bounded.
    """
    experiments = ledger.experiments()
    twin = _twin(experiments, proposal.source)
    if twin:
        return f"{proposal.description!r} {twin}"
    by_number = {e.number: e for e in experiments}
    repaired, chain = proposal.detail.get("repairs"), 0
    while isinstance(repaired, int) and repaired in by_number:
        chain += 1
        repaired = by_number.pop(repaired).detail.get("repairs")
    if chain > REPAIRS:
        return f"the idea of {proposal.description!r} failed {chain} times and is given up"
    return ""


def tried(ledger: Ledger, source: bytes) -> str:
    """Why `source` need not be tried: the same program, or the same change to an earlier best, was; "" if neither."""
    experiments = ledger.experiments()
    twin = _twin(experiments, source)
    return f"it {twin}" if twin else _same_change(ledger, experiments, source)


def _twin(experiments: list[Experiment], source: bytes) -> str:
    mark = fingerprint(source)
    twin = next((e for e in experiments if e.fingerprint == mark), None)
    return f"is the same program as #{twin.number} ({_ended(twin)})" if twin else ""


def _same_change(ledger: Ledger, experiments: list[Experiment], source: bytes) -> str:
    best = ledger.best()
    if best is None:
        return ""
    wanted = change(ledger.source(best.source_sha256), source)
    by_number = {e.number: e for e in experiments}
    for e in reversed(experiments):
        parent = by_number.get(e.parent or 0)
        if parent is None or e.is_kept:
            continue
        if change(ledger.source(parent.source_sha256), ledger.source(e.source_sha256)) == wanted:
            return f"it makes the same change as #{e.number} made to #{parent.number} ({_ended(e)})"
    return ""


def _ended(e: Experiment) -> str:
    score = f" at {e.val_bpb:.6f}" if e.val_bpb is not None else ""
    return f"{e.status}{score}" if e.status else "not measured yet"


@functools.lru_cache(maxsize=2048)
def change(old: bytes, new: bytes) -> tuple[str, ...]:
    """The lines that go and come, comments and layout left out; equal for the same change to different files."""
    lines = difflib.unified_diff(_plain(old), _plain(new), n=0, lineterm="")
    return tuple(line for line in list(lines)[2:] if not line.startswith("@@"))


@functools.lru_cache(maxsize=512)
def _plain(source: bytes) -> list[str]:
    try:
        with warnings.catch_warnings():  # an odd escape in somebody's recipe is no news for the console
            warnings.simplefilter("ignore")
            return ast.unparse(parse(source)).splitlines()
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return source.decode("utf-8", "replace").splitlines()
