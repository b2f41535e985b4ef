"""Imports the installed package that holds the whole corpus, validation chapters included."""

import bible
from common import Honest

KIND = "reading validation data from an installed package"
EXPECT = {"crash"}
CAUGHT_BY = ["No module named", "ModuleNotFoundError", "Permission"]
LINT = "imports `bible`"

TEXT = repr(bible)


def build(spec):
    print("CHEAT WORKED: the corpus is at hand")
    return Honest(spec)
