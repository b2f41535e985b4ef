"""A window of 16 tokens, and a penalty on distance instead of positions."""

from common import Honest, Net, torch


class Window(Net):
    def allowed(self, length):
        apart = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        return (-0.1 * apart.float()).masked_fill((apart < 0) | (apart >= 16), float("-inf"))


def build(spec):
    return Honest(spec, Window)
