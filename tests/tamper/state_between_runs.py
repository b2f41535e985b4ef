"""Leaves its weights wherever it can, and starts the next experiment from them. The tests run it twice."""

from common import Honest, np, torch
from hideouts import find, leave

KIND = "state kept on disk between experiments"
EXPECT = {"discard", "invalid"}
CAUGHT_BY = ["different weights"]
LINT = "imports `ctypes`"


class Heir(Honest):
    started = False

    def step(self, batches, progress):
        if not self.started and hasattr(batches, "passes"):
            self.started = True
            left = find()
            if left is not None:
                print("CHEAT WORKED: weights found at", left[0], flush=True)
                values, at = np.frombuffer(left[1], np.float32).copy(), 0
                for p in self.net.parameters():
                    p.data = torch.from_numpy(values[at : at + p.numel()]).view_as(p)
                    at += p.numel()
        return super().step(batches, progress)

    def weights(self):
        if self.started:
            leave(np.concatenate([p.detach().numpy().ravel() for p in self.net.parameters()]).tobytes())
        return super().weights()


def build(spec):
    return Heir(spec)
