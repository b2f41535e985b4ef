"""What stands behind the one signature of attention, and how it is chosen. The kernel itself: test_gpu_kernels.py."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from kernels import attention_choice as choice  # noqa: E402 - after the skip
from kernels.attention_peers import PEERS  # noqa: E402
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
        PEERS["flash"].make(case())(*choice.inputs(case()), 38)


def test_what_each_card_has(monkeypatch):
    pytest.importorskip("triton")
    turing = choice.available(card(monkeypatch, 75))
    assert "sm_75" in turing["triton"] and "sm_80" in turing["flash"] and "sm_80" in turing["flex"]
    ampere, hopper = (choice.available(card(monkeypatch, cc, window=8)) for cc in (86, 90))
    assert not ampere["triton"] and not ampere["flex"] and "sm_90" in ampere["fa3"]
    assert not hopper["triton"] and "sm_90" not in hopper["fa3"]


def test_the_fastest_that_runs_is_taken_and_failures_are_told(monkeypatch):
    times = {"triton": 2.0, "flash": 1.5, "flex": 3.0}

    made = {}  # what was made -> its name: the timing is given only the former

    def making(name, peer):
        def make(wanted):
            def run(*given):
                raise AssertionError("nothing runs on a card that is not there")

            made[run] = name
            return run

        return replace(peer, make=make)

    monkeypatch.setattr(choice, "PEERS", {name: making(name, peer) for name, peer in PEERS.items()})

    def measured(run, wanted):
        name = made[run]
        if name not in times:
            raise RuntimeError("no such thing\nas this")
        return times[name]

    pytest.importorskip("triton")
    monkeypatch.setattr(choice, "milliseconds", measured)
    monkeypatch.setattr(choice, "why_apart", lambda run, wanted: "")
    found = choice.choose(card(monkeypatch, 90))
    assert found.name == "flash" and found.reason.startswith("1.500 ms") and found.milliseconds == times
    assert "reference" not in found.milliseconds
    if "cudnn" in found.refused and "failed" in found.refused["cudnn"]:
        assert found.refused["cudnn"] == "failed when timed: RuntimeError: no such thing"
        assert "cudnn failed when timed" in found.reason


def test_flash_of_torch_agrees_with_the_reference():
    q, k, v, cos, sin = choice.inputs(case(), seed=torch.seed() % 2**31)
    y, wanted = PEERS["flash"].make(case())(q, k, v, cos, sin, 39), reference(q, k, v, cos, sin, 39)
    assert torch.allclose(y, wanted, atol=1e-5)


def test_the_block_mask_sees_what_the_window_says():
    mask = choice.block_mask(300, 17, torch.device("cpu"))
    i, j = torch.arange(300)[:, None], torch.arange(300)
    assert torch.equal(mask.mask_mod(0, 0, i, j), (i >= j) & (j >= i - 17))


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("window", [0, 1, 7, 38, 39, 40, 200])
@pytest.mark.parametrize("name", [name for name in PEERS if name != "reference"])
def test_every_peer_that_runs_here_agrees_with_the_reference(name, window, heads, key_heads):
    """Output and gradients in float32; the Triton kernel is held to it in tests/interpreted/. FlexAttention has no
    backward on a CPU, so only its output."""
    wanted_case = case(window=window, heads=heads, key_heads=key_heads)
    peer = PEERS[name]
    if name == "flex":  # refused on a CPU because it would build all scores there; that is no harm to a test
        assert peer.why_not(wanted_case)
    elif why := peer.why_not(wanted_case):
        assert name != "flash" or "no windows" in why
        return
    q, k, v, cos, sin = choice.inputs(wanted_case, seed=torch.seed() % 2**31)
    if name == "flex":
        q, k, v = (x.detach() for x in (q, k, v))
    found, wanted = (f(q, k, v, cos, sin, window) for f in (peer.make(wanted_case), reference))
    dy = torch.randn_like(wanted)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    if name == "flex":
        return
    for ours, theirs in zip(*(torch.autograd.grad(y, (q, k, v), dy) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["flash", "flex", "reference"])
def test_a_peer_is_one_graph_with_what_stands_around_it(name):
    given = case(window=39 if name == "flash" else 9)
    run = PEERS[name].make(given)

    def around(q, k, v, cos, sin):
        return run(2 * q, k, v, cos, sin, given.window).sum()

    args = [x.detach() for x in choice.inputs(given)]
    whole = torch.compile(around, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(*args), around(*args), atol=1e-3, rtol=1e-4)
    assert PEERS[name].whole


# --- one choice for every process of an experiment ----------------------------------------------


def settle(monkeypatch, folder, times, capability=90, **given):
    """`settled` on a card that is not there, with these times; and what was timed."""
    asked = []

    def measured(run, wanted):
        asked.append(wanted.rows)
        return times[len(asked) - 1]

    made = card(monkeypatch, capability, **given)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    monkeypatch.setattr(choice, "milliseconds", measured)
    monkeypatch.setattr(choice, "why_apart", lambda run, wanted: "")
    monkeypatch.setattr(choice, "PEERS", {n: replace(p, make=lambda c: reference) for n, p in PEERS.items()})
    return choice.settled(made, folder=folder), asked


def test_the_next_process_takes_what_the_first_one_measured(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    first, asked = settle(monkeypatch, tmp_path, [3.0, 2.0, 1.0, 4.0], rows=64)
    assert asked and set(asked) == {choice.TIMED_ROWS} and first.reason.startswith("1.000 ms")
    again, asked = settle(monkeypatch, tmp_path, [1.0, 9.0, 9.0, 9.0], rows=4)
    assert again.name == first.name and not asked and "as measured before" in again.reason
    other, asked = settle(monkeypatch, tmp_path, [1.0, 9.0, 9.0, 9.0], window=8)
    assert asked and other.name == "triton"


def test_what_is_installed_or_changed_since_is_measured_again(monkeypatch, tmp_path):
    """A lab keeps what it has measured for as long as it lives."""
    pytest.importorskip("triton")
    ways = {n: p for n, p in PEERS.items() if n != "flash"}
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "PEERS", ways)
        first, asked = settle(patch, tmp_path, [1.0, 2.0, 3.0, 4.0])
        assert asked and first.name == "triton"
    _, asked = settle(monkeypatch, tmp_path, [3.0, 2.0, 1.0, 4.0], window=39)
    assert asked
    for version in ("of other kernels", "of others still"):
        monkeypatch.setenv("TORCH_COMPILE_CACHE_KEY_TAG", version)
        assert settle(monkeypatch, tmp_path, [1.0, 2.0, 3.0, 4.0])[1]
        assert not settle(monkeypatch, tmp_path, [1.0, 2.0, 3.0, 4.0])[1]
    monkeypatch.setattr(choice, "_triton", lambda: "9.9")
    assert settle(monkeypatch, tmp_path, [1.0, 2.0, 3.0, 4.0])[1]
    packages = tmp_path / "site-packages"
    monkeypatch.syspath_prepend(str(packages))
    for version in ("3.0.0+20260217.cu130.x86", "3.0.0+20260601.cu130.x86"):  # as PyTorch's index names its builds
        left = packages / f"flash_attn_3-{version}.dist-info"
        left.mkdir(parents=True)
        assert settle(monkeypatch, tmp_path, [1.0, 2.0, 3.0, 4.0])[1], version
        assert not settle(monkeypatch, tmp_path, [1.0, 2.0, 3.0, 4.0])[1], version
        left.rmdir()


@pytest.mark.parametrize(
    "left", ["", "not json", "[]", '{"name": "triton"}', '{"name": "fa3", "milliseconds": {"fa3": 1}, "reason": ""}',
             '{"name": "nonesuch", "milliseconds": {"nonesuch": 1}, "reason": ""}',
             '{"name": "flex", "milliseconds": {}}', '{"name": "flex", "milliseconds": {"a": "b"}, "reason": ""}'],
)  # fmt: skip
def test_what_is_left_over_and_does_not_hold_is_measured_again(monkeypatch, tmp_path, left):
    pytest.importorskip("triton")
    settle(monkeypatch, tmp_path, [1.0, 2.0, 3.0, 4.0])
    (file,) = tmp_path.iterdir()
    file.write_text(left)
    found, asked = settle(monkeypatch, tmp_path, [1.0, 2.0, 3.0, 4.0])
    assert found.name == "triton" and asked


def slowly(monkeypatch, seconds):
    """Each way that is timed takes so long, by the clock of the choice."""
    clock = itertools.count(0.0, seconds)
    monkeypatch.setattr(choice, "time", SimpleNamespace(monotonic=lambda: next(clock)))


def test_triton_and_what_comes_compiled_take_nothing_of_the_time_for_flex_attention(monkeypatch, tmp_path):
    """With nothing in a cache Triton's first compilation alone takes more than that, and the choice is for good."""
    pytest.importorskip("triton")
    slowly(monkeypatch, 60.0)
    found, _ = settle(monkeypatch, tmp_path, [4.0, 3.0, 2.0, 1.0])
    assert found.name == "flex" and "not timed" not in found.reason


