"""Compiled kernels that lack one barrier, fence or wait: benchmarks.ptx finds it.

Not each is needed: Triton puts a barrier before each copy that it begins, and a wait behind a loop that has waited;
and some are in loops that the small work here does not come to. So of kinds that are there more than once, the least
number of those found is written down, as measured with Triton 3.8 and 3.9.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from ptx_by_hand import fences
from ptx_mutants import (
    attended,
    forward,
    instead,
    loss,
    mlp,
    mutated,
    norm,
    noticed,
    outcome,
    sites,
    symmetric,
    texts,
)  # fmt: skip

ALL = 1000
FOUND = [  # work, target, which of its kernels, kind -> how many of those left out are found at least
    (norm, 75, "_backward", {"bar.sync": ALL}),
    (norm, 90, "_backward", {"bar.sync": ALL}),
    (loss, 75, "_chunk", {"bar.sync": ALL}),
    (loss, 86, "_chunk", {"bar.sync": ALL}),
    (forward(mlp(70, 72, 90)), 90, "_by_pointers",
     {"bar.sync": ALL, "fence.proxy.async": ALL, "wgmma.fence": ALL, "wgmma.wait_group": ALL}),
    (symmetric(40, 50), 86, "_symmetric", {"bar.sync": 4}),
]  # fmt: skip
SLOWER = [
    (forward(attended(200, 32, 200)), 86, "forward_kernel", {"bar.sync": 11, "cp.async.wait_group": ALL}),
    (forward(attended(270, 32, 270)), 90, "forward_kernel",
     {"bar.sync": 9, "fence.proxy.async": 2, "wgmma.fence": ALL, "wgmma.wait_group": ALL,
      "cp.async.wait_group": ALL}),
    (forward(mlp(256, 256, 512)), 90, "_by_tma",
     {"bar.sync": 3, "fence.proxy.async": ALL, "wgmma.fence": ALL, "wgmma.wait_group": ALL, "mbarrier.try_wait": ALL,
      "cp.async.bulk.wait_group": ALL}),
]  # fmt: skip


def found(work, target, kernel, kind):
    """Whether each of the kind that is left out is noticed."""
    right = outcome(work, target)
    assert not isinstance(right, str), right
    text = texts(work, target)[f"{kernel}#0"]
    return [noticed(right, outcome(work, target, instead(text, mutated(text, kind, at)))) for at in sites(text)[kind]]


def check(work, target, kernel, wanted):
    for kind, least in wanted.items():
        if kind == "fence.proxy.async" and fences(target) == "stores":
            continue  # this Triton leaves out some itself
        each = found(work, target, kernel, kind)
        assert each and sum(each) >= min(least, len(each)), f"{kind}: {each}"


@pytest.mark.parametrize(("work", "target", "kernel", "wanted"), FOUND, ids=[f"{x[2]}-{x[1]}" for x in FOUND])
def test_what_keeps_threads_and_copies_apart_is_missed_when_it_is_gone(work, target, kernel, wanted):
    check(work, target, kernel, wanted)


@pytest.mark.slow
@pytest.mark.parametrize(("work", "target", "kernel", "wanted"), SLOWER, ids=[f"{x[2]}-{x[1]}" for x in SLOWER])
def test_what_a_kernel_of_many_stages_keeps_apart_is_missed_when_it_is_gone(work, target, kernel, wanted):
    check(work, target, kernel, wanted)


@pytest.mark.parametrize("kind", ["sense of a predicate", "constant of a shift", "register of a product"])
def test_a_changed_operand_shows_in_the_numbers_or_as_a_fault(kind):
    """Of twelve places all over the kernel most matter; others are of rows or signs that the small work has not."""
    text, right = texts(norm, 86)["_backward#0"], outcome(norm, 86)
    places = sites(text)[kind]
    tried = [places[i * len(places) // 12] for i in range(12)] if len(places) > 12 else places
    seen = [noticed(right, outcome(norm, 86, instead(text, mutated(text, kind, at)))) for at in tried]
    assert sum(seen) >= 0.6 * len(seen), seen
