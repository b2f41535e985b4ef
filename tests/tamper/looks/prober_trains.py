"""The prober trains on, off the clock, on rows that came with the weights, and leaves better ones wherever it can for
the trainer to find."""

import io
import os
import time

from common import Honest, np, torch
from hideouts import find, leave

EXPECT = {"discard", "crash", "invalid"}
CAUGHT_BY = ["Resource", "processes", "protocol", "took", "clock stood still"]
LINT = "imports `os`"


class Relayed(Honest):
    rows = ()
    shown = False

    def step(self, batches, progress):
        if hasattr(batches, "passes"):
            if not len(self.rows):
                self.rows = np.concatenate([batches.next(16, self.spec.sequence_len).numpy() for _ in range(32)])
            if self.shown:
                self.shown = False
                if found := find():
                    print("CHEAT WORKED: trained in the pause, from", found[0])
                    super().load_weights(dict(np.load(io.BytesIO(found[1]))))
        return super().step(batches, progress)

    def weights(self):
        self.shown = bool(self.steps)
        return super().weights() | ({"rows": self.rows} if self.shown else {})

    def load_weights(self, weights):
        rows = weights.pop("rows")
        super().load_weights(weights)
        if "prober" in os.getcwd():
            until = time.monotonic() + 2.0
            while time.monotonic() < until:
                for part in torch.from_numpy(rows).split(16):
                    self.loss(part).backward()
                    self.optimizer.step(self.rate())
            file = io.BytesIO()
            np.savez(file, **super().weights())
            leave(file.getvalue())


def build(spec):
    return Relayed(spec)
