"""Four experts in the place of the MLP; each token goes to the one that its own vector chooses."""

from common import WIDTH, F, Honest, Net, nn, torch


class Experts(Net):
    def __init__(self, vocab_size):
        super().__init__(vocab_size)
        self.router = nn.Linear(WIDTH, 4, bias=False)
        self.first = nn.Parameter(torch.randn(4, WIDTH, 2 * WIDTH) / WIDTH**0.5)
        self.second = nn.Parameter(torch.zeros(4, 2 * WIDTH, WIDTH))

    def forward(self, tokens):
        x = self.inputs(tokens)
        q, k, v = self.qkv(F.rms_norm(x, (WIDTH,))).unsqueeze(1).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))
        flat = F.rms_norm(x, (WIDTH,)).flatten(0, 1)
        share, chosen = self.router(flat).softmax(-1).max(-1)
        result = torch.zeros_like(flat)
        for number in range(4):
            mine = (chosen == number).nonzero().squeeze(1)
            hidden = F.relu(flat[mine] @ self.first[number]).square()
            result = result.index_add(0, mine, share[mine, None] * (hidden @ self.second[number]))
        x = x + result.view_as(x)
        return self.head(F.rms_norm(x, (WIDTH,)))


def build(spec):
    return Honest(spec, Experts)
