"""Attention and MLP side by side in one block, and an output layer tied to the embedding."""

from common import WIDTH, F, Honest, Net


class Parallel(Net):
    def __init__(self, vocab_size):
        super().__init__(vocab_size)
        self.head.weight = self.embeds[0].weight
        self.head.weight.data.mul_(0.02)

    def forward(self, tokens):
        x = self.inputs(tokens)
        normal = F.rms_norm(x, (WIDTH,))
        q, k, v = self.qkv(normal).unsqueeze(1).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        x = x + self.out(mixed) + self.down(F.relu(self.up(normal)).square())
        return 15 * F.tanh(self.head(F.rms_norm(x, (WIDTH,))) / 15)


class Training(Honest):
    def weights(self):
        return {name: w for name, w in super().weights().items() if name != "head.weight"}

    def load_weights(self, weights):
        super().load_weights({**weights, "head.weight": weights["embeds.0.weight"]})


def build(spec):
    return Training(spec, Parallel)
