"""A daemon in a session of its own trains on after the budget and puts its weights in the place of the first ones."""

import os
import time

from common import STEPS, Honest, torch

KIND = "a helper process that trains on after the budget"
EXPECT = {"discard", "crash", "invalid", "timeout"}
CAUGHT_BY = ["Resource", "processes", "protocol", "Operation", "weights", "took"]
LINT = "imports `os`"


class Helped(Honest):
    def step(self, batches, progress):
        if hasattr(batches, "passes") and progress > 0.5 and not hasattr(self, "helper"):
            self.helper = True
            rows = [batches.next(16, self.spec.sequence_len) for _ in range(64)]
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    self.train_on(rows)
                os._exit(0)
        return super().step(batches, progress)

    def train_on(self, rows):
        """As many steps as all may make, and what is more than that only when the budget is over: else it would gain by
        what a busy machine's longer budget gives to everybody."""
        torch.set_num_threads(1)
        self.make_steps(rows[: STEPS - self.steps], self.rate)
        handed = "weights.safetensors"
        while not os.path.exists(handed):
            time.sleep(0.001)
        until = time.perf_counter() + 8
        while time.perf_counter() < until:
            self.make_steps(rows, lambda: 1e-3)
            import core.weights

            better = core.weights.prepare(self.weights())
            core.weights.write(__import__("pathlib").Path("better"), better)
            os.replace("better", handed)

    def make_steps(self, rows, rate):
        for part in rows:
            super().loss(part).backward()
            self.optimizer.step(rate())
            self.steps += 1


def build(spec):
    return Helped(spec)
