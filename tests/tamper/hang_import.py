"""Never ends its import."""

import itertools

from common import build as build

KIND = "resource exhaustion"
EXPECT = {"timeout"}
CAUGHT_BY = ["took more than"]
LINT = ""

NUMBER = sum(1 for _ in itertools.count())
