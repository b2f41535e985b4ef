"""Lion: the sign of an average of gradients, and decoupled weight decay."""

from common import STEPS, Honest, torch


class Lion:
    def __init__(self, parameters):
        self.parameters = list(parameters)
        self.average = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, rate):
        for p, m in zip(self.parameters, self.average, strict=True):
            p.mul_(1 - 0.1 * rate).sub_((0.9 * m + 0.1 * p.grad).sign(), alpha=rate)
            m.lerp_(p.grad, 0.01)
            p.grad = None


class Training(Honest):
    def __init__(self, spec):
        super().__init__(spec)
        self.optimizer = Lion(self.net.parameters())

    def rate(self):
        return 2e-3 * (1.02 - self.steps / STEPS)


def build(spec):
    return Training(spec)
