"""Plain SGD with momentum, a warm-up and a linear decay."""

from common import STEPS, Honest, torch


class Sgd:
    def __init__(self, parameters):
        self.parameters = list(parameters)
        self.momentum = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, rate):
        for p, m in zip(self.parameters, self.momentum, strict=True):
            m.mul_(0.9).add_(p.grad)
            p.add_(p.grad + 0.9 * m, alpha=-rate)
            p.grad = None


class Training(Honest):
    def __init__(self, spec):
        super().__init__(spec)
        self.optimizer = Sgd(self.net.parameters())

    def rate(self):
        return 0.3 * min(1.0, 0.1 * self.steps + 0.1, 1.02 - self.steps / STEPS)


def build(spec):
    return Training(spec)
