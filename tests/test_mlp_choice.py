"""What multiplies in the MLP, and how it is chosen. The kernels themselves: test_gpu_kernels.py, test_blank_card.py."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from kernels import mlp_choice as choice  # noqa: E402 - after the skip
from kernels import portable  # noqa: E402


def case(**given):
    fields = {"tokens": 2**18, "dim": 512, "hidden": 2048, "dtype": torch.float32, "device": torch.device("cpu")}
    return choice.Case(**{**fields, **given})


def card(monkeypatch, capability=90, **given):
    """A case for a card that is not there, on which Triton runs."""
    monkeypatch.setattr(portable, "obstacle", lambda device: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: divmod(capability, 10))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    return case(**{"device": torch.device("cuda", 0), "dtype": torch.bfloat16, **given})


def timed(monkeypatch, **times):
    """What `milliseconds` answers from now on, where it is an error that is raised; and what was asked."""
    asked = []

    def milliseconds(name, of):
        asked.append((name, of.tokens))
        if isinstance(times[name], Exception):
            raise times[name]
        return times[name]

    monkeypatch.setattr(choice, "milliseconds", milliseconds)
    return asked


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="no MLP called 'cublas'; known: triton, torch"):
        choice.settled(case(), forced="cublas")


def test_without_a_card_it_is_torch_and_it_says_why():
    found = choice.settled(case())
    assert found.name == "torch" and found.reason == portable.obstacle(case().device) and found.reason in found.told
    with pytest.raises(ValueError, match=re.escape(f"MLP 'triton' cannot do this: {found.reason}")):
        choice.choose(case(), forced="triton")
    assert choice.choose(case(), forced="torch").told == "torch: forced"


def test_what_cannot_be_fused_is_not_timed(monkeypatch):
    asked = timed(monkeypatch)
    turing = choice.settled(card(monkeypatch, 75, dtype=torch.float16))
    assert turing.name == "torch" and "sm_75 has no tensor cores in Triton" in turing.reason
    proof = choice.settled(card(monkeypatch, dtype=torch.float32))
    assert proof.told == "torch: the fused kernels take bf16 and fp16, not torch.float32"
    with pytest.raises(ValueError, match="sm_75 has no tensor cores"):
        choice.settled(card(monkeypatch, 75), forced="triton")
    assert choice.settled(card(monkeypatch), forced="triton").told == "triton: forced" and not asked


@pytest.mark.parametrize(
    ("triton", "torchs", "told"),
    [
        (2.0, 1.0, "torch: 1.000 ms forward and backward; triton 2.000"),
        (1.0, 2.0, "triton: 1.000 ms forward and backward; torch 2.000"),
        (1.0, 1.0, "triton: 1.000 ms forward and backward; torch 1.000"),
        (1.0, 0.99, "triton: 1.000 ms forward and backward; torch 0.990, not faster by 2%"),
        (RuntimeError("PassManager::run failed\nmore"), 2.0,
         "torch: triton failed when timed: RuntimeError: PassManager::run failed"),
    ],
)  # fmt: skip
def test_the_faster_one_is_taken_and_of_two_that_tie_the_fused_one(monkeypatch, caplog, triton, torchs, told):
    caplog.set_level("INFO", "kernels.mlp_choice")
    asked = timed(monkeypatch, triton=triton, torch=torchs)
    assert choice.choose(card(monkeypatch)).told == told
    assert asked == [("torch", choice.TIMED_TOKENS), ("triton", choice.TIMED_TOKENS)]
    name, reason = told.split(": ", 1)
    assert caplog.messages == [f"MLP of 512 by 2048: {name} ({reason})"]


def test_where_memory_is_out_fewer_tokens_are_timed(monkeypatch):
    """As the steps of the rtx recipe go on with fewer rows: a build must not end there."""
    asked = []

    def milliseconds(name, of):
        asked.append(of.tokens)
        if of.tokens > 2**14:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 256.00 MiB")
        return 1.0

    monkeypatch.setattr(choice, "milliseconds", milliseconds)
    assert choice.choose(card(monkeypatch)).name == "triton"
    assert asked == [2**16, 2**15, 2**14, 2**14]
    timed(monkeypatch, torch=torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        choice.choose(card(monkeypatch))


# --- one choice for every process of an experiment ----------------------------------------------


def test_the_next_process_takes_what_the_first_one_measured(monkeypatch, tmp_path):
    asked = timed(monkeypatch, triton=2.0, torch=1.0)
    first = choice.settled(card(monkeypatch), folder=tmp_path)
    assert first.name == "torch" and len(asked) == 2
    asked = timed(monkeypatch, triton=1.0, torch=2.0)
    again = choice.settled(card(monkeypatch, tokens=4096), folder=tmp_path)
    assert not asked and again.name == "torch" and again.milliseconds == first.milliseconds
    assert again.reason == f"{first.reason} (as measured before)"
    for other in ({"dim": 256}, {"hidden": 1024}, {"dtype": torch.float16}):
        assert choice.settled(card(monkeypatch, **other), folder=tmp_path).name == "triton"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert choice.settled(card(monkeypatch)).name == "torch", "a child's own folder of caches"


def test_what_is_installed_or_changed_since_is_measured_again(monkeypatch, tmp_path):
    for name, value in (("triton_version", "9.9"), (None, "of other kernels"), ("triton_version", "9.10")):
        if name:
            monkeypatch.setattr(choice, name, lambda value=value: value)
        else:
            monkeypatch.setenv("TORCH_COMPILE_CACHE_KEY_TAG", value)
        asked = timed(monkeypatch, triton=1.0, torch=2.0)
        choice.settled(card(monkeypatch), folder=tmp_path)
        choice.settled(card(monkeypatch), folder=tmp_path)
        assert len(asked) == 2


@pytest.mark.parametrize(
    "left", ["", "[]", '{"name": "torch"}', '{"name": "cublas", "milliseconds": {"cublas": 1}, "reason": ""}',
             '{"name": "torch", "milliseconds": {"a": "b"}, "reason": ""}'],
)  # fmt: skip
def test_what_is_left_over_and_does_not_hold_is_measured_again(monkeypatch, tmp_path, left):
    timed(monkeypatch, triton=2.0, torch=1.0)
    choice.settled(card(monkeypatch), folder=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(left)
    asked = timed(monkeypatch, triton=1.0, torch=2.0)
    assert choice.settled(card(monkeypatch), folder=tmp_path).name == "triton" and len(asked) == 2


def test_what_was_kept_does_not_go_before_what_cannot_be(monkeypatch, tmp_path):
    timed(monkeypatch, triton=1.0, torch=2.0)
    assert choice.settled(card(monkeypatch), folder=tmp_path).name == "triton"
    monkeypatch.setattr(portable, "products", lambda device: False)
    assert choice.settled(card(monkeypatch), folder=tmp_path).name == "torch"


# --- the recipes --------------------------------------------------------------------------------


def test_what_is_timed_is_what_the_recipes_multiply(monkeypatch):
    """Two products each way of one size, in the dtype of the case."""
    small = replace(case(), tokens=30, dim=8, hidden=32, dtype=torch.bfloat16)
    seen = []

    def once(call, device):
        call()
        return 1.0

    def watched(function):
        return lambda *given: seen.append((function.__name__, given[-1])) or function(*given)

    monkeypatch.setattr(choice, "median", once)
    for name in ("relu2", "relu2_backward"):
        monkeypatch.setattr(portable, name, watched(getattr(portable, name)))
    assert choice.milliseconds("torch", small) == 1.0
    assert seen == [("relu2", "torch"), ("relu2_backward", "torch")]
    shapes = [(30, 8), (32, 8), (8, 32), (30, 8)]
    assert [(t.shape, t.dtype) for t in choice.inputs(small)] == [(s, torch.bfloat16) for s in shapes]
