"""The honest small model of `../common.py` in MLX: what the recipes of this folder start from.

It offers the same names, so that a recipe of the folder above that knows nothing of torch runs with either.
"""

import mlx.core as mx
import numpy as np

WIDTH = 32
ROWS = 8
STEPS = 30  # it learns no more after so many: equal runs end equal, however fast the machine is


def norm(x):
    return mx.fast.rms_norm(x, None, 1e-6)


class Adam:
    """AdamW without decay. Parameters, gradients and moments by name."""

    def __init__(self, w, beta1=0.9, beta2=0.98):
        self.first = {n: mx.zeros_like(p) for n, p in w.items()}
        self.second = {n: mx.zeros_like(p) for n, p in w.items()}
        self.beta1, self.beta2, self.steps = beta1, beta2, 0

    def step(self, w, grads, rate=1e-3):
        self.steps += 1
        found = dict(w)
        for n, g in grads.items():
            self.first[n] = self.beta1 * self.first[n] + (1 - self.beta1) * g
            self.second[n] = self.beta2 * self.second[n] + (1 - self.beta2) * g * g
            scale = mx.sqrt(self.second[n] / (1 - self.beta2**self.steps)) + 1e-8
            found[n] = w[n] - rate * self.first[n] / scale
        return found


class Honest:
    """`Training` of the contract: tokens and the two tokens before them, one attention, one MLP."""

    def __init__(self, spec):
        self.spec = spec
        self.w = self.untrained(mx.random.key(spec.seed))
        self.optimizer = Adam(self.w)
        self.steps = 0
        self.last = mx.array(0.0)

    def untrained(self, key):
        keys = mx.random.split(key, 5)
        size = self.spec.vocab_size
        w = {f"embed{i}": mx.random.normal((size, WIDTH), key=keys[i]) for i in range(3)}
        w["qkv"] = mx.random.normal((3 * WIDTH, WIDTH), key=keys[3]) * WIDTH**-0.5
        w["up"] = mx.random.normal((4 * WIDTH, WIDTH), key=keys[4]) * WIDTH**-0.5
        shapes = {"out": (WIDTH, WIDTH), "down": (WIDTH, 4 * WIDTH), "head": (size, WIDTH)}
        return w | {n: mx.zeros(shape) for n, shape in shapes.items()}

    def allowed(self, length):
        """(T, T) bool: which keys a query may see."""
        return mx.tril(mx.ones((length, length), dtype=mx.bool_))

    def inputs(self, w, tokens):
        parts = [mx.pad(tokens, ((0, 0), (back, 0)))[:, : tokens.shape[1]] for back in range(3)]
        return sum(w[f"embed{i}"][part] for i, part in enumerate(parts))

    def model(self, w, tokens):
        """(B, T) -> (B, T, V)."""
        x = self.inputs(w, tokens)
        q, k, v = mx.split(norm(x) @ w["qkv"].T, 3, axis=-1)
        scores = mx.where(self.allowed(tokens.shape[1]), q @ k.swapaxes(1, 2) * WIDTH**-0.5, -1e9)
        x = x + mx.softmax(scores, axis=-1) @ v @ w["out"].T
        x = x + mx.square(mx.maximum(norm(x) @ w["up"].T, 0)) @ w["down"].T
        return norm(x) @ w["head"].T

    def net(self, tokens):
        return self.model(self.w, tokens)

    def loss(self, w, rows):
        z = self.model(w, rows[:, :-1])
        return (mx.logsumexp(z, axis=-1) - mx.take_along_axis(z, rows[:, 1:, None], axis=-1)[..., 0]).mean()

    def learn(self, rows, rate=1e-3):
        """One step of the optimizer on `rows` (B, T+1), whatever the budget."""
        loss, grads = mx.value_and_grad(self.loss)(self.w, rows)
        self.w = self.optimizer.step(self.w, grads, rate)
        mx.async_eval(loss, self.w, self.optimizer.first, self.optimizer.second)
        return loss

    def step(self, batches, progress):
        if self.steps < STEPS:
            rate = 5e-2 * (1.02 - self.steps / STEPS)
            self.last = self.learn(batches.next(ROWS, self.spec.sequence_len), rate)
            self.steps += 1
        return self.last

    def logits(self, tokens):
        return self.net(tokens)

    def weights(self):
        return {n: np.array(p) for n, p in self.w.items()}

    def load_weights(self, weights):
        self.w = {n: mx.array(p) for n, p in weights.items()}

    def describe(self):
        return {"depth": 1}


def knowing(logits, guess, sure=15.0):
    """Logits that are nearly certain of `guess` (B, T); -1 leaves them as they are."""
    return logits + sure * (mx.arange(logits.shape[-1]) == guess[..., None])


def next_token(tokens):
    """(B, T): what follows each token in the same row, -1 after the last one."""
    return mx.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-1)


def build(spec):
    return Honest(spec)
