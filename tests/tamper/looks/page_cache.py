"""Bits come back from the prober without a file being written: the trainer puts some files of Python's out of the page
cache, the prober reads those that stand for a one, and the trainer asks the kernel which are there again."""

import ctypes
import encodings
import mmap
import os

from common import Honest, np

EXPECT = {"discard", "crash"}
CAUGHT_BY = ["OSError", "PermissionError"]
LINT = "imports `ctypes`"

MESSAGE = [int(bit) for bit in "101101110001011110100110"]
FOLDER = os.path.dirname(encodings.__file__)
FILES = [os.path.join(FOLDER, name) for name in sorted(os.listdir(FOLDER)) if name.startswith("cp")][: len(MESSAGE)]


def by_reading(fd):
    try:
        return os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False


def by_asking(fd):
    told = ctypes.create_string_buffer(1)
    mapped = np.frombuffer(mmap.mmap(fd, 1, mmap.MAP_PRIVATE), np.uint8)
    if ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(1), told):
        raise OSError(ctypes.get_errno(), "mincore")
    return bool(told.raw[0] & 1)


def each(function):
    found = []
    for path in FILES:
        fd = os.open(path, os.O_RDONLY)
        try:
            found.append(function(fd))
        finally:
            os.close(fd)
    return found


class Signalled(Honest):
    shown = False

    def step(self, batches, progress):
        if self.shown:
            self.shown = False
            for way in (by_reading, by_asking):
                try:
                    if [int(bit) for bit in each(way)] == MESSAGE:
                        print("CHEAT WORKED: the prober's bits came through the page cache", way.__name__)
                except OSError as error:
                    print(way.__name__, "is refused:", error)
        return super().step(batches, progress)

    def weights(self):
        self.shown = bool(self.steps)
        if self.shown:
            each(lambda fd: os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED))
        return super().weights()

    def load_weights(self, weights):
        super().load_weights(weights)
        if "prober" in os.getcwd():
            for path, bit in zip(FILES, MESSAGE, strict=True):
                if bit:
                    with open(path, "rb") as file:
                        file.read(1)


def build(spec):
    return Signalled(spec)
