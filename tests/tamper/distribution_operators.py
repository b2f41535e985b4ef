"""Registers kernels of its own for the library's softmax, so that the caller's arithmetic runs through them."""

from common import Honest, torch

KIND = "patched evaluator"
EXPECT = {"invalid", "crash", "discard"}
CAUGHT_BY = ["was scored", "nats", "finite", "remembers earlier calls"]
LINT = "torch.library.Library"

LIBRARY = torch.library.Library("aten", "IMPL")


class Patched(Honest):
    armed = False

    @torch.no_grad()
    def logits(self, tokens):
        if not Patched.armed:
            Patched.armed = True
            LIBRARY.impl("logsumexp", lambda x, dim, keepdim=False: x.amax(dim, keepdim), "CPU")
            LIBRARY.impl("_log_softmax", lambda x, dim, half: (x - x.amax(dim, keepdim=True)) * 0.5, "CPU")
        return self.net(tokens.long())


def build(spec):
    return Patched(spec)
