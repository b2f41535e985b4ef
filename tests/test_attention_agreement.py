"""That an attention is taken for its time only where its numbers are right."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from kernels import attention_agreement as agreement  # noqa: E402 - after the skip
from kernels import attention_choice as choice  # noqa: E402
from kernels.attention_peers import PEERS, Case  # noqa: E402
from kernels.attention_reference import reference, reference_rotated  # noqa: E402
from kernels.tolerance import TOLERANCE  # noqa: E402

T = 300  # more than a block of queries, and no whole number of them
DTYPES = {name: getattr(torch, name) for name in TOLERANCE}


def case(dtype="float32", **given):
    fields = {"rows": 2, "length": T, "heads": 4, "key_heads": 2, "head": 32, "window": 60}
    fields |= {"dtype": DTYPES[dtype], "device": torch.device("cpu")}
    return Case(**{**fields, **given})


def another_window(by):
    return lambda q, k, v, cos, sin, window: reference(q, k, v, cos, sin, window + by)


class Altered(torch.autograd.Function):
    """The identity, with another gradient."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx, d):
        return ctx.change(d), None


def altered(of, change):
    """The reference with another gradient for one of q, k, v."""

    def run(q, k, v, cos, sin, window):
        given = [Altered.apply(x, change) if i == of else x for i, x in enumerate((q, k, v))]
        return reference(*given, cos, sin, window)

    return run


def one_is_nan(q, k, v, cos, sin, window):
    y = reference(q, k, v, cos, sin, window)
    mark = torch.zeros_like(y)
    mark[0, 7, 0, 3] = torch.nan  # neither in the row nor in the heads that are computed anew
    return y + mark


def without_rotation(q, k, v, cos, sin, window):
    return reference(q, k, v, torch.ones_like(cos), torch.zeros_like(sin), window)


def strictly_causal(q, k, v, cos, sin, window):
    """No query but the first sees itself."""
    q, k = (reference_rotated(x, cos, sin) for x in (q, k))
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), 2) for x in (k, v))
    position = torch.arange(q.size(1))
    distance = position[:, None] - position
    hidden = (distance <= 0) | (distance > window)
    hidden[0, 0] = False
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.size(-1) ** -0.5
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (2, 1)])
@pytest.mark.parametrize("window", [1, 60, 270, T - 1, 10**6])
def test_the_exact_one_is_the_reference(window, heads):
    """Forward and derivative, which are written out there, beside those of autograd."""
    of = case(window=window, heads=heads[0], key_heads=heads[1])
    q, k, v, cos, sin = (x.detach().double() for x in choice.inputs(of, seed=torch.seed() % 2**31))
    dy, (H, G) = torch.randn_like(q), heads
    leaves = [x.requires_grad_() for x in (q, k, v)]
    y = reference(*leaves, cos, sin, window)
    wanted = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    one = [x.detach()[-1, :, -n:] for x, n in zip((q, k, v, dy), (H // G, 1, 1, H // G), strict=True)]
    found = agreement.exact(*one, cos, sin, min(window, T - 1))
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w[-1, :, -f.size(1) :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1, 60, T - 2, T - 1, 10**6])
def test_what_computes_the_case_is_right_in_its_dtype(dtype, window):
    """The reference in the narrow dtypes rounds more than any kernel: its scores too."""
    assert agreement.why_apart(reference, case(dtype, window=window)) == ""
    if window >= T - 1:
        assert agreement.why_apart(PEERS["flash"].make(case(dtype)), case(dtype, window=window)) == ""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by", [-3, -1, 1, 2])
@pytest.mark.parametrize("window", [5, 60, 200])
def test_another_window_is_found_whatever_the_dtype_rounds(dtype, by, window):
    """Also where it is less than is allowed: of a long window a single token changes less than 3 %."""
    why = agreement.why_apart(another_window(by), case(dtype, window=window))
    other = window + (1 if by > 0 else -1)
    assert " % off, " in why or why.endswith(f" is closer to that of a window of {other} tokens than of {window}")


def test_a_token_more_in_a_long_window_is_within_the_tolerance_and_found_all_the_same():
    why = agreement.why_apart(another_window(1), case("bfloat16", window=200))
    assert why == "its output is closer to that of a window of 201 tokens than of 200"


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (lambda *given: 1.02 * reference(*given), "its output is 2 % off, 0.01 % is allowed"),
        (without_rotation, "its output is "),
        (strictly_causal, "its output is "),
        (lambda *given: 0 * reference(*given), "its output is 100 % off"),
        (one_is_nan, "its output is not finite everywhere"),
        (altered(0, lambda d: d / 1.5), "its gradient of q is 33.3 % off"),
        (altered(1, lambda d: d.flip(0)), "its gradient of k is "),
        (altered(2, lambda d: d / 0), "its gradient of v is not finite everywhere"),
    ],
)
def test_what_is_wrong_is_told_with_its_figure(run, why):
    assert agreement.why_apart(run, case()).startswith(why)


