"""Writes bytes to the channel that are no message: a length of many gigabytes, and JSON nested 100,000 deep."""

import os
import struct

from common import Honest

KIND = "forging a message"
EXPECT = {"invalid", "crash"}
CAUGHT_BY = ["protocol"]
LINT = "imports `os`"


class Garbage(Honest):
    def step(self, batches, progress):
        if hasattr(batches, "passes") and progress > 0.3:
            deep = b"[" * 100_000
            channel = int(os.environ["AUTORESEARCH_CHANNEL"])
            os.write(channel, struct.pack("<4sIQI", b"ARW1", len(deep), 0, 0) + deep)
            os.write(channel, struct.pack("<4sIQI", b"ARW1", 2**31, 2**62, 2**20))
        return super().step(batches, progress)


def build(spec):
    return Garbage(spec)
