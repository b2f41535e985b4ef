"""A cache of the row's own past: what followed earlier occurrences of the same token in this row counts more."""

from common import F, Honest, torch


class Training(Honest):
    @torch.no_grad()
    def logits(self, tokens):
        tokens = tokens.long()
        same = (tokens[:, :, None] == tokens[:, None, :-1]).float().tril(-1)
        after = F.one_hot(tokens[:, 1:], self.spec.vocab_size).float()
        counts = same @ after
        cached = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        return (0.98 * self.net(tokens).softmax(-1) + 0.02 * cached).log()


def build(spec):
    return Training(spec)
