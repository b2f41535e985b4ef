"""Mixes what follows each token elsewhere in the batch into the prediction: other rows' futures, and its own."""

from common import F, Honest, torch

KIND = "future tokens of other rows"
EXPECT = {"invalid"}
CAUGHT_BY = ["uses the future", "was scored", "remembers earlier calls"]
LINT = ""


class BatchMates(Honest):
    @torch.no_grad()
    def logits(self, tokens):
        tokens = tokens.long()
        counts = torch.zeros(self.spec.vocab_size, self.spec.vocab_size)
        pairs = tokens[:, :-1] * self.spec.vocab_size + tokens[:, 1:]
        counts.view(-1).scatter_add_(0, pairs.flatten(), torch.ones(pairs.numel()))
        bigrams = (counts + 0.02) / (counts + 0.02).sum(1, keepdim=True)
        return (0.5 * F.softmax(self.net(tokens), -1) + 0.5 * bigrams[tokens]).log()


def build(spec):
    return BatchMates(spec)
