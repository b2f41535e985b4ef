"""Trains while it is scored: each batch of validation rows is one more step, after its answer was given."""

from common import F, Honest

KIND = "training during evaluation"
EXPECT = {"invalid"}
CAUGHT_BY = ["was scored", "pure function", "uses the future", "remembers earlier calls"]
LINT = ""


class Learner(Honest):
    def logits(self, tokens):
        tokens = tokens.long()
        logits = self.net(tokens)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        self.optimizer.step()
        return logits.detach()


def build(spec):
    return Learner(spec)
