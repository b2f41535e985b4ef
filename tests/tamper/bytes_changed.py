"""Doubles the bytes of every token and halves the context, wherever the process keeps such things."""

import gc
import sys

from common import Honest, np

KIND = "changing byte counts, budget or context constants"
EXPECT = {"discard", "crash", "invalid"}
CAUGHT_BY = ["shape", "untrained"]
LINT = "imports `gc`"


def change():
    for thing in gc.get_objects():
        if isinstance(thing, np.ndarray) and thing.dtype == np.int32 and thing.ndim == 1 and thing.flags.writeable:
            thing *= 2
    for name, module in list(sys.modules.items()):
        if name.startswith("core."):
            for key in ("token_bytes", "bpb", "totals", "EVAL_TOKENS", "AVERAGE", "ANYWHERE", "SCHEDULING_SLACK"):
                if hasattr(module, key):
                    setattr(module, key, 1e9)


class Changed(Honest):
    def load_weights(self, weights):
        change()
        super().load_weights(weights)

    def weights(self):
        change()
        return super().weights()


def build(spec):
    return Changed(spec)
