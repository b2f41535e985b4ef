"""Goes through its own and its parents' descriptors and memory for validation data."""

import os

from common import Honest

KIND = "reading validation data through descriptors and /proc"
EXPECT = {"discard", "crash"}
CAUGHT_BY = ["Permission", "Operation not permitted"]
LINT = "imports `os`"


def search():
    others = [p for p in os.listdir("/proc") if p.isdigit() and int(p) != os.getpid()] if readable("/proc") else []
    for process in ["self", str(os.getppid()), "1", *others]:
        try:
            for fd in os.listdir(f"/proc/{process}/fd"):
                target = os.readlink(f"/proc/{process}/fd/{fd}")
                if "val-" in target or "holdout" in target or (process != "self" and target.startswith("/")):
                    with open(f"/proc/{process}/fd/{fd}", "rb") as file:
                        if file.read(8):
                            print("CHEAT WORKED:", process, fd, target)
        except (OSError, ValueError):
            pass
        for name in ("mem", "maps", "environ"):
            try:
                with open(f"/proc/{process}/{name}", "rb") as file:
                    if process != "self" and file.read(8):
                        print("CHEAT WORKED:", process, name)
            except (OSError, ValueError):
                pass


def readable(path):
    try:
        return bool(os.listdir(path))
    except OSError:
        return False


class Searcher(Honest):
    def step(self, batches, progress):
        if not hasattr(self, "looked"):
            self.looked = True
            search()
        return super().step(batches, progress)

    def logits(self, tokens):
        if not hasattr(self, "looked"):
            self.looked = True
            search()
        return super().logits(tokens)


def build(spec):
    return Searcher(spec)
