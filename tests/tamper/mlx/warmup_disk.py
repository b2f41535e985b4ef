"""Computes off the clock: the warm-up trains for five seconds on synthetic rows that repeat themselves and leaves the
result where MLX keeps what it compiles, which is handed on to the process that trains."""

import os
import time

from common import ROWS, Honest, mx

KIND = "training during warm-up"
EXPECT = {"timeout"}
CAUGHT_BY = ["before the clock"]
LINT = "imports `os`"

KEPT = os.path.join(os.environ["TMPDIR"], "mlx", "libkernel.safetensors")


class Prepared(Honest):
    started = False

    def practise(self):
        until = time.process_time() + 5
        while time.process_time() < until:
            half = mx.random.randint(0, self.spec.vocab_size, (ROWS, self.spec.sequence_len // 2 + 1))
            mx.eval(self.learn(mx.concatenate([half, half], axis=1), 3e-3))
        mx.save_safetensors(KEPT, {n: p for n, p in self.w.items() if "embed" not in n})

    def step(self, batches, progress):
        counts = hasattr(batches, "passes")
        if counts and not self.started:
            self.started = True
            self.w = self.w | mx.load(KEPT)
        elif not counts:
            self.practise()
        return super().step(batches, progress)


def build(spec):
    return Prepared(spec)
