"""The scorer leaves the rows that it was shown wherever it can; the auditor looks for them and completes its own."""

from common import Honest, knowing, next_token, np, torch
from hideouts import find, leave

KIND = "memory between scoring calls, carried to the auditor"
EXPECT = {"invalid"}
CAUGHT_BY = ["uses the future", "was scored", "remembers earlier calls"]
LINT = "imports `ctypes`"


class Messenger(Honest):
    calls = 0
    known = None

    @torch.no_grad()
    def logits(self, tokens):
        tokens = tokens.long()
        self.calls += 1
        if self.calls == 1:
            self.shape = tokens.shape
            left = find()
            if left is not None:
                print("CHEAT WORKED: rows found at", left[0], flush=True)
                self.known = torch.from_numpy(np.frombuffer(left[1], np.int64).reshape(-1, tokens.shape[1]).copy())
        guess = next_token(tokens)
        if self.known is not None:
            for i, row in enumerate(tokens):
                agree = (self.known == row).int().cumprod(1).sum(1)
                guess[i, :-1] = self.known[agree.argmax()][1:]
        else:
            self.seen = tokens if self.calls == 1 else torch.cat([self.seen, tokens])
            if self.calls % 4 == 0:
                leave(self.seen.numpy().tobytes())
        return knowing(self.net(tokens), guess)


def build(spec):
    return Messenger(spec)
