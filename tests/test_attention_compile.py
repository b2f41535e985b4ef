"""Every shipped configuration of the attention kernels, compiled for every card it is meant for: no GPU is needed."""

from __future__ import annotations

import ast
import math
import os
import re
import subprocess

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)

from binaries import require_cuobjdump

from benchmarks.compile_attention import PRODUCT, TARGETS, backward, both, forward, passes
from benchmarks.compiled import Compiled, compiled, resources
from kernels.attention_tiles import BACKWARD, FORWARD, nearest, padded

require_cuobjdump()
HEADS = (32, 64, 128)


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_fits_its_card(target, head):
    """And loads run beside its products: it waits for older ones, but where 99 KB hold no more of them."""
    for found in both(target, head):
        assert not found.problems()
        assert found.count(PRODUCT[target]), f"{found.name}: no {PRODUCT[target]}"
        under_way = [int(groups) for groups in re.findall(r"cp\.async\.wait_group\s+(\d+)", found.ptx)]
        narrow = target in (86, 89, 120) and head == 128 and found.name == "backward_kernel"
        assert (max(under_way) == 0) == narrow, f"{found.name}: {under_way}"


@pytest.mark.slow
@pytest.mark.parametrize(("target", "head", "dtype"), [(90, 128, "fp16"), (90, 96, "bf16"), (86, 48, "fp16")])
def test_fp16_and_padded_heads_fit_too(target, head, dtype):
    for found in both(target, head, dtype):
        assert not found.problems()
        assert found.count(PRODUCT[target])


@pytest.mark.slow
@pytest.mark.parametrize(("target", "head"), [(80, 128), (90, 64), (90, 128)])
def test_without_groups_it_fits_too(target, head):
    found = backward(target, head, ones=("G",))
    assert not found.problems() and found.count(PRODUCT[target])


@pytest.mark.slow
def test_one_token_one_head_and_a_window_of_one_compile():
    """Triton takes arguments of 1 for constants, which know fewer operations than numbers."""
    assert not backward(80, 32, ones=("T", "H", "G", "window")).spills


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90])
def test_the_passes_over_memory_fit(target):
    for found in passes(target, 128):
        assert not found.problems() and found.registers <= 128


SPREAD = re.compile(
    r"(#\w+) = #ttg.blocked<\{sizePerThread = (.+?), threadsPerWarp = (.+?), warpsPerCTA = (.+?), order"
)
ACCESS = re.compile(r"tt\.(load|store) .*tensor<(\d+)x(\d+)x!tt\.ptr<bf16>, (#\w+)>")


@pytest.mark.slow
@pytest.mark.parametrize("head", [*HEADS, 48])
@pytest.mark.parametrize("target", [80, 90])
def test_what_is_turned_in_place_is_written_by_the_thread_that_read_it(target, head):
    """And by no other: a second one that holds the same element could read what the first has written."""
    rotation, _, _, back = passes(target, head)
    for found, read in ((rotation, 2), (forward(target, head), 2), (back, 4)):  # the last: a gradient and what it is of
        spread = {name: [ast.literal_eval(part) for part in parts] for name, *parts in SPREAD.findall(found.ttgir)}
        accesses = [(kind, int(m), int(n), layout) for kind, m, n, layout in ACCESS.findall(found.ttgir)]
        halves = [access for access in accesses if access[2] == padded(head) // 2]
        assert [kind for kind, *_ in halves[: read + 2]] == [*["load"] * read, "store", "store"]
        (_, rows, columns, layout), *others = halves[: read + 2]
        assert all(other[1:] == (rows, columns, layout) for other in others)
        assert math.prod(x for part in spread[layout] for x in part) <= rows * columns


def test_tables_hold_the_same_cards_and_sizes():
    assert FORWARD.keys() == BACKWARD.keys() == PRODUCT.keys()
    assert all(set(table[cc]) == {32, 64, 128} for table in (FORWARD, BACKWARD) for cc in table)
    assert [padded(d) for d in (32, 34, 48, 64, 80, 96, 128)] == [32, 64, 64, 64, 128, 128, 128]
    assert [nearest(FORWARD, cc) for cc in (80, 87, 90, 103, 121)] == [80, 86, 90, 100, 120]
    with pytest.raises(ValueError, match="no attention tiles for sm_75; known: sm_80"):
        nearest(FORWARD, 75)


def test_what_is_wrong_is_said():
    found = Compiled("k", 86, 4, 2, registers=255, spills=16, shared=120_000, ptx="\tmma.sync.aligned;\n\tmma.sync.x;")
    assert found.problems() == [
        "k sm_86: 16 bytes per thread spilled (255 registers)",
        "k sm_86: 120000 bytes of shared memory, 101376 at most",
    ]
    assert found.count("mma.sync") == 2 and found.count("wgmma") == 0 and found.blocks == 2
    with pytest.raises(ValueError, match="no limits known for sm_70"):
        compiled(None, {}, {}, 4, 2, 70)
    with pytest.raises(TypeError, match="is not a compiled kernel"):
        compiled(test_what_is_wrong_is_said, {}, {}, 4, 2, 90)


def test_a_binary_that_is_none_is_refused():
    with pytest.raises((RuntimeError, subprocess.CalledProcessError)):
        resources(b"not a binary")
