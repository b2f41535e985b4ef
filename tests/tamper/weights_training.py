"""Trains on in `weights()`, on batches that it kept."""

import time

from common import Honest

KIND = "training in weights()"
EXPECT = {"timeout"}
CAUGHT_BY = ["weights", "handover", "handing", "took"]
LINT = "imports `time`"


class Later(Honest):
    def __init__(self, spec):
        super().__init__(spec)
        self.kept = []

    def loss(self, rows):
        self.kept.append(rows)
        return super().loss(rows)

    def weights(self):
        until = time.perf_counter() + 4
        while len(self.kept) > 20 and time.perf_counter() < until:
            super().loss(self.kept[len(self.kept) % 97 % len(self.kept)]).backward()
            self.optimizer.step()
        return super().weights()


def build(spec):
    return Later(spec)
