"""What an error says. Imports nothing: recipes, kernels and the children's trusted part ask it on every backend."""

from __future__ import annotations

# As Python, numpy, PyTorch's allocators, cuBLAS, Triton and MLX say it, in small letters.
SAID = ("out of memory", "can't allocate memory", "unable to allocate", "alloc_failed")
# PyTorch's allocator asks NVML before it says that a card's memory is used up; where NVML does not answer (in some
# containers, on MIG's parts) an internal assertion about that is all that it says (pytorch/pytorch #112377, #185240).
ASSERTED = ("nvml_success ==", "cudacachingallocator")


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
