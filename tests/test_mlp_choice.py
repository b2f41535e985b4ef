"""What multiplies in the MLP, and how it is chosen. The kernels themselves: test_gpu_kernels.py, test_blank_card.py."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from kernels import mlp_agreement, plain, portable  # noqa: E402 - after the skip
from kernels import mlp_choice as choice  # noqa: E402


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
    """What `milliseconds` answers from now on, where it is an error that is raised; and what was asked. No card is
    here whose numbers could be looked at: all are right."""
    asked = []
    monkeypatch.setattr(choice, "why_apart", lambda name, of: "")

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
    monkeypatch.setattr(choice, "why_apart", lambda name, of: "")
    assert choice.choose(card(monkeypatch)).name == "triton"
    assert asked == [2**16, 2**15, 2**14, 2**14]
    timed(monkeypatch, torch=torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        choice.choose(card(monkeypatch))


# --- the right ones -----------------------------------------------------------------------------

SMALL = {"tokens": 70, "dim": 16, "hidden": 40}
WRONG = {
    "the norm's scale is left out": lambda r: None,
    "the scales of other rows are taken": lambda r: r.roll(1),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tokens", [1, 70, 1300])
def test_numbers_that_are_right_pass(dtype, tokens):
    assert mlp_agreement.why_apart("torch", case(**SMALL | {"tokens": tokens}, dtype=getattr(torch, dtype))) == ""


@pytest.mark.parametrize("what", WRONG)
def test_numbers_that_are_wrong_are_told(monkeypatch, what):
    real = portable.relu2
    monkeypatch.setattr(portable, "relu2", lambda x, w, r, by: real(x, w, WRONG[what](r), by))
    said = mlp_agreement.why_apart("torch", case(**SMALL, dtype=torch.bfloat16))
    assert re.fullmatch(r"its squared ReLU is [\d.]+ % off, 3 % is allowed", said)


def test_a_wrong_gradient_is_told(monkeypatch):
    real = portable.relu2_backward
    monkeypatch.setattr(portable, "relu2_backward", lambda d, w, y, r, by: real(d, w, y, r, by) * 1.04)
    assert mlp_agreement.why_apart("torch", case(**SMALL)) == "its gradient before it is 4 % off, 0.01 % is allowed"


def test_what_is_no_number_is_told_wherever_it_is(monkeypatch):
    def one_is_nan(x, w, r, by):
        y = plain.relu2(x, w, r)
        y[777, 3] = torch.nan  # in a row that is not computed anew
        return y

    monkeypatch.setattr(portable, "relu2", one_is_nan)
    said = mlp_agreement.why_apart("torch", case(**SMALL | {"tokens": 1300}))
    assert said == "its squared ReLU is not finite everywhere"


@pytest.mark.parametrize(
    ("wrong", "name", "reason"),
    [
        (["torch"], "triton", "torch refused: its squared ReLU is 9 % off, 3 % is allowed"),
        (["triton"], "torch", "triton refused: its squared ReLU is 9 % off, 3 % is allowed"),
        (["torch", "triton"], "plain", "torch refused: its squared ReLU is 9 % off, 3 % is allowed; "
         "triton refused: its squared ReLU is 9 % off, 3 % is allowed"),
    ],
)  # fmt: skip
def test_what_gives_other_numbers_is_not_taken_however_fast(monkeypatch, caplog, tmp_path, wrong, name, reason):
    timed(monkeypatch, torch=1.0, triton=1.0)
    off = "its squared ReLU is 9 % off, 3 % is allowed"
    monkeypatch.setattr(choice, "why_apart", lambda name, of: off if name in wrong else "")
    found = choice.settled(card(monkeypatch), folder=tmp_path)
    assert (found.name, found.reason) == (name, reason) and not found.milliseconds.keys() & set(wrong)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert bool([*tmp_path.iterdir()]) == (name != "plain"), "what was not timed is asked again"
    assert choice.settled(card(monkeypatch), folder=tmp_path).name == name


def test_what_fails_leaves_the_other(monkeypatch):
    timed(monkeypatch, torch=RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"), triton=1.0)
    assert choice.choose(card(monkeypatch)).told == (
        "triton: torch failed when timed: RuntimeError: CUBLAS_STATUS_EXECUTION_FAILED"
    )


def test_plain_is_pytorchs_own_operations_also_where_tritons_run(monkeypatch):
    assert choice.choose(card(monkeypatch), forced="plain").told == "plain: forced"
    monkeypatch.setattr(portable, "fused", lambda device: True)
    x, w1, w2, dout = choice.inputs(case(**SMALL))
    y = portable.relu2(x, w1, None, "plain")
    assert torch.equal(y, plain.relu2(x, w1))
    assert torch.equal(portable.relu2_backward(dout, w2, y, None, "plain"), plain.relu2_backward(dout, w2, y))


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


def test_another_version_of_what_multiplies_is_measured_again(monkeypatch, tmp_path):
    packages = tmp_path / "site-packages"
    monkeypatch.syspath_prepend(str(packages))  # which is not there at first
    asked = timed(monkeypatch, triton=1.0, torch=2.0)
    for i, version in enumerate(("", "99.1", "99.2", "99.2")):
        shutil.rmtree(packages, ignore_errors=True)
        (packages / f"nvidia_cublas-{version}.dist-info").mkdir(parents=True) if version else None
        choice.settled(card(monkeypatch), folder=tmp_path / "caches")
        assert len(asked) == 2 * min(i + 1, 3), version
    monkeypatch.setattr(choice, "TOLERANCE", choice.TOLERANCE | {"bfloat16": 0.001})
    choice.settled(card(monkeypatch), folder=tmp_path / "caches")
    assert len(asked) == 8, "how right it has to be is another question"


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
