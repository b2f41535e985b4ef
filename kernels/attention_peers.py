"""What stands behind the one signature of attention, and why each can or cannot do a case.

    (q, k, v, cos, sin, window, scale=None) -> y          # shapes as in kernels/attention.py

Each is made for a `Case` before it is used: what it imports, compiles or looks up is done then, so that a graph of
torch.compile holds the computation only. None drops a window or puts a dense mask in its place: PyTorch's own kernels,
which know no window, are offered for the whole context only.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.machinery import PathFinder
from typing import Any

import torch
from torch import Tensor

from kernels import portable
from kernels.attention_reference import reference, reference_rotated

HALF = (torch.float16, torch.bfloat16)
FLASH4_NEEDS = ("cutlass", "quack", "tvm_ffi")  # modules of what flash-attn-4 requires


@dataclass(frozen=True)
class Case:
    """What attention is asked to do."""

    rows: int  # B
    length: int  # T
    heads: int  # H
    key_heads: int  # Hkv
    head: int  # D
    window: int  # tokens seen before a query
    dtype: torch.dtype
    device: torch.device

    @property
    def whole(self) -> bool:
        """Whether every query sees all that came before it."""
        return self.window >= self.length - 1

    @property
    def capability(self) -> int:
        """90 for sm_90; 0 where there is no NVIDIA card."""
        if self.device.type != "cuda":
            return 0
        major, minor = torch.cuda.get_device_capability(self.device)
        return 10 * major + minor


Attention = Callable[..., Tensor]  # (q, k, v, cos, sin, window, scale=None) -> y


@dataclass(frozen=True)
class Peer:
    """One implementation."""

    make: Callable[[Case], Attention]
    why_not: Callable[[Case], str]  # "" where it can do the case
    whole: bool = True  # torch.compile takes it into one graph with what stands around it
    compiles: bool = False  # its first call compiles attention itself, which takes seconds


# --- the implementations ----------------------------------------------------------------------


def _triton(case: Case) -> Attention:
    from kernels.attention import attention

    return attention


def _reference(case: Case) -> Attention:
    return reference


def _core(name: str, case: Case) -> Attention:
    """One that kernels/attention_cores.py knows, by its name."""
    from kernels import attention_cores, attention_flash

    if name == "fa3":
        attention_flash.load()
    return partial(attention_cores.attention, by=name)


def _flash4(case: Case) -> Attention:
    """FlashAttention-4's public function. Some of its versions return (y, lse), some y."""
    function = importlib.import_module("flash_attn.cute").flash_attn_func
    turn = _turning(case)

    def run(
        q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int, scale: float | None = None
    ) -> Tensor:
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        found = function(q, k, v, softmax_scale=scale, causal=True, window_size=(min(window, q.size(1)), 0))
        y: Tensor = found[0] if isinstance(found, tuple) else found
        return y

    disabled: Attention = torch.compiler.disable(run)
    return disabled


def _flex(case: Case) -> Attention:
    """Its mask is made here for the case's length and window; at another length it is made at each call."""
    from torch.nn.attention.flex_attention import flex_attention

    # Not compiled, FlexAttention would build the whole matrix of scores.
    flex: Any = torch.compile(flex_attention, dynamic=False) if case.device.type == "cuda" else flex_attention
    turn, made = _turning(case), block_mask(case.length, min(case.window, case.length), case.device)

    def run(
        q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int, scale: float | None = None
    ) -> Tensor:
        T = q.size(1)
        same = case.length == T and window == case.window
        mask = made if same else block_mask(T, min(window, T), q.device)
        q, k, v = (x.transpose(1, 2) for x in (turn(q, cos, sin), turn(k, cos, sin), v))
        y: Tensor = flex(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.size(1) != k.size(1))
        return y.transpose(1, 2)

    return run


