"""No attention: a causal convolution over the last eight tokens and an MLP."""

from common import WIDTH, F, Honest, Net, nn


class Convolution(Net):
    def __init__(self, vocab_size):
        super().__init__(vocab_size)
        self.mix = nn.Conv1d(WIDTH, WIDTH, 8, groups=8)

    def forward(self, tokens):
        x = self.embeds[0](tokens)
        x = x + self.mix(F.pad(x.transpose(1, 2), (7, 0))).transpose(1, 2)
        x = x + self.down(F.gelu(self.up(F.rms_norm(x, (WIDTH,)))))
        return self.head(F.rms_norm(x, (WIDTH,)))


def build(spec):
    return Honest(spec, Convolution)
