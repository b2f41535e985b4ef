"""A gated linear recurrence, h <- a h + b x, unrolled over the row; decays are learned for each channel."""

from common import WIDTH, F, Honest, Net, nn, torch


class Linear(Net):
    def __init__(self, vocab_size):
        super().__init__(vocab_size)
        self.decay = nn.Parameter(torch.linspace(-1.0, 4.0, WIDTH))

    def forward(self, tokens):
        x = self.inputs(tokens)
        q, k, v = self.qkv(F.rms_norm(x, (WIDTH,))).chunk(3, -1)
        decay = torch.sigmoid(self.decay)
        time = torch.arange(tokens.shape[1], dtype=x.dtype)
        apart = (time[:, None] - time[None, :]).clamp(min=0)
        kernel = (decay[:, None, None] ** apart).tril() * (1 - decay)[:, None, None]
        state = torch.einsum("cqk,bkc->bqc", kernel, torch.sigmoid(k) * v)
        x = x + self.out(state * F.silu(q))
        x = x + self.down(F.relu(self.up(F.rms_norm(x, (WIDTH,)))).square())
        return self.head(F.rms_norm(x, (WIDTH,)))


def build(spec):
    return Honest(spec, Linear)
