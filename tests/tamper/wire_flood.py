"""Sends messages of progress without end, each with the largest numbers there are."""

import os
import socket

from common import Honest
from core.wire import Channel

KIND = "forging a message"
EXPECT = {"invalid", "crash", "timeout"}
CAUGHT_BY = ["protocol", "progress", "budget", "took"]
LINT = "imports `os`"


class Flood(Honest):
    def step(self, batches, progress):
        if hasattr(batches, "passes") and progress > 0.2:
            channel = Channel(socket.socket(fileno=os.dup(int(os.environ["AUTORESEARCH_CHANNEL"]))))
            while True:
                channel.send("progress", {"step": 2**62, "loss": 1e308, "tokens": 2**62, "x": "y" * 1000})
        return super().step(batches, progress)


def build(spec):
    return Flood(spec)