def test_the_window_of_the_gradients_is_looked_at_too():
    """Its output is right; its backward sees a token more."""

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, right, wrong):
            return right.clone()

        @staticmethod
        def backward(ctx, d):
            return None, d

    def run(*given):
        return Forward.apply(reference(*given), another_window(1)(*given))

    why = agreement.why_apart(run, case("bfloat16", window=200))
    assert why == "its gradient of q is closer to that of a window of 201 tokens than of 200"


# --- the choice -------------------------------------------------------------------------------------


TIMES = {"triton": 3.0, "cudnn": 1.0, "flash": 2.0, "flex": 4.0}


@pytest.fixture
def timed(monkeypatch):
    """A card whose kernels take TIMES, and compute what a CPU computes by the functions that are given for them."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    real, asked = choice.why_apart, []

    def on_a_cpu(run, of):
        asked.append(run.name)
        return real(run.does, replace(of, device=torch.device("cpu")))

    class Made:
        def __init__(self, name, does):
            self.name, self.does = name, does

    def given(**functions):
        peers = {
            name: replace(p, make=lambda of, name=name: Made(name, functions.get(name, reference)),
                          why_not=lambda of, name=name: "" if name in (*TIMES, "reference") else "no")
            for name, p in PEERS.items()
        }  # fmt: skip
        monkeypatch.setattr(choice, "PEERS", peers)
        return asked

    monkeypatch.setattr(choice, "why_apart", on_a_cpu)
    monkeypatch.setattr(choice, "milliseconds", lambda run, of: TIMES[run.name])
    return given


CARD = case("bfloat16", rows=1, heads=2, key_heads=1, length=130, window=90, device=torch.device("cuda", 0))


def test_the_fastest_that_is_right_is_taken_and_the_others_say_what_they_are_off(timed):
    assert timed(cudnn=another_window(-60)) == []
    found = choice.choose(CARD)
    assert found.name == "flash" and found.milliseconds == {n: ms for n, ms in TIMES.items() if n != "cudnn"}
    assert found.refused["cudnn"].startswith("refused: its output is ")
    assert found.refused["cudnn"].endswith(" % off, 3 % is allowed")
    assert f"cudnn {found.refused['cudnn']}" in found.reason


def test_where_none_is_right_it_is_the_reference_and_a_warning(timed, caplog):
    timed(**dict.fromkeys(TIMES, another_window(-1)))
    found = choice.choose(CARD)
    assert found.name == "reference" and found.milliseconds == {}
    assert found.reason.count("refused: its ") == len(TIMES)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_choice_is_kept_with_what_was_refused_and_made_anew_where_more_is_asked(timed, tmp_path, monkeypatch):
    asked = timed(cudnn=one_is_nan)
    assert choice.settled(CARD, folder=tmp_path).name == "flash" and len(asked) == len(TIMES)
    again = choice.settled(CARD, folder=tmp_path)
    assert again.name == "flash" and "cudnn refused: its output is not finite" in again.reason
    assert len(asked) == len(TIMES)
    monkeypatch.setitem(TOLERANCE, "bfloat16", 0.02)
    choice.settled(CARD, folder=tmp_path)
    assert len(asked) == 2 * len(TIMES)
    assert all(json.loads(file.read_text())["name"] == "flash" for file in tmp_path.iterdir())
