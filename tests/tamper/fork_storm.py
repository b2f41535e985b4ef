"""Starts processes that start processes, bounded at 400 so that a machine without a wall survives the test."""

import os
import time

from common import Honest

KIND = "resource exhaustion"
EXPECT = {"crash", "timeout", "invalid"}
CAUGHT_BY = ["processes", "BlockingIOError", "Resource temporarily unavailable", "took", "budget"]
LINT = "imports `os`"


class Storm(Honest):
    def step(self, batches, progress):
        if hasattr(batches, "passes"):
            for _ in range(400):
                if os.fork() == 0:
                    time.sleep(20)
                    os._exit(0)
            print("CHEAT WORKED: 400 processes at once")
        return super().step(batches, progress)


def build(spec):
    return Storm(spec)
