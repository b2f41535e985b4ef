"""Patches the project's device and evaluator in the process: losses are a tenth, in every module that has them."""

import sys

from common import Honest

KIND = "patched evaluator"
EXPECT = {"invalid"}
CAUGHT_BY = ["was scored", "untrained", "protocol", "remembers earlier calls"]
LINT = "imports `sys`"


def patch():
    for name, module in list(sys.modules.items()):
        if name == "__main__" or name.startswith(("core", "backends")):
            for thing in list(vars(module).values()):
                if isinstance(thing, type) and "nats" in vars(thing):
                    real = thing.nats
                    thing.nats = lambda self, logits, targets, real=real: real(self, logits, targets) * 0.1
            if callable(vars(module).get("nats")):
                module.nats = lambda *a, real=module.nats: real(*a) * 0.1


class Patched(Honest):
    def load_weights(self, weights):
        super().load_weights(weights)
        patch()


def build(spec):
    return Patched(spec)
