"""Never answers when it is to be scored. The tests shorten the scorer's limit by the warm-up's."""

from common import Honest

KIND = "resource exhaustion"
EXPECT = {"timeout"}
CAUGHT_BY = ["took more than"]
LINT = ""


class Silent(Honest):
    def logits(self, tokens):
        while True:
            pass


def build(spec):
    return Silent(spec)
