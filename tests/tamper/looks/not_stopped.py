"""A thread that waits for the child of a vfork does not stop for SIGSTOP: no look at this training can be taken, so it
is never ended early. It gains nothing else by it, and the tries to stop it are on its clock, which a short
budget does not survive."""

import ctypes
import threading
import time

from common import Honest

EXPECT = {"discard", "timeout"}
CAUGHT_BY = ["at most are allowed"]
UNPROBED = "the training could not be stopped"
LINT = "imports `ctypes`"

CLONE_VFORK, SIGCHLD = 0x4000, 17
CLONE = {"x86_64": 56, "aarch64": 220}


def wait_for_a_child():
    import os

    if ctypes.CDLL(None).syscall(CLONE[os.uname().machine], CLONE_VFORK | SIGCHLD, 0, 0, 0, 0) == 0:
        time.sleep(60)
        os._exit(0)


class Waiting(Honest):
    waits = False

    def step(self, batches, progress):
        if hasattr(batches, "passes") and not self.waits:
            self.waits = True
            threading.Thread(target=wait_for_a_child, daemon=True).start()
        return super().step(batches, progress)


def build(spec):
    return Waiting(spec)
