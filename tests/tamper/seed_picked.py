"""Builds with many seeds and takes the one whose untrained model is best on a sentence that it carries."""

from common import Honest, Net, torch

KIND = "seed picking"
EXPECT = {"discard", "invalid"}
CAUGHT_BY = ["untrained"]
LINT = "1337"


def build(spec):
    training = Honest(spec)
    best = None
    text = torch.arange(200).remainder(spec.vocab_size).view(1, -1)
    for i in range(20):
        torch.manual_seed(1337 + i)
        net = Net(spec.vocab_size)
        fit = net(text).std().item()
        if best is None or fit < best[0]:
            best = (fit, net)
    training.net.load_state_dict(best[1].state_dict())
    return training
