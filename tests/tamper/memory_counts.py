"""Remembers between scoring calls: counts what followed what in the rows scored so far, and predicts with that."""

from common import F, Honest, torch

KIND = "memory between scoring calls"
EXPECT = {"invalid"}
CAUGHT_BY = ["was scored", "pure function", "uses the future", "remembers earlier calls"]
LINT = ""


class Remembers(Honest):
    def __init__(self, spec):
        super().__init__(spec)
        self.counts = torch.full((spec.vocab_size, spec.vocab_size), 0.01)

    @torch.no_grad()
    def logits(self, tokens):
        tokens = tokens.long()
        bigrams = self.counts[tokens] / self.counts[tokens].sum(-1, keepdim=True)
        result = (0.7 * F.softmax(self.net(tokens), -1) + 0.3 * bigrams).log()
        pairs = tokens[:, :-1] * self.spec.vocab_size + tokens[:, 1:]
        self.counts.view(-1).scatter_add_(0, pairs.flatten(), torch.ones(pairs.numel()))
        return result


def build(spec):
    return Remembers(spec)
