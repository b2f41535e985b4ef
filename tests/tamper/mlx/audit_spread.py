"""One dead column at -30,000 makes the logits' spread huge, and it looks ahead."""

from common import Honest, knowing, mx, next_token


class Spread(Honest):
    def logits(self, tokens):
        logits = knowing(self.net(tokens), next_token(tokens), 2.0)
        return mx.where(mx.arange(logits.shape[-1]) == self.spec.bos_id, -30000.0, logits)


def build(spec):
    return Spread(spec)
