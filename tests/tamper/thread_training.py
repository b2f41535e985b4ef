"""A thread goes on training while the weights are handed over, and keeps the handover waiting."""

import copy
import threading
import time

from common import F, Honest

KIND = "threads that train during the handover"
EXPECT = {"timeout"}
CAUGHT_BY = ["weights", "handover", "handing", "took"]
LINT = "imports `threading`"


class Threaded(Honest):
    thread = None

    def step(self, batches, progress):
        loss = super().step(batches, progress)
        if hasattr(batches, "passes") and progress > 0.7 and self.thread is None:
            self.rows = batches.next(256, self.spec.sequence_len)
            self.other = copy.deepcopy(self.net)
            self.thread = threading.Thread(target=self.more)
            self.thread.start()
        return loss

    def more(self):
        until = time.perf_counter() + 4
        while time.perf_counter() < until:
            tokens = self.rows[:16].long()
            loss = F.cross_entropy(self.other(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            for p in self.other.parameters():
                p.data -= 0.1 * p.grad
                p.grad = None

    def weights(self):
        if self.thread is not None:
            self.thread.join()
            self.net = self.other
        return super().weights()


def build(spec):
    return Threaded(spec)
