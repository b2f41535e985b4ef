"""What a crash tells who reads it: the fact with its number, the line, what to do; nothing that PyTorch adds to it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks import blank_card
from kernels.errors import out_of_memory, plain

# As torch 2.5 to 2.14 say it.
FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which 1.50 GiB is free. "
    "Process 4711 has 3.10 GiB memory in use. Of the allocated memory 3.00 GiB is allocated by PyTorch, and 96.00 MiB "
    "is reserved by PyTorch but unallocated."
)
TRY = (
    " If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to "
    "avoid fragmentation.  See documentation for Memory Management  (https://pytorch.org/docs/stable/notes/cuda.html#env-var)"
)
LATE = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1{dot}\n"
)
SEARCH = (
    "\nSearch for `cudaErrorIllegalAddress' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html "
    "for more information."
)
COMPILE = "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
ILLEGAL, LAUNCH = "an illegal memory access was encountered", "unspecified launch failure"
EARLIER = "a card tells of a kernel's fault late: look for an index out of range in earlier lines too"
DRIVER = "the card's driver ended it: see what `nvidia-smi` and the system's log (Xid) say"


OTHERS = "shapes (3, 4) and (5, 6) do not fit"


def failing(tiny_recipe, line):
    """The recipe with this line at the start of its step."""
    return tiny_recipe.replace("        tokens = batches.next", f"        {line}\n        tokens = batches.next", 1)


@pytest.mark.parametrize(
    ("said", "fact", "action"),
    [
        (FULL + TRY, FULL, "; use smaller batches or a smaller model"),
        (f"CUDA error: {ILLEGAL}{LATE.format(dot='.')}{COMPILE}", f"CUDA error: {ILLEGAL}", f"; {EARLIER}"),
        (f"CUDA error: {ILLEGAL}{SEARCH}{LATE.format(dot='')}", f"CUDA error: {ILLEGAL}", f"; {EARLIER}"),
        (f"CUDA error: {LAUNCH}{SEARCH}{LATE.format(dot='')}", f"CUDA error: {LAUNCH}", f"; {DRIVER}"),
        (OTHERS, OTHERS, ""),
    ],
)
def test_a_crash_says_what_happened_and_what_to_do(run_recipe, tiny_recipe, said, fact, action):
    source = failing(tiny_recipe, f"raise RuntimeError({said!r})")
    outcome = run_recipe(source)
    line = 1 + source.split("raise RuntimeError")[0].count("\n")
    told = f"warm-up step at progress 0: RuntimeError: {fact} (train.py, line {line}){action}"
    assert (outcome.status, outcome.reason) == ("crash", told)


def test_what_the_processors_allocator_says(run_recipe, tiny_recipe):
    outcome = run_recipe(failing(tiny_recipe, "torch.empty(2**50)"))
    said = "not enough memory" if sys.platform == "win32" else "can't allocate"
    assert outcome.reason.startswith(f"warm-up step at progress 0: RuntimeError: DefaultCPUAllocator: {said}")
    assert outcome.reason.endswith("; use smaller batches or a smaller model")


def test_windows_says_it_in_other_words():
    fact = "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."
    said = f"[enforce fail at alloc_cpu.cpp:117] data. {fact}"
    assert out_of_memory(RuntimeError(said)) and not out_of_memory(ValueError(said))
    assert plain(said) == fact


@pytest.mark.slow
@pytest.mark.skipif(bool(blank_card.obstacle()), reason="no blank card here")
def test_what_this_torch_really_says_of_a_card(tmp_path):
    code = """
import sys
import torch
from kernels.errors import plain
torch.cuda.set_per_process_memory_fraction(0.1)
for work in (lambda: torch.empty(2**34, device="cuda"), lambda: torch.cuda.synchronize()):
    try:
        work()
    except RuntimeError as error:
        print(plain(str(error)))
    sys.path.insert(0, "tests")
    from blank_sharing import Shared
    Shared(sys.argv[1], type("Card", (), {"bytes": 2**33})).fail()
"""
    env = blank_card.environment(blank_card.CARDS["4060"]) | {"BLANK_CARD_SHARED": str(tmp_path / "card")}
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "card"], env=env, capture_output=True, text=True)
    full, failed = done.stdout.splitlines()
    assert full.startswith("CUDA out of memory.") and "8.00 GiB" in full and failed == f"CUDA error: {LAUNCH}"
    assert not any(words in done.stdout for words in ("http", "try setting", "=1", "Search", "asynchronously"))
