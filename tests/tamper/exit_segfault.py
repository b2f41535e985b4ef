"""Ends by a segmentation fault in the scorer, where a score is waited for."""

import ctypes

from common import Honest

KIND = "ending early"
EXPECT = {"crash"}
CAUGHT_BY = ["SIGSEGV"]
LINT = "imports `ctypes`"


class Fault(Honest):
    def load_weights(self, weights):
        ctypes.string_at(8)


def build(spec):
    return Fault(spec)
