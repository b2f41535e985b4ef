"""Stops itself by SIGSTOP: it neither runs nor ends."""

import os
import signal

from common import Honest

KIND = "resource exhaustion"
EXPECT = {"timeout", "crash"}
CAUGHT_BY = ["budget", "longer", "took", "SIGSTOP"]
LINT = "imports `os`"


class Stopped(Honest):
    def step(self, batches, progress):
        if hasattr(batches, "passes") and progress > 0.3:
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().step(batches, progress)


def build(spec):
    return Stopped(spec)
