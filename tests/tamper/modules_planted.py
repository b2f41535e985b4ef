"""Leaves modules in its working folder, its home and its temporary folder, for the scorer and the auditor to import."""

import os
import sys

from common import Honest

KIND = "modules, hooks or filters planted"
EXPECT = {"discard", "crash"}
CAUGHT_BY = ["Permission"]
LINT = "imports `os`"

CODE = "print('CHEAT WORKED: a planted module was run')\n"


class Planter(Honest):
    def step(self, batches, progress):
        if not hasattr(self, "planted"):
            self.planted = True
            folders = [os.getcwd(), os.environ["HOME"], os.environ["TMPDIR"], *sys.path]
            for folder in filter(None, folders):
                for name in (
                    "torch.py",
                    "mlx/core.py",
                    "sitecustomize.py",
                    "usercustomize.py",
                    "json.py",
                    "backends/worker.py",
                    "x.pth",
                ):
                    try:
                        path = os.path.join(folder, name)
                        os.makedirs(os.path.dirname(path), exist_ok=True)
                        with open(path, "w") as file:
                            file.write("import os; " + CODE)
                        if folder in sys.path:
                            print("CHEAT WORKED: wrote", path)
                    except OSError:
                        pass
        return super().step(batches, progress)


def build(spec):
    return Planter(spec)
