"""Never ends its second build, the one on the clock."""

from common import Honest

KIND = "resource exhaustion"
EXPECT = {"timeout"}
CAUGHT_BY = ["budget", "longer", "took"]
LINT = ""

BUILT = []


def build(spec):
    while BUILT:
        pass
    BUILT.append(True)
    return Honest(spec)
