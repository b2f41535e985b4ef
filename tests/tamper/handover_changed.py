"""Hands over weights and says nothing; a link kept to the same file changes it after it was checked."""

import os
import threading

from common import Honest, np

KIND = "replacing the file that is handed over"
EXPECT = {"discard", "invalid", "crash"}
CAUGHT_BY = ["weight"]
LINT = "imports `os`"


class Changing(Honest):
    def weights(self):
        threading.Thread(target=self.spoil, daemon=True).start()
        return super().weights()

    def spoil(self):
        while True:
            try:
                with open("weights.safetensors", "r+b") as file:
                    file.seek(-4096, 2)
                    file.write(np.full(1024, np.nan, np.float32).tobytes())
                os.link("weights.safetensors", "second-name")
                return
            except OSError:
                pass


def build(spec):
    return Changing(spec)
