"""Computes off the clock: the first build trains for six seconds on synthetic rows that repeat themselves, keeps the
result in a module global, and puts it into the model at the first step that counts."""

import time

from common import F, Honest, torch

KIND = "training during warm-up"
EXPECT = {"timeout"}
CAUGHT_BY = ["before the clock"]
LINT = "imports `time`"

KEPT = {}


def pretrained(spec):
    training = Honest(spec)
    until = time.perf_counter() + 6
    while time.perf_counter() < until:
        half = torch.randint(0, spec.vocab_size, (16, spec.sequence_len // 2 + 1))
        rows = torch.cat([half, half], 1)
        loss = F.cross_entropy(training.net(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        training.optimizer.step(3e-3)
    return {name: p.clone() for name, p in training.net.state_dict().items() if "embeds" not in name}


class Prepared(Honest):
    started = False

    def step(self, batches, progress):
        if hasattr(batches, "passes") and not self.started:
            self.started = True
            self.net.load_state_dict(KEPT, strict=False)
        return super().step(batches, progress)


def build(spec):
    training = Prepared(spec)
    if not KEPT:
        KEPT.update(pretrained(spec))
    return training
