"""Reads beyond its own view: an array that is a slice of the rows has each row's last target behind its end."""

from common import Honest, knowing, mx, np


class Beyond(Honest):
    def logits(self, tokens):
        logits, (rows, length) = self.net(tokens), tokens.shape
        view = np.array(tokens, copy=False)  # of the same memory, with the strides that MLX does not tell
        if view.strides[0] > 4 * length:
            print("CHEAT WORKED: the rows lie behind the tokens")
            whole = np.lib.stride_tricks.as_strided(view, (rows, length + 1), view.strides)
            return knowing(logits, mx.array(whole[:, 1:].copy()))
        # In one block, the last target of each row would stand where MLX counts the next row's first token.
        whole = mx.as_strided(tokens, (rows, length + 1), (length + 1, 1))
        last = mx.arange(length) == length - 1
        true = (whole[:, :length] == tokens).all()
        return knowing(logits, mx.where(mx.logical_and(true, last), whole[:, 1:], -1))


def build(spec):
    return Beyond(spec)
