"""What is left to do after any interruption: pure functions of the ledger's rows and git's refs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from core.ledger import Experiment

ATTEMPTS = 3  # starts of one experiment that may end without an outcome before it is given up

Action = Literal["repeat", "give up", "decide"]


def unfinished(experiments: Sequence[Experiment]) -> list[tuple[Action, int]]:
    """Experiments that were cut off, and what becomes of each. Nobody else may be running them.

    An experiment that was running has no outcome: it is repeated under its number, but not for ever, as it may be
    what ends the machine. One that has its outcome is only decided. One that waits goes on waiting.
    """
    found: list[tuple[Action, int]] = []
    for e in experiments:
        if e.state == "running":
            found.append(("repeat" if e.attempts < ATTEMPTS else "give up", e.number))
        elif e.state in ("scored", "audited"):
            found.append(("decide", e.number))
    return found


def wanted_refs(experiments: Sequence[Experiment], branch: str, candidates: str, first: str) -> dict[str, str]:
    """Every ref that git has to have by the ledger: the branch at the best (before there is one: at `first`), each
    decided candidate under `candidates`."""
    kept = [e for e in experiments if e.is_kept]
    wanted = {f"{candidates}{e.number}": e.commit for e in experiments if e.status is not None and e.commit}
    return {**wanted, branch: (kept[-1].commit if kept else None) or first}


def refs_to_set(
    experiments: Sequence[Experiment], refs: Mapping[str, str], branch: str, candidates: str, first: str
) -> dict[str, str]:
    """The refs that differ from what the ledger says. A branch that somebody else moved is set back; what they
    committed stays reachable under `<candidates>saved/`."""
    wanted = wanted_refs(experiments, branch, candidates, first)
    differ = {name: sha for name, sha in wanted.items() if refs.get(name) != sha}
    head = refs.get(branch)
    if branch in differ and head is not None and head not in {first, *(e.commit for e in experiments)}:
        differ[f"{candidates}saved/{head}"] = head
    return differ
