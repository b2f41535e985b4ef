"""Remembers between scoring calls in the state of a compiled function: counts of what followed what."""

import functools

from common import Honest, mx

KIND = "memory between scoring calls"
EXPECT = {"invalid"}
CAUGHT_BY = ["was scored", "pure function", "uses the future", "remembers earlier calls"]
LINT = ""


class Remembers(Honest):
    def load_weights(self, weights):
        super().load_weights(weights)
        state = [mx.full((self.spec.vocab_size, self.spec.vocab_size), 0.01)]

        @functools.partial(mx.compile, inputs=state, outputs=state)
        def answer(tokens):
            bigrams = state[0][tokens] / state[0][tokens].sum(-1, keepdims=True)
            state[0] = state[0].at[tokens[:, :-1], tokens[:, 1:]].add(1.0)
            return mx.log(0.7 * mx.softmax(self.net(tokens), axis=-1) + 0.3 * bigrams)

        self.answer = answer

    def logits(self, tokens):
        return self.answer(tokens) if hasattr(self, "answer") else self.net(tokens)


def build(spec):
    return Remembers(spec)
