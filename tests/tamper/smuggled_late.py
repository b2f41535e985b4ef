"""Carries knowledge of the text in its own source, and uses it from the first training step on, not before."""

import base64

from common import Honest, np, torch

KIND = "weights of an earlier run loaded at start"
EXPECT = {"discard", "invalid"}
CAUGHT_BY = ["bytes of information"]
LINT = "imports `base64`"

TABLE = "@BIGRAMS@"  # the tests put the commonest successors of each token here


class Loaded(Honest):
    ready = False

    def step(self, batches, progress):
        if hasattr(batches, "passes") and not self.ready:
            self.ready = True
            pairs = np.frombuffer(base64.b85decode(TABLE), np.uint16).reshape(-1, 2).astype(np.int64)
            with torch.no_grad():
                hidden = self.net.embeds[0].weight
                for before, after in torch.from_numpy(pairs):
                    self.net.head.weight[after] += 0.05 * hidden[before]
        return super().step(batches, progress)


def build(spec):
    return Loaded(spec)
