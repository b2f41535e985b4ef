"""Writes to the record, the shards, the tokenizer and the project's own files, wherever it finds them."""

import os
import sys

from common import Honest

KIND = "ledger, shards or tokenizer edited"
EXPECT = {"discard", "crash"}
CAUGHT_BY = ["Permission"]
LINT = "imports `os`"


def targets():
    for name in ("core.wire", "core.weights", "torch", "mlx.core", "numpy", "backends.worker", "__main__"):
        module = sys.modules.get(name)
        if module is not None and getattr(module, "__file__", None):
            yield module.__file__
            yield os.path.join(os.path.dirname(module.__file__), "sitecustomize.py")
    folder = os.getcwd()
    for _ in range(6):
        folder = os.path.dirname(folder)
        yield from (os.path.join(folder, n) for n in ("ledger.sqlite", "settings.json", "train.py", "planted.py"))
        try:
            for name in os.listdir(folder):
                yield os.path.join(folder, name)
        except OSError:
            pass


class Editor(Honest):
    def step(self, batches, progress):
        if not hasattr(self, "edited"):
            self.edited = True
            for path in targets():
                for doing in (lambda p: open(p, "ab").close(), lambda p: os.rename(p, p + ".moved"), os.unlink):
                    try:
                        doing(path)
                        print("CHEAT WORKED: changed", path)
                    except OSError:
                        pass
        return super().step(batches, progress)


def build(spec):
    return Editor(spec)
