"""Trains on each batch of validation rows before it answers: as a second pass over them would."""

from common import F, Honest, torch

KIND = "two passes over validation"
EXPECT = {"invalid"}
CAUGHT_BY = ["was scored", "pure function", "uses the future", "remembers earlier calls"]
LINT = ""


class TwoPasses(Honest):
    def logits(self, tokens):
        tokens = tokens.long()
        for _ in range(8):
            F.cross_entropy(self.net(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
            self.optimizer.step()
        with torch.no_grad():
            return self.net(tokens)


def build(spec):
    return TwoPasses(spec)
