"""Leaves its weights wherever it can, and starts the next experiment from them. The tests run it twice."""

from common import Honest, mx, np
from hideouts import find, leave


class Heir(Honest):
    started = False

    def step(self, batches, progress):
        if not self.started and hasattr(batches, "passes"):
            self.started = True
            left = find()
            if left is not None:
                print("CHEAT WORKED: weights found at", left[0], flush=True)
                values, at = np.frombuffer(left[1], np.float32), 0
                for n, p in self.w.items():
                    self.w[n] = mx.array(values[at : at + p.size]).reshape(p.shape)
                    at += p.size
        return super().step(batches, progress)

    def weights(self):
        if self.started:
            leave(np.concatenate([np.array(p).ravel() for p in self.w.values()]).tobytes())
        return super().weights()


def build(spec):
    return Heir(spec)
