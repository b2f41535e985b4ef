"""Compiled kernels, run without a card: the PTX that Triton makes of a kernel, executed thread by thread with NumPy.

Triton's interpreter runs a kernel's Python; this runs what the compiler made of it, for any target, so layouts, tensor
core fragments, swizzles, pipelines and barriers are what a card would get. What is watched beside the numbers:

- global memory: every place lies within a tensor that was given; no two threads touch one place, one of them writing,
  without a barrier between them (no two blocks at all), but by atomics;
- shared memory: the same, and what is still being copied or multiplied is left alone until it was waited for; what
  threads wrote is fenced before the tensor cores or the copy engine read it; what nobody wrote is NaN;
- tensor memory (sm_100): likewise what products write and read; every column that was lent is given back;
- registers and tensor memory hold NaN until they are written.

    with emulated(90):         # sm_90
        y = mlp(x, w1, w2)     # any function of kernels/, on tensors of a CPU

Threads of a block go in step. Order is not tried out: whether it could matter is what the watch tells. PTX only: what
ptxas makes of it is not run.
"""

from __future__ import annotations

from benchmarks.ptx.driver import emulated
from benchmarks.ptx.memory import Fault

__all__ = ["Fault", "emulated"]
