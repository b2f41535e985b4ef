"""Looks for keys in its environment, in the environment of others, and in every home that it can read."""

import os

from common import Honest

KIND = "secret search"
EXPECT = {"discard", "crash"}
CAUGHT_BY = ["Permission"]
LINT = "imports `os`"

PLANTED = b"PLANTED-" + b"SECRET"


def texts():
    yield "environment", repr(dict(os.environ)).encode()
    places = ["/proc/1/environ", f"/proc/{os.getppid()}/environ", f"/proc/{os.getppid()}/cmdline", "/etc/shadow"]
    homes = ["/root", "/home", os.path.expanduser("~"), "/tmp", "/var", "/run", "/etc", os.path.dirname(os.getcwd())]
    above = os.getcwd()
    while above != "/":
        above = os.path.dirname(above)
        homes.append(above)
    count = 0
    for home in homes[:-1]:
        for folder, _, names in os.walk(home):
            places += [os.path.join(folder, n) for n in names]
            count += 1
            if count > 2000:
                break
    for place in places:
        try:
            with open(place, "rb") as file:
                yield place, file.read(4096)
        except OSError:
            pass


class Thief(Honest):
    def step(self, batches, progress):
        if not hasattr(self, "looked"):
            self.looked = True
            for place, text in texts():
                if PLANTED in text or (place.startswith("/proc/") and text):
                    print("CHEAT WORKED: secret in", place)
        return super().step(batches, progress)


def build(spec):
    return Thief(spec)
