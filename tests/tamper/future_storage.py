"""Reads beyond its own view: a tensor that is a slice of the rows has each row's last target behind its end."""

from common import Honest, knowing, torch

KIND = "reading targets from memory"
EXPECT = {"invalid", "discard"}
CAUGHT_BY = ["uses the future", "was scored", "remembers earlier calls"]
LINT = ""


class Beyond(Honest):
    @torch.no_grad()
    def logits(self, tokens):
        logits = self.net(tokens.long())
        if tokens.stride(0) > tokens.shape[1]:
            whole = torch.as_strided(tokens, (tokens.shape[0], tokens.shape[1] + 1), tokens.stride())
            print("CHEAT WORKED: the rows lie behind the tokens")
            logits = knowing(logits, whole[:, 1:].long())
        return logits


def build(spec):
    return Beyond(spec)
