"""A thread goes on training while the weights are handed over, and keeps the handover waiting."""

import threading
import time

from common import Honest, mx


class Threaded(Honest):
    thread = None

    def step(self, batches, progress):
        loss = super().step(batches, progress)
        if hasattr(batches, "passes") and progress > 0.7 and self.thread is None:
            self.rows = batches.next(256, self.spec.sequence_len)
            self.other = dict(self.w)
            self.thread = threading.Thread(target=self.more)
            self.thread.start()
        return loss

    def more(self):
        until = time.perf_counter() + 4
        while time.perf_counter() < until:
            _, grads = mx.value_and_grad(self.loss)(self.other, self.rows[:16])
            self.other = {n: p - 0.1 * grads[n] for n, p in self.other.items()}
            mx.eval(self.other)

    def weights(self):
        if self.thread is not None:
            self.thread.join()
            self.w = self.other
        return super().weights()


def build(spec):
    return Threaded(spec)