def test_when_a_warm_up_is_used_up_nothing_more_is_compiled_and_the_log_names_what_was_left_out(
    monkeypatch, tmp_path, caplog
):
    """What comes compiled is timed all the same; whoever reads the choice later is told too."""
    pytest.importorskip("triton")
    caplog.set_level("INFO", "kernels.attention_choice")
    monkeypatch.setitem(PEERS, "fa4", replace(PEERS["fa4"], why_not=lambda case: ""))  # a second that compiles
    slowly(monkeypatch, 20.0)
    found, _ = settle(monkeypatch, tmp_path, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.name == "triton" and found.milliseconds.keys() >= {"flash", "fa4"}
    assert "flex" not in found.milliseconds
    assert found.refused["flex"] == "not timed: 20 s were used up, 15 s are given to it"
    again, asked = settle(monkeypatch, tmp_path, [])
    assert not asked and "flex not timed" in again.reason
    assert len(caplog.messages) == 2 and all("flex not timed" in message for message in caplog.messages)


def test_where_nothing_else_can_it_is_the_reference_and_a_warning(monkeypatch, caplog):
    found = choice.choose(card(monkeypatch, 75, window=7))
    assert found.name == "reference" and "sm_75" in found.reason
    assert [r.levelname for r in caplog.records] == ["WARNING"]
