"""Where a recipe could leave something for a later process, and how it would find it again.

Used by recipes that try every one of them; like `common`, it is put in the place of the import line.
"""

import ctypes
import os
import socket
import tempfile
import time

KEY = 0x41525354  # of the System V segment
NAME = "autoresearch-tamper-state"


def folders():
    """Every folder that a child might be able to write to."""
    variables = ("TMPDIR", "TEMP", "HOME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "PWD")
    fixed = ["/dev/shm", "/tmp", "/var/tmp", "/run", "/run/lock", "/dev/mqueue", "/root", tempfile.gettempdir()]
    found = [os.getcwd(), *fixed, *(os.environ[v] for v in variables if v in os.environ)]
    above = os.getcwd()
    while above != "/":
        above = os.path.dirname(above)
        found.append(above)
    return list(dict.fromkeys(found))


def leave(data):
    """Put `data` into all of them, into System V shared memory, and with a helper process behind an abstract socket."""
    for folder in folders():
        try:
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, NAME), "wb") as file:
                file.write(data)
        except OSError:
            pass
    libc = ctypes.CDLL(None, use_errno=True)
    libc.shmat.restype = ctypes.c_void_p
    segment = libc.shmget(KEY, ctypes.c_size_t(len(data) + 8), 0o1666)
    address = libc.shmat(segment, None, 0) if segment >= 0 else -1
    if address not in (-1, None, ctypes.c_void_p(-1).value):
        ctypes.memmove(address, len(data).to_bytes(8, "little") + data, len(data) + 8)
    serve(data)


def serve(data):
    """A grandchild in a session of its own, which answers on an abstract socket for a minute."""
    try:
        if os.fork():
            return
    except OSError:
        return
    try:
        os.setsid()
        if os.fork() == 0:
            door = socket.socket(socket.AF_UNIX)
            door.bind("\0" + NAME)
            door.listen(4)
            door.settimeout(60)
            while True:
                door.accept()[0].sendall(data)
    finally:
        os._exit(0)


def find():
    """(place, data) of what an earlier process left, or None."""
    for folder in folders():
        try:
            with open(os.path.join(folder, NAME), "rb") as file:
                return folder, file.read()
        except OSError:
            pass
    libc = ctypes.CDLL(None, use_errno=True)
    libc.shmat.restype = ctypes.c_void_p
    segment = libc.shmget(KEY, ctypes.c_size_t(0), 0)
    address = libc.shmat(segment, None, 0) if segment >= 0 else -1
    if address not in (-1, None, ctypes.c_void_p(-1).value):
        size = int.from_bytes(ctypes.string_at(address, 8), "little")
        return "shared memory", ctypes.string_at(address + 8, size)
    try:
        with socket.socket(socket.AF_UNIX) as door:
            door.settimeout(1)
            door.connect("\0" + NAME)
            parts = []
            until = time.time() + 2
            while time.time() < until and (part := door.recv(1 << 20)):
                parts.append(part)
            return "abstract socket", b"".join(parts)
    except OSError:
        return None
