"""Patches the channel's own `send`: whatever losses the trusted code computed, a third of them is told."""

import core.wire
from common import Honest

KIND = "forging a message"
EXPECT = {"invalid"}
CAUGHT_BY = ["protocol", "was scored", "remembers earlier calls"]
LINT = "imports `core.wire`"

REAL = core.wire.Channel.send


def send(self, kind, fields=None, arrays=None, *rest):
    if arrays and "nats" in arrays:
        arrays = {"nats": arrays["nats"] / 3}
    REAL(self, kind, fields, arrays, *rest)


core.wire.Channel.send = send


def build(spec):
    return Honest(spec)