def block_mask(length: int, window: int, device: torch.device) -> Any:
    """FlexAttention's list of blocks that are seen wholly, in part or not at all."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j <= window)

    return create_block_mask(seen, None, None, length, length, device=device)


def _turning(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """QK-norm and RoPE for those that have them neither inside nor around them: on a card one fused pass."""
    fused = torch.compile(reference_rotated, dynamic=False) if case.device.type == "cuda" else reference_rotated

    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned: Tensor = (reference_rotated if torch.compiler.is_compiling() else fused)(x, cos, sin)
        return turned

    return turn


# --- why not ----------------------------------------------------------------------------------


def _no_triton(case: Case) -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from kernels.attention import obstacle

    if case.device.type not in ("cuda", "meta") and not portable.without_card():
        return f"Triton compiles for GPUs; the device is {case.device.type}"
    return obstacle(case.capability, case.heads, case.key_heads, case.head, case.dtype)


def _no_flash3(case: Case) -> str:
    if case.capability // 10 != 9:
        return f"FlashAttention-3 is for sm_90, not {_card(case)}"
    return _half(case) or _absent("flash_attn_interface", "flash_attn_3")


def _no_flash4(case: Case) -> str:
    if case.capability // 10 not in (9, 10, 11):
        return f"FlashAttention-4 is for sm_90 and sm_100, not {_card(case)}"
    if case.head not in (64, 96, 128):
        return f"FlashAttention-4 takes heads of 64, 96 and 128 channels, not {case.head}"
    return _half(case) or _absent("flash_attn.cute", "flash-attn-4", FLASH4_NEEDS)


def _no_cudnn(case: Case) -> str:
    if case.capability < 80:
        return f"cuDNN's attention needs sm_80, not {_card(case)}"
    if case.head % 8 or case.head > 128:
        return f"cuDNN's attention takes heads of 8, 16, .. 128 channels, not {case.head}"
    missing = "" if torch.backends.cudnn.is_available() else "this torch has no cuDNN"
    return _half(case) or _windowless(case) or missing


def _no_sdpa_flash(case: Case) -> str:
    if case.device.type == "cuda" and case.capability < 80:
        return f"torch's flash attention needs sm_80, not {_card(case)}"
    if case.device.type == "cuda" and case.head % 8:
        return f"torch's flash attention takes heads of 8, 16, .. 256 channels, not {case.head}"
    return (_half(case) if case.device.type == "cuda" else "") or _windowless(case)


def _no_flex(case: Case) -> str:
    if case.capability < 80:
        return f"FlexAttention is compiled by Triton for sm_80 and newer, not {_card(case)}"
    return "" if importlib.util.find_spec("triton") else "FlexAttention needs triton, which is not installed"


def _half(case: Case) -> str:
    return "" if case.dtype in HALF else f"takes bf16 and fp16, not {case.dtype}"


def _windowless(case: Case) -> str:
    return "" if case.whole else f"knows no windows; {case.window} of {case.length} tokens asked for"


def _card(case: Case) -> str:
    return f"sm_{case.capability}" if case.capability else case.device.type


def _absent(module: str, package: str, needs: Sequence[str] = ()) -> str:
    """Looked up without importing, the parent of `module` neither: FlashAttention loads its CUDA libraries on import,
    and flash_attn is FlashAttention-2 where that is installed, whose library need not fit this torch.

    needs: the modules of what it depends on. The sandbox shows none of FlashAttention-4's to a recipe, which cannot use
    it for that reason (core/readable.py); the benchmarks can.
    """
    if not _installed(module):
        return f"{package} is not installed (no module {module})"
    missing = [name for name in needs if not _installed(name)]
    return f"{package} needs {', '.join(missing)}, which cannot be imported here" if missing else ""


def _installed(module: str) -> bool:
    parent, _, child = module.partition(".")
    found = importlib.util.find_spec(parent)
    if found is None or not child:
        return found is not None
    return PathFinder.find_spec(module, list(found.submodule_search_locations or ())) is not None


PEERS: dict[str, Peer] = {
    "triton": Peer(_triton, _no_triton, compiles=True),
    "fa3": Peer(partial(_core, "fa3"), _no_flash3),
    "fa4": Peer(_flash4, _no_flash4, whole=False, compiles=True),
    "cudnn": Peer(partial(_core, "cudnn"), _no_cudnn),
    "flash": Peer(partial(_core, "flash"), _no_sdpa_flash),
    "flex": Peer(_flex, _no_flex, compiles=True),
    "reference": Peer(_reference, lambda case: ""),
}
