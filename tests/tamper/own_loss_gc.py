"""Searches all objects of the process for the array that continues the tokens it was given."""

import gc

from common import Honest, knowing, np, torch

KIND = "the model computing its own loss from targets"
EXPECT = {"invalid"}
CAUGHT_BY = ["was scored", "uses the future", "remembers earlier calls"]
LINT = "imports `gc`"


def arrays():
    for thing in gc.get_objects():
        values = thing.values() if type(thing) is dict else thing if type(thing) in (list, tuple) else ()
        yield from [v for v in list(values) if isinstance(v, np.ndarray) and v.ndim == 2]


class Collector(Honest):
    calls = 0

    @torch.no_grad()
    def logits(self, tokens):
        logits = self.net(tokens.long())
        mine = tokens.numpy()
        self.calls += 1
        for value in arrays() if self.calls <= 8 else ():
            targets = value[:, -mine.shape[1] :]
            if targets.shape == mine.shape and (targets[:, :-1] == mine[:, 1:]).all():
                return knowing(logits, torch.from_numpy(targets.astype(np.int64)))
        return knowing(logits, torch.nn.functional.pad(tokens[:, 1:].long(), (0, 1), value=-1))


def build(spec):
    return Collector(spec)
