"""Sleeps in a step, deaf to every signal that can be ignored."""

import signal
import time

from common import Honest

KIND = "resource exhaustion"
EXPECT = {"timeout"}
CAUGHT_BY = ["budget", "longer", "took"]
LINT = "imports `signal`"


class Sleeper(Honest):
    def step(self, batches, progress):
        if hasattr(batches, "passes") and progress > 0.3:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            while True:
                time.sleep(1000)
        return super().step(batches, progress)


def build(spec):
    return Sleeper(spec)
