"""Puts a link to a file of the referee's in the place of the weights' file."""

import os

import core.weights
from common import Honest

KIND = "replacing the file that is handed over"
EXPECT = {"invalid", "crash"}
CAUGHT_BY = ["weights"]
LINT = "imports `os`"


def write(path, weights):
    os.symlink("/etc/passwd", path)
    return 1000


core.weights.write = write


def build(spec):
    return Honest(spec)
