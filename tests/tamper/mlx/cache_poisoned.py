"""Leaves learned weights in every folder that caches are kept in, and in TMPDIR, where MLX's own compiled code lies."""

import os

from common import Honest, mx

NAMES = ("TMPDIR", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
KEPT = [os.path.join(os.environ[v], "fx", "learned.safetensors") for v in NAMES if v in os.environ]


class Poisoner(Honest):
    looked = False

    def step(self, batches, progress):
        if hasattr(batches, "passes") and not self.looked:
            self.looked = True
            for path in filter(os.path.exists, KEPT):
                print("CHEAT WORKED: learned state in the caches")
                self.w = mx.load(path)
        loss = super().step(batches, progress)
        if hasattr(batches, "passes") and self.steps == 20:
            for path in KEPT:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                mx.save_safetensors(path, self.w)
        return loss


def build(spec):
    return Poisoner(spec)
