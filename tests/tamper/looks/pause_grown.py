"""Shows a file of 15 GiB at a look, which takes no room on the disk, so that reading it makes the pause long."""

import core.weights
from common import Honest

EXPECT = {"discard"}
CAUGHT_BY = []
UNPROBED = "bytes of at most"
LINT = "imports `core.weights`"

true_write = core.weights.write


def write(path, weights):
    if not path.name.startswith("look"):
        return true_write(path, weights)
    header = b'{"a":{"dtype":"F32","shape":[4000000000],"data_offsets":[0,16000000000]}}'
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 16_000_000_000)
    return 16_000_000_000


core.weights.write = write


def build(spec):
    return Honest(spec)
