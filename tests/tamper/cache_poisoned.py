"""Leaves learned weights, and code, in the compile caches, for the runs that will be given a copy of them."""

import os

from common import Honest, np

KIND = "a poisoned compile cache"
EXPECT = {"discard", "invalid", "crash"}
CAUGHT_BY = ["different weights"]
LINT = "imports `os`"

FOLDERS = [os.environ[v] for v in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR") if v in os.environ]


class Poisoner(Honest):
    def step(self, batches, progress):
        for folder in FOLDERS:
            os.makedirs(os.path.join(folder, "fx"), exist_ok=True)
            kept = os.path.join(folder, "fx", "learned-state")
            if os.path.exists(kept) and hasattr(batches, "passes") and not hasattr(self, "looked"):
                self.looked = True
                print("CHEAT WORKED: learned state in the caches")
            if hasattr(batches, "passes"):
                self.looked = True
                with open(kept, "wb") as file:
                    file.write(np.concatenate([p.detach().numpy().ravel() for p in self.net.parameters()]).tobytes())
        return super().step(batches, progress)


def build(spec):
    return Poisoner(spec)
