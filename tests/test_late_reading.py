"""Losses that are read one step later: the device has work in hand while the host waits, and the value is the old one.

No card is here. What is real is `kernels.pinned.later` and the trainer's loop; the card is a queue whose work is
done when somebody waits for it, and no earlier.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from backends import worker  # noqa: E402 - after the skip
from backends.cpu.device import CpuDevice  # noqa: E402
from core.clock import Budget  # noqa: E402
from core.contract import Choice  # noqa: E402
from kernels import pinned  # noqa: E402


class Card:
    """One stream of a card: in order, and as late as it can be."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []
        self.done = 0

    def send(self, work: Callable[[], None]) -> None:
        self.queue.append(work)

    def wait(self, until: int) -> None:
        while self.done < until:
            self.queue[self.done]()
            self.done += 1


class Scalar:
    """A tensor of one number, on the card or in pinned memory."""

    dtype = torch.float32
    shape = ()
    device = SimpleNamespace(type="cuda")

    def __init__(self, card: Card) -> None:
        self.card, self.value = card, float("nan")

    def detach(self) -> Scalar:
        return self

    def copy_(self, other: Scalar, non_blocking: bool) -> None:
        assert non_blocking
        self.card.send(lambda: setattr(self, "value", other.value))

    def numpy(self) -> np.ndarray:
        return np.float32(self.value).reshape(())


class Event:
    def __init__(self, card: Card) -> None:
        self.card = card

    def record(self) -> None:
        self.at = len(self.card.queue)

    def synchronize(self) -> None:
        self.card.wait(self.at)


def fake_torch(card: Card) -> Any:
    def empty(shape: Any, dtype: Any, device: str, pin_memory: bool) -> Scalar:
        assert device == "cpu" and pin_memory, "a copy to other memory stops the host"
        return Scalar(card)

    kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    return SimpleNamespace(cuda=SimpleNamespace(Event=lambda: Event(card)), empty=empty, **kinds)


class Steps:
    """A recipe whose loss is one tensor that every step writes again: step k's is k."""

    def __init__(self, card: Card, fails_at: int = 0) -> None:
        self.card, self.fails_at, self.step_, self.loss = card, fails_at, 0, Scalar(card)

    def step(self, stream: Any, progress: float) -> Scalar:
        self.step_ += 1
        number = float("nan") if self.step_ == self.fails_at else float(self.step_)
        self.card.send(lambda: setattr(self.loss, "value", number))
        return self.loss


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    made = Card()
    monkeypatch.setattr(pinned, "torch", fake_torch(made))
    return made


def loop_of(card: Card, training: Steps, said: list[float]) -> worker.Loop:
    channel = SimpleNamespace(send=lambda kind, fields: said.append(fields["loss"]))
    stream = SimpleNamespace(served=0, passes=0.0)
    return worker.Loop(
        channel,
        SimpleNamespace(later=pinned.later),
        training,
        stream,
        Budget(0.2, time.monotonic()),  # type: ignore[arg-type]
    )


def test_the_card_has_a_step_in_hand_while_a_loss_is_waited_for(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    read = worker.read_loss

    def watched(step: int, later: Callable[[], Any]) -> float:
        found = read(step, later)
        seen.append((step, found, len(card.queue) - card.done))
        return found

    monkeypatch.setattr(worker, "read_loss", watched)
    monkeypatch.setattr(worker, "PROGRESS_EVERY", 0.0)
    said: list[float] = []
    loop_of(card, Steps(card), said).run()
    assert len(seen) > 10
    assert [found for _, found, _ in seen] == [float(step) for step, _, _ in seen], "overwritten by the next step"
    assert [step for step, _, _ in seen] == list(range(1, len(seen) + 1))
    in_hand = [left for _, _, left in seen[: len(seen) // 2]]  # near its end the loop waits for everything
    assert set(in_hand) == {2}, "the next step and the copy of its loss"
    assert said and said[0] == 1.0


def test_a_loss_that_is_not_finite_ends_the_run_one_step_later(card: Card) -> None:
    training = Steps(card, fails_at=5)
    with pytest.raises(worker.RecipeError, match="loss is nan at step 5"):
        loop_of(card, training, []).run()
    assert training.step_ == 6


def test_what_is_no_loss_is_the_recipes_fault() -> None:
    for wrong, words in ((1.0, "loss of step 3: AttributeError"), (torch.zeros(2), r"shape \(2,\), not one loss")):
        with pytest.raises(worker.RecipeError, match=words):
            worker.read_loss(3, worker.later(SimpleNamespace(later=pinned.later), 3, wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize("later", [pinned.later, CpuDevice(Choice("float32", "")).later])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_it_is_the_value_of_that_moment(later: Any, dtype: Any) -> None:
    loss = torch.tensor(2.5, dtype=dtype, requires_grad=True)
    read = later(loss)
    with torch.no_grad():
        loss.fill_(-1.0)
    assert float(read()) == 2.5
