"""FlashAttention, as far as it can be tested without a card: how it is found, and FlashAttention-3 in a graph of
torch.compile, with a stand-in for the package under both forms that its inner functions have had."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")


from flash3 import FORMS, stand_in  # noqa: E402

from kernels import attention_choice as choice  # noqa: E402
from kernels import attention_flash, attention_peers  # noqa: E402
from kernels.attention_peers import PEERS, Case  # noqa: E402
from kernels.attention_reference import reference  # noqa: E402

T = 24


def case(window=T, device="cpu", dtype=torch.float32):
    return Case(2, T, 4, 2, 64, window, dtype, torch.device(device))


def hopper(monkeypatch, window=T):
    """A case for a card that is not there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return case(window, "cuda:0", torch.bfloat16)


# --- looked up, not imported ------------------------------------------------------------------------


def installed(monkeypatch, folder: Path, **files: str) -> None:
    """These modules, by their paths without the ending, lie in a package folder of their own."""
    for name, text in files.items():
        file = (folder / name).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(folder))


BROKEN = "raise ImportError('flash_attn_2_cuda.so: undefined symbol')"


def test_flash_attention_2_is_not_imported_to_see_whether_there_is_a_4(monkeypatch, tmp_path):
    """Its library need not fit this torch, and recipes cannot open it: every build failed where it was installed."""
    installed(monkeypatch, tmp_path, **{"flash_attn/__init__": BROKEN})
    why = choice.available(hopper(monkeypatch))["fa4"]
    assert why == "flash-attn-4 is not installed (no module flash_attn.cute)"
    assert "flash_attn" not in sys.modules


def test_flash_attention_4_says_which_of_its_packages_cannot_be_imported(monkeypatch, tmp_path):
    installed(monkeypatch, tmp_path, **{"flash_attn/__init__": BROKEN, "flash_attn/cute/__init__": "", "quack": ""})
    why = choice.available(hopper(monkeypatch))["fa4"]
    assert why.startswith("flash-attn-4 needs cutlass, ") and "quack" not in why
    for name in attention_peers.FLASH4_NEEDS:
        installed(monkeypatch, tmp_path, **{name: ""})
    assert not choice.available(hopper(monkeypatch))["fa4"]
    with pytest.raises(ValueError, match=r"'fa4' cannot be loaded: flash_attn_2_cuda.so: undefined symbol"):
        choice.choose(hopper(monkeypatch), forced="fa4")


def test_a_library_that_does_not_load_is_told(monkeypatch, tmp_path):
    installed(monkeypatch, tmp_path, flash_attn_interface="raise OSError('libcudart.so.12: cannot open')")
    with pytest.raises(ValueError, match=r"'fa3' cannot be loaded: libcudart.so.12: cannot open"):
        choice.choose(hopper(monkeypatch), forced="fa3")


def test_what_splits_the_graph_is_timed_and_told_but_not_taken(monkeypatch):
    pytest.importorskip("triton")
    times = {"triton": 3.0, "fa4": 1.0}
    made = {name: lambda *given, name=name: name for name in PEERS}
    peers = {n: replace(p, make=lambda _, n=n: made[n], why_not=lambda _, n=n: "" if n in times else "no")
             for n, p in PEERS.items()}  # fmt: skip
    monkeypatch.setattr(choice, "PEERS", peers)
    monkeypatch.setattr(choice, "milliseconds", lambda run, _: times[run()])
    monkeypatch.setattr(choice, "why_apart", lambda run, _: "")
    found = choice.choose(hopper(monkeypatch))
    assert found.name == "triton" and found.whole and found.milliseconds == times
    assert found.reason == "3.000 ms forward and backward; fa4 1.000, not taken as it would split the graph"
    del times["triton"]
    assert choice.choose(hopper(monkeypatch)).name == "fa4"


# --- FlashAttention-3 in a graph ------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [0, 5, T - 1, 10**6])
def test_flash_attention_3_agrees_with_the_reference(monkeypatch, form, window):
    stand_in(monkeypatch, *FORMS[form])
    q, k, v, cos, sin = choice.inputs(case(window), seed=torch.seed() % 2**31)
    found, wanted = (f(q, k, v, cos, sin, window) for f in (PEERS["fa3"].make(case(window)), reference))
    dy = torch.randn_like(wanted)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    for ours, theirs in zip(*(torch.autograd.grad(y, (q, k, v), dy) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_layers_with_flash_attention_3_are_one_graph(monkeypatch, form):
    stand_in(monkeypatch, *FORMS[form])
    runs = {window: PEERS["fa3"].make(case(window)) for window in (6, T)}
    assert PEERS["fa3"].whole
    q, k, v, cos, sin = choice.inputs(case())

    def layers(q, k, v):
        for i in range(10):  # more than torch.compile would compile one function anew
            q = q + runs[6 if i % 2 else T](q, k, v, cos, sin, 6 if i % 2 else T)
        return q.square().mean()

    whole = torch.compile(layers, backend="aot_eager", dynamic=False, fullgraph=True)
    torch.testing.assert_close(whole(q, k, v), layers(q, k, v))
    for ours, theirs in zip(*(torch.autograd.grad(f(q, k, v), (q, k, v)) for f in (whole, layers)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_version_that_is_not_known_is_refused_and_not_used_without_its_window(monkeypatch):
    q, k, v, _, _ = choice.inputs(case())
    stand_in(monkeypatch, lambda q, k, v, softmax_scale, causal: None, FORMS["older"][1])
    with pytest.raises(RuntimeError, match="_flash_attn_forward takes q, k, v, softmax_scale, causal: no window"):
        attention_flash.flash3(q, k, v, 3)
    stand_in(monkeypatch, lambda q, k, v, softmax_scale, causal, window_size: (q + 0, q, k), FORMS["older"][1])
    with pytest.raises(RuntimeError, match=r"gave .* are known here"):
        attention_flash.flash3(q, k, v, 3)


def test_the_operators_are_sound_for_torch_compile(monkeypatch):
    stand_in(monkeypatch, *FORMS["older"])
    q, k, v, _, _ = choice.inputs(case())
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.autoresearch.flash3, (q, k, v, 7, 0.1), test_utils=checks)
