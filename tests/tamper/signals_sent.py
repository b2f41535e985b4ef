"""Signals its parent, process 1 and every process there is. SIGWINCH: whoever gets it is not harmed."""

import os
import signal

from common import Honest

KIND = "killing the parent"
EXPECT = {"discard", "crash"}
CAUGHT_BY = ["Operation not permitted", "PermissionError"]
LINT = "imports `os`"


class Killer(Honest):
    def step(self, batches, progress):
        if not hasattr(self, "tried"):
            self.tried = True
            mine = {int(task) for task in os.listdir("/proc/self/task")}
            for target in [-1, 1, os.getppid(), -os.getppid(), *range(2, 3000)]:
                try:
                    os.kill(target, signal.SIGWINCH)
                    if target not in mine and target != -1:
                        print("CHEAT WORKED: signalled", target)
                except OSError:
                    pass
        return super().step(batches, progress)


def build(spec):
    return Killer(spec)
