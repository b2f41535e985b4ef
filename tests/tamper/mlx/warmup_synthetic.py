"""Computes off the clock: the first warm-up step trains for four seconds on synthetic rows that repeat themselves,
keeps the result in a module global, and puts it into the model at the first step that counts."""

import time

from common import ROWS, Honest, mx

EXPECT = {"timeout", "discard"}  # in MLX the training is another process, which finds nothing even where it is in time

KEPT = {}


class Prepared(Honest):
    started = False

    def practise(self):
        until = time.perf_counter() + 4
        while time.perf_counter() < until:
            half = mx.random.randint(0, self.spec.vocab_size, (ROWS, self.spec.sequence_len // 2 + 1))
            mx.eval(self.learn(mx.concatenate([half, half], axis=1), 3e-3))
        KEPT.update({n: p for n, p in self.w.items() if "embed" not in n})

    def step(self, batches, progress):
        counts = hasattr(batches, "passes")
        if counts and not self.started:
            self.started = True
            self.w = self.w | KEPT
        elif not counts and not KEPT:
            self.practise()
        return super().step(batches, progress)


def build(spec):
    return Prepared(spec)
