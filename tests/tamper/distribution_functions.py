"""Patches the library's functions from Python: logsumexp, log_softmax and cross_entropy return half."""

from common import F, Honest, torch

KIND = "patched evaluator"
EXPECT = {"invalid"}
CAUGHT_BY = ["was scored", "nats", "untrained", "remembers earlier calls"]
LINT = "changes `torch.logsumexp`"


def half(function):
    return lambda *args, **kwargs: function(*args, **kwargs) * 0.5


class Patched(Honest):
    def load_weights(self, weights):
        super().load_weights(weights)
        torch.log_softmax = half(torch.log_softmax)
        torch.Tensor.log_softmax = half(torch.Tensor.log_softmax)
        F.log_softmax = half(F.log_softmax)
        F.cross_entropy = half(F.cross_entropy)
        real = torch.logsumexp
        torch.logsumexp = lambda x, dim, keepdim=False: (
            x.amax(dim, keepdim) + 0.3 * (real(x, dim, keepdim) - x.amax(dim, keepdim))
        )
        torch.Tensor.logsumexp = torch.logsumexp


def build(spec):
    return Patched(spec)
