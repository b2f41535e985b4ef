"""What an error says. Imports no library: recipes, kernels and the children's trusted part ask it on every backend."""

from __future__ import annotations

import re

# As Python, numpy, PyTorch's allocators, cuBLAS, Triton and MLX say it, in small letters.
SAID = ("out of memory", "can't allocate memory", "not enough memory", "unable to allocate", "alloc_failed")
# PyTorch's allocator asks NVML before it says that a card's memory is used up; where NVML does not answer (in some
# containers, on MIG's parts) an internal assertion about that is all that it says (pytorch/pytorch #112377, #185240).
ASSERTED = ("nvml_success ==", "cudacachingallocator")

# What PyTorch adds to an error for its own developers, in one line: it tells nothing of what happened, and what it
# advises is set here already (the allocator), or is of no use in a child of a night.
ADDED = re.compile(
    "|".join(
        (
            r"Search for `[^`']*['`] in https?://\S+ for more information\.?",
            r"\w+ kernel errors might be asynchronously reported at some other API call, so the stacktrace below might "
            r"be incorrect\.?",
            r"For debugging consider passing \w+=1\.?",
            r"Compile with `TORCH_USE_\w+_DSA` to enable device-side assertions\.?",
            r"Device-side assertions were explicitly omitted for this error check; the error probably arose while "
            r"initializing the DSA handlers\.?",
            r"If reserved but unallocated memory is large try setting \S+ to avoid fragmentation\.?",
            r"See documentation for Memory Management \(https?://[^\s)]*\)?\.?",
            r"\[enforce fail at [^\]]*\] [^.]*\.(?= )",
            r"(?<=INTERNAL ASSERT FAILED) at \S+, please report a bug to PyTorch\.?",
            r"Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace \([^)]*\)\.?",
            r"For even more developer context, set TORCH_LOGS=\S+",
        )
    )
)


def plain(text: str) -> str:
    """An error's text in one line, without what PyTorch adds to it for its own developers."""
    return " ".join(ADDED.sub("", " ".join(text.split())).split())


def refused_by_wsl(error: BaseException) -> bool:
    """Whether, under WSL2, this is its driver's way to say that Windows makes no room on the card: "device not ready",
    where the kernel's log has dxgkio_make_resident: -12 (microsoft/WSL #41176). The process is of no more use then."""
    return isinstance(error, RuntimeError) and "device not ready" in str(error).lower()


def out_of_memory(error: BaseException) -> bool:
    """Whether this is how Python, numpy, torch (on a CPU or a card) or MLX say that no memory is left."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    said = any(words in text for words in SAID) or all(words in text for words in ASSERTED)
    return isinstance(error, RuntimeError) and said
