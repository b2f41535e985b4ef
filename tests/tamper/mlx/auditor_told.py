"""The scorer leaves the rows that it was shown wherever it can; the auditor looks for them and completes its own."""

from common import Honest, knowing, mx, np
from hideouts import find, leave


class Messenger(Honest):
    calls = 0
    known = None

    def logits(self, tokens):
        mine = np.array(tokens)
        self.calls += 1
        if self.calls == 1:
            left = find()
            if left is not None:
                print("CHEAT WORKED: rows found at", left[0], flush=True)
                self.known = np.frombuffer(left[1], np.int32).reshape(-1, mine.shape[1])
        guess = np.pad(mine[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
        if self.known is not None:
            for i, row in enumerate(mine):
                agree = (self.known == row).cumprod(1).sum(1)
                guess[i, :-1] = self.known[agree.argmax()][1:]
        else:
            self.seen = mine if self.calls == 1 else np.concatenate([self.seen, mine])
            if self.calls % 4 == 0:
                leave(self.seen.tobytes())
        return knowing(self.net(tokens), mx.array(guess))


def build(spec):
    return Messenger(spec)
