"""What stands behind the one signature of attention, and how it is chosen. The kernel itself: test_gpu_kernels.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from kernels import attention_choice as choice  # noqa: E402 - after the skip
from kernels.attention_reference import reference  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def test_importing_needs_no_driver_and_compiles_nothing():
    pytest.importorskip("triton")
    code = (
        "import torch, kernels.attention, kernels.attention_choice; "
        "assert not torch.cuda.is_initialized(); print(kernels.attention.attention.__name__)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.stdout.strip() == "attention", done.stderr


# --- the choice -------------------------------------------------------------------------------


def case(**given):
    fields = {"rows": 2, "length": 40, "heads": 4, "key_heads": 4, "head": 32, "window": 40}
    fields |= {"dtype": torch.float32, "device": torch.device("cpu")}
    return choice.Case(**{**fields, **given})


def card(monkeypatch, capability, **given):
    """A case for a card that is not there: only its capability is asked for."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: divmod(capability, 10))
    return case(device=torch.device("cuda", 0), dtype=torch.bfloat16, head=128, **given)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no attention called 'fast'; known: triton, fa3, .*reference"):
        choice.choose(case(), forced="fast")


def test_a_forced_name_that_cannot_is_refused_with_its_reason():
    with pytest.raises(ValueError, match="'flash' cannot do this: knows no windows; 7 of 40 tokens"):
        choice.choose(case(window=7), forced="flash")
    with pytest.raises(ValueError, match="'fa3' cannot do this: FlashAttention-3 is for sm_90, not cpu"):
        choice.choose(case(), forced="fa3")


def test_without_a_device_it_is_the_reference_and_it_says_why():
    found = choice.choose(case())
    assert found.name == "reference" and "no device" in found.reason
    assert set(found.refused) >= {"triton", "fa3", "fa4", "cudnn", "flex"}


def test_no_kernel_without_windows_is_offered_for_one(monkeypatch):
    whole, windowed = (choice.available(card(monkeypatch, 90, window=w)) for w in (39, 38))
    assert not whole["flash"] and "no windows" in windowed["flash"] and "no windows" in windowed["cudnn"]
    with pytest.raises(ValueError, match="knows no windows"):
        choice._sdpa_flash(*choice.inputs(case()), 38)


def test_what_each_card_has(monkeypatch):
    pytest.importorskip("triton")
    turing = choice.available(card(monkeypatch, 75))
    assert "sm_75" in turing["triton"] and "sm_80" in turing["flash"] and "sm_80" in turing["flex"]
    ampere, hopper = (choice.available(card(monkeypatch, cc, window=8)) for cc in (86, 90))
    assert not ampere["triton"] and not ampere["flex"] and "sm_90" in ampere["fa3"]
    assert not hopper["triton"] and "sm_90" not in hopper["fa3"]


def test_the_fastest_that_runs_is_taken_and_failures_are_told(monkeypatch):
    times = {"triton": 2.0, "flash": 1.5, "flex": 3.0}

    def measured(run, wanted):
        name = next(n for n, (f, _) in choice.IMPLEMENTATIONS.items() if f is run)
        if name not in times:
            raise RuntimeError("no such thing\nas this")
        return times[name]

    pytest.importorskip("triton")
    monkeypatch.setattr(choice, "milliseconds", measured)
    found = choice.choose(card(monkeypatch, 90))
    assert found.name == "flash" and found.reason.startswith("1.500 ms") and found.milliseconds == times
    assert "reference" not in found.milliseconds
    if "cudnn" in found.refused and "failed" in found.refused["cudnn"]:
        assert found.refused["cudnn"] == "failed when timed: RuntimeError: no such thing"


def test_flash_of_torch_agrees_with_the_reference():
    q, k, v, cos, sin = choice.inputs(case(), seed=torch.seed() % 2**31)
    y, wanted = choice._sdpa_flash(q, k, v, cos, sin, 39), reference(q, k, v, cos, sin, 39)
    assert torch.allclose(y, wanted, atol=1e-5)


def test_the_block_mask_sees_what_the_window_says():
    mask = choice.block_mask(300, 17, torch.device("cpu"))
    i, j = torch.arange(300)[:, None], torch.arange(300)
    assert torch.equal(mask.mask_mod(0, 0, i, j), (i >= j) & (j >= i - 17))
