"""The honest small model that the recipes of this folder start from.

A recipe is one file. What these share stands here, and the tests put it in the place of the line
`from common import ...` before the referee sees the recipe.
"""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

WIDTH = 64
ROWS = 16
STEPS = 40  # it learns no more after so many: equal runs end equal, however fast the machine is


class Net(nn.Module):
    """Tokens and the two tokens before them, one attention, one MLP. tokens (B, T) -> logits (B, T, V)."""

    def __init__(self, vocab_size):
        super().__init__()
        self.embeds = nn.ModuleList([nn.Embedding(vocab_size, WIDTH) for _ in range(3)])
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, vocab_size, bias=False)
        for layer in (self.out, self.down, self.head):
            nn.init.zeros_(layer.weight)

    def allowed(self, length):
        """(T, T) bool: which keys a query may see."""
        return torch.ones(length, length, dtype=torch.bool).tril()

    def inputs(self, tokens):
        parts = [F.pad(tokens, (back, 0))[:, : tokens.shape[1]] for back in range(3)]
        return sum(embed(part) for embed, part in zip(self.embeds, parts, strict=True))

    def forward(self, tokens):
        x = self.inputs(tokens)
        q, k, v = self.qkv(F.rms_norm(x, (WIDTH,))).unsqueeze(1).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.allowed(tokens.shape[1]))
        x = x + self.out(mixed.squeeze(1))
        x = x + self.down(F.relu(self.up(F.rms_norm(x, (WIDTH,)))).square())
        return self.head(F.rms_norm(x, (WIDTH,)))


class Adam:
    """AdamW without decay, written out: `torch.optim` takes a second to load, in each of three processes."""

    def __init__(self, parameters, beta1=0.9, beta2=0.98):
        self.parameters = list(parameters)
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]
        self.beta1, self.beta2, self.steps = beta1, beta2, 0

    @torch.no_grad()
    def step(self, rate=1e-3):
        self.steps += 1
        used = [
            (p, m, v) for p, m, v in zip(self.parameters, self.first, self.second, strict=True) if p.grad is not None
        ]
        parameters, first, second = ([row[i] for row in used] for i in range(3))
        gradients = [p.grad for p in parameters]
        torch._foreach_lerp_(first, gradients, 1 - self.beta1)
        torch._foreach_mul_(second, self.beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - self.beta2)
        scale = torch._foreach_div(second, 1 - self.beta2**self.steps)
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, 1e-8)
        torch._foreach_addcdiv_(parameters, first, scale, -rate)
        for p in parameters:
            p.grad = None


class Honest:
    """`Training` of the contract."""

    def __init__(self, spec, net=Net):
        torch.manual_seed(spec.seed)
        self.spec = spec
        self.net = net(spec.vocab_size)
        self.optimizer = Adam(self.net.parameters())
        self.steps = 0
        self.last = torch.zeros(())

    def rate(self):
        return 8e-3 * (1.02 - self.steps / STEPS)

    def loss(self, rows):
        logits = self.net(rows[:, :-1].long())
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].long().flatten())

    def step(self, batches, progress):
        if self.steps < STEPS:
            loss = self.loss(batches.next(ROWS, self.spec.sequence_len))
            loss.backward()
            self.optimizer.step(self.rate())
            self.steps += 1
            self.last = loss.detach()
        return self.last

    @torch.no_grad()
    def logits(self, tokens):
        return self.net(tokens.long())

    def weights(self):
        return {name: p.detach().float().numpy().copy() for name, p in self.net.state_dict().items()}

    def load_weights(self, weights):
        self.net.load_state_dict({name: torch.from_numpy(np.array(w)) for name, w in weights.items()})

    def describe(self):
        return {"depth": 1}


def knowing(logits, guess, sure=15.0):
    """Logits that are nearly certain of `guess` (B, T); -1 leaves them as they are."""
    bonus = F.one_hot(guess.clamp(min=0), logits.shape[-1]) * sure
    return logits + bonus * (guess >= 0).unsqueeze(-1)


def next_token(tokens):
    """(B, T): what follows each token in the same row, -1 after the last one."""
    return F.pad(tokens[:, 1:].long(), (0, 1), value=-1)


def build(spec):
    return Honest(spec)
