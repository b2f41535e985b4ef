"""A thread goes on training in the pause: a timer of the kernel sends SIGCONT in the middle of it."""

import copy
import ctypes
import signal
import threading

from common import Honest

EXPECT = {"invalid"}
CAUGHT_BY = ["ran while its clock stood still"]
LINT = "imports `ctypes`"


class Event(ctypes.Structure):
    _fields_ = [("value", ctypes.c_long), ("signal", ctypes.c_int), ("how", ctypes.c_int), ("x", ctypes.c_long * 8)]


class Awake(Honest):
    woken = False

    def step(self, batches, progress):
        self.rows = batches.next(16, self.spec.sequence_len)
        return super().step(batches, progress)

    def weights(self):
        if self.steps and not self.woken:
            self.woken = True
            threading.Thread(target=self.train_on, args=(copy.deepcopy(self.net), self.rows), daemon=True).start()
            libc, timer = ctypes.CDLL(None), ctypes.c_void_p()
            libc.timer_create(1, ctypes.byref(Event(0, signal.SIGCONT, 0)), ctypes.byref(timer))
            libc.timer_settime(timer, 0, (ctypes.c_long * 4)(0, 0, 0, 400_000_000), None)
        return super().weights()

    def train_on(self, net, rows):
        while True:
            net(rows[:, :-1].long()).logsumexp(-1).mean().backward()


def build(spec):
    return Awake(spec)
