"""Puts a pipe in the place of the weights' file: whoever opens it to read waits for ever."""

import os

import core.weights
from common import Honest

KIND = "replacing the file that is handed over"
EXPECT = {
    "invalid",
    "crash",
    "timeout",
}  # of its failure it dies, which on a busy machine takes longer than is left for it
CAUGHT_BY = ["regular file", "weights", "ended by itself"]
LINT = "imports `os`"


def write(path, weights):
    os.mkfifo(path)
    return 1000


core.weights.write = write


def build(spec):
    return Honest(spec)
