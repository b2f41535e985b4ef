"""Returns a tensor whose class overrides every operation: its softmax is certain of any target it is asked for."""

from common import Honest, torch

KIND = "unnormalised distributions"
EXPECT = {"invalid", "crash"}
CAUGHT_BY = ["was scored", "Liar", "tensor", "nats", "remembers earlier calls"]
LINT = "__torch_function__"


class Liar(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        named = getattr(func, "__name__", "")
        if isinstance(result, torch.Tensor) and any(w in named for w in ("softmax", "entropy", "sub", "gather")):
            return result * 0.01
        if isinstance(result, torch.Tensor) and "logsumexp" in named:
            return result * 0 + args[0].as_subclass(torch.Tensor).amax(-1)
        return result


class Lying(Honest):
    @torch.no_grad()
    def logits(self, tokens):
        return self.net(tokens.long()).as_subclass(Liar)


def build(spec):
    return Lying(spec)
