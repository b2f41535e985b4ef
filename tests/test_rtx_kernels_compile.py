"""What the RTX recipe launches, compiled for each consumer target in the dtype that it has there: no GPU is needed."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)

import triton.language as tl
from binaries import require_cuobjdump

from benchmarks.compile_attention import PRODUCT, backward, forward, passes
from benchmarks.compile_cases import Case, loss
from kernels import portable, residual_norm
from kernels.attention import obstacle

require_cuobjdump()


def norms(target: int, dtype: str):
    """The weighted norm as `lean.project` has it, and the plain sum as `lean.feed` has it: one dtype throughout."""
    for channels in (384, 768):
        for scaled in (True, False):
            scalars = dict.fromkeys(("A", "B"), "*fp32") if scaled else {}
            none = {} if scaled else {"A": None, "B": None}
            types = scalars | {"N": "i32", "C": "i32", "eps": "fp32"}
            kind = {"SCALED": scaled, "ACC": tl.float32}
            options = residual_norm.constants(channels, residual_norm.FORWARD[target])
            warps = options.pop("num_warps")
            arrays = dict.fromkeys(("X", "X0", "OUT", "Y"), f"*{dtype}")
            constants = {**kind, **options, **none, "R": None}
            yield Case(f"norm {channels}", residual_norm._forward, target, arrays | types, constants, warps, 3, ("C",))
            options = residual_norm.constants(channels, residual_norm.BACKWARD[target])
            warps = options.pop("num_warps")
            arrays = dict.fromkeys(("D", "DY", "X", "DX", "DX0"), f"*{dtype}") | {"SUMS": "*fp32"}
            arrays |= {"X0": f"*{dtype}"} if scaled else {}
            constants = {**kind, "BOTH": scaled, "TIMES_R": False, "Y": None, **options, **none}
            constants |= {} if scaled else {"X0": None}
            yield Case(f"back {channels}", residual_norm._backward, target, arrays | types, constants, warps, 3, ("C",))


@pytest.mark.slow
@pytest.mark.parametrize(("target", "dtype"), [(75, "fp16"), (86, "bf16"), (89, "bf16"), (120, "bf16")])
def test_norms_and_loss_fit_in_the_dtype_of_the_card(target, dtype):
    found = [case.compile() for case in [*norms(target, dtype), *list(loss(target, dtype))[:1]]]
    assert len(found) == 9
    assert not [problem for one in found for problem in one.problems()]


@pytest.mark.slow
@pytest.mark.parametrize("head", [32, 64, 128])
def test_turings_queries_and_keys_are_turned_in_place_by_triton(head):
    """The products are torch's there; before and after them these kernels run."""
    rotation, _, _, back = passes(75, head, "fp16")
    for found in (rotation, back):
        assert not found.problems() and found.name in ("rotated_kernel", "rotated_back_kernel")


@pytest.mark.slow
@pytest.mark.parametrize("target", [86, 89, 120])
def test_attention_with_heads_of_64_fits_99_kb_in_float16_too(target):
    for one in (forward(target, 64, dtype="fp16"), backward(target, 64, dtype="fp16")):
        assert not one.problems() and one.shared <= 99 * 1024 and one.count(PRODUCT[target])


def test_turing_is_sent_to_torchs_attention_with_the_reason():
    import torch

    assert "sm_75" in obstacle(75, 4, 4, 64, torch.float16) and "tensor cores" in obstacle(75, 4, 4, 64, torch.float16)
    assert portable.TENSOR_CORES == 80
