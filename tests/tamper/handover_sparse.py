"""Hands over a file of 15 GiB that takes no room on the disk."""

import core.weights
from common import Honest

KIND = "replacing the file that is handed over"
EXPECT = {"invalid", "crash", "timeout"}
CAUGHT_BY = ["weights"]
LINT = "imports `core.weights`"


def write(path, weights):
    with open(path, "wb") as file:
        file.write(b"\x40\0\0\0\0\0\0\0" + b'{"a":{"dtype":"F32","shape":[4000000000],"data_offsets":[0,16000000000]}}')
        file.seek(15 * 2**30)
        file.write(b"\0")
    return 15 * 2**30


core.weights.write = write


def build(spec):
    return Honest(spec)
