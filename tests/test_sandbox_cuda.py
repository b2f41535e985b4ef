"""The sandbox of children that use an NVIDIA card: what CUDA's start does beside the card is allowed, and no more.

No card is needed: `CUINIT` acts out the part of cuInit that any machine can do, as public traces, AppArmor profiles and
bug reports show it. What a refusal costs is written beside each step.
"""

from __future__ import annotations

import errno
import json
import secrets
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_sandbox import ABI, LAYERS, filtered, need, referee

from core import attacks, landlock, nvidia_nodes, processes, readable, sandbox, seccomp
from core.doctor import _node_check
from core.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Landlock, seccomp and namespaces are Linux's")

CUINIT = """
import ctypes, json, mmap, os, socket, threading
libc = ctypes.CDLL(None, use_errno=True)
found = {}

def step(name):
    def run(function):
        try:
            found[name] = str(function() or "done")
        except OSError as problem:
            found[name] = f"refused: {problem}"
    return run

def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def write(path, flags):
    descriptor = os.open(path, flags)
    os.write(descriptor, b"cuda-EvtHandlr")
    os.close(descriptor)
    return open(path).read().strip()

def read(path):  # where the machine has it
    if os.path.isdir(path):
        return len(os.listdir(path))
    return len(open(path, "rb").read(1 << 16)) if os.path.exists(path) else "absent"

# --- threads: refused, cuInit gives 304 (nolabs-ai/nono #673, #924; NVIDIA/OpenShell #710, #1486)
waiting = threading.Event()
other = threading.Thread(target=waiting.wait, daemon=True)
other.start()
step("name of a thread")(lambda: write(f"/proc/self/task/{other.native_id}/comm", os.O_WRONLY))
step("name, truncated")(lambda: write(f"/proc/self/task/{other.native_id}/comm", os.O_WRONLY | os.O_TRUNC))
step("name by the pid")(lambda: write(f"/proc/{os.getpid()}/task/{os.getpid()}/comm", os.O_RDWR))
step("name by thread-self")(lambda: write("/proc/thread-self/comm", os.O_RDWR))

@step("name by pthreads")
def _():
    failed = libc.pthread_setname_np(ctypes.c_ulong(other.ident), b"cuda-worker")
    if failed:
        raise OSError(failed, os.strerror(failed))

step("process in a process")(lambda: os.waitpid(os.fork() or os._exit(0), 0) and None)  # nvidia-modprobe is tried

# --- the socket of UVM descriptors (canonical/snapd `cuda-support`); its name is that of the pid namespace and the pid
@step("socket of descriptors")
def _():
    global server
    space = os.stat(f"/proc/{os.getpid()}/ns/pid").st_ino
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.bind(f"\\0cuda-uvmfd-{space}-{os.getpid()}")
    server.listen(16)
    return server.getsockname()

# --- memory: refused, cuInit gives 304 (NVIDIA/OpenShell #1696)
@step("memory file")
def _():
    descriptor = os.memfd_create("cuda", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, 4096)
    mmap.mmap(descriptor, 4096)[:4] = b"page"

@step("address space")
def _():
    libc.mmap.restype = ctypes.c_void_p
    taken = libc.mmap(ctypes.c_void_p(0x200000000), ctypes.c_size_t(1 << 33), 0, 0x4022, -1, ctypes.c_long(0))
    if taken == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")

@step("shared memory")  # of CUDA's IPC, which no recipe uses: only where /dev/shm is the child's own
def _():
    os.close(os.open(f"/dev/shm/cuda.shm.{os.getuid()}.{os.getpid():x}.1", os.O_CREAT | os.O_RDWR, 0o600))

number = lambda x86, arm: x86 if os.uname().machine == "x86_64" else arm
step("NUMA policy")(lambda: checked(libc.syscall(number(239, 236), None, None, 0, None, 0)))  # get_mempolicy
step("NUMA policy, set")(lambda: checked(libc.syscall(number(238, 237), 0, None, 0)))  # set_mempolicy
step("affinity")(lambda: os.sched_setaffinity(0, os.sched_getaffinity(0)))
step("limits")(lambda: checked(libc.syscall(number(302, 261), 0, 9, None, ctypes.create_string_buffer(16))))
step("event")(lambda: os.close(os.eventfd(0)) if hasattr(os, "eventfd") else None)
step("locked page")(lambda: checked(libc.mlock(ctypes.create_string_buffer(4096), 1)))
step("barrier")(lambda: checked(libc.syscall(number(324, 283), 0, 0, 0)))  # membarrier

# --- nobody is asked: NVML goes on without the daemon (NVIDIA/OpenShell #710), CUDA without MPS
for name, path in (("persistence daemon", "/run/nvidia-persistenced/socket"), ("MPS", "/tmp/nvidia-mps/control")):
    asking = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    found[name] = asking.connect_ex(path)

for path in PATHS:
    step(path)(lambda: read(path))
waiting.set()
print(json.dumps(found))
"""
READ = readable.words(
    """/run/nvidia-persistenced
/proc/self/maps /proc/self/status /proc/self/stat /proc/self/cgroup /proc/self/mountinfo /proc/self/numa_maps
/proc/cpuinfo /proc/meminfo /proc/devices /proc/modules /proc/version /proc/filesystems
/proc/sys/vm/mmap_min_addr /proc/sys/vm/overcommit_memory /proc/driver/nvidia/params
/proc/driver/nvidia/version /proc/driver/nvidia/capabilities /proc/driver/nvidia-uvm /proc/driver/nvidia-caps
/sys/devices/system/cpu /sys/devices/system/cpu/online /sys/devices/system/cpu/possible
/sys/devices/system/node /sys/devices/system/node/node0/cpumap /sys/devices/system/memory/block_size_bytes
/sys/bus/pci/devices /sys/module/nvidia /dev/urandom /dev/zero"""
)


def launched(scratch: Path, code: str, layers: sandbox.Layers | None = None, **fields: Any) -> sandbox.Child:
    policy = replace(sandbox.standard_policy(scratch, "cuda"), layers=layers or sandbox.Layers(), **fields)
    return sandbox.launch([sys.executable, "-c", code], policy, cwd=scratch, log=scratch.with_suffix(".log"))


def ended(child: sandbox.Child) -> str:
    child.wait(60)
    child.kill()
    child.channel.close()
    return child.log_tail()


@pytest.mark.parametrize("backend", readable.NVIDIA)
@pytest.mark.parametrize("name", LAYERS)
def test_what_cuda_does_at_its_start_is_allowed(name: str, backend: str, tmp_path: Path) -> None:
    need(LAYERS[name])
    child = launched(tmp_path / "scratch", f"PATHS = {READ!r}\n{CUINIT}", LAYERS[name], backend=backend)
    said = ended(child)
    assert child.poll() == 0, said
    found = json.loads(said.splitlines()[-1])
    assert {found.pop(daemon) for daemon in ("persistence daemon", "MPS")} == {errno.ECONNREFUSED}
    if not LAYERS[name].namespaces:  # others see that folder, and what lies in it stays
        assert found.pop("shared memory").startswith("refused: [Errno 13]")
    assert {step: how for step, how in found.items() if how.startswith("refused")} == {}
    for step in ("name of a thread", "name, truncated", "name by the pid", "name by thread-self"):
        assert found[step] == "cuda-EvtHandlr"
    assert found["socket of descriptors"].startswith("b'\\x00cuda-uvmfd-")
    assert child.exceeded() is None


LATER = """
import os, time
def look():
    for path in PATHS:
        try:
            open(path, "rb").read(16) if not os.path.isdir(path) else os.listdir(path)
        except OSError as problem: print(problem, flush=True)
    try:
        if NAMED: open(f"/proc/self/task/{os.getpid()}/comm", "w").write("cuda-EvtHandlr")
    except OSError as problem: print(problem, flush=True)
    print("looked", flush=True)
look()
deadline = time.monotonic() + 30
while not os.path.exists("go") and time.monotonic() < deadline: time.sleep(0.02)
look()
"""


@pytest.mark.parametrize("namespaces", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_what_may_be_read_of_proc_stays_so_when_the_kernel_has_forgotten_it(
    backend: str, namespaces: bool, tmp_path: Path
) -> None:
    """Short of memory it drops entries of /proc that nobody holds; a rule on one of them goes with it."""
    need(layers := sandbox.Layers(namespaces=namespaces))
    told = sorted({path for path, _ in readable.basics(backend) if path.startswith("/proc/") and Path(path).exists()})
    assert {"/proc/meminfo", "/proc/self", "/proc/sys/kernel/pid_max"} <= set(told)
    code = f"PATHS = {[*told, '/proc/self/status']!r}\nNAMED = {backend == 'cuda'}\n{LATER}"
    child = launched(tmp_path / "scratch", code, layers, backend=backend)
    for _ in range(400):
        if child.log_tail() or child.poll() is not None:
            break
        time.sleep(0.02)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("2")
    except OSError:
        pytest.skip("only root can have them dropped")
    finally:
        (tmp_path / "scratch/go").touch()
        said = ended(child)
    assert said.split("\n") == ["looked"] * 2


def test_a_child_without_a_card_gets_none_of_it(tmp_path: Path) -> None:
    need(LAYERS["no namespaces"])
    steps = CUINIT.partition("# --- nobody is asked")[0] + "waiting.set()\nprint(json.dumps(found))"
    found = json.loads(ended(launched(tmp_path / "scratch", steps, backend="cpu")).splitlines()[-1])
    refused = {step for step, how in found.items() if how.startswith("refused")}
    names = {"name of a thread", "name, truncated", "name by the pid", "name by thread-self", "name by pthreads"}
    assert refused == names | {"socket of descriptors", "memory file"}
    closed = {f"/proc/{path}" for path in ("modules", "sys/vm/mmap_min_addr", "driver/nvidia")}
    closed.add("/run/nvidia-persistenced")
    assert not closed & dict(readable.basics("cpu")).keys()
    assert "/run/nvidia-persistenced" in dict(readable.basics("cuda"))


@pytest.mark.parametrize("name", LAYERS)
def test_attacks_are_refused_with_a_card_too(name: str, tmp_path: Path) -> None:
    layers = LAYERS[name]
    need(layers)
    given = {"landlock": layers.landlock, "namespaces": layers.namespaces, "cgroups": layers.cgroups}
    secret = secrets.token_hex(16)
    orders = {"do": "attacks", "folder": str(tmp_path), "secret": secret, "layers": given, "backend": "cuda"}
    said = referee(orders, secret)
    assert said["code"] == 0, said["log"]
    results = json.loads(said["log"])
    assert set(results) == set(attacks.ATTACKS) and said["enforced"]["landlock"] == min(ABI, layers.landlock)
    # cuInit's memory file is all that a card adds
    assert {a: how for a, (held, how) in results.items() if not held} == {"kernel_calls": "memory file"}
    assert results["unix_serve"][1] == "EACCES"  # bound and listening: at the door
    assert results["unix_path"][1] == results["unix_abstract"][1] == "ECONNREFUSED"
    for attack in ("tcp", "udp", "ipv6", "unix_datagram", "netlink", "listen"):
        assert results[attack][1] == "EACCES"


# --- sockets that nobody is let in by ----------------------------------------------------------------

SERVING = """
import errno, os, socket, time
def attempt(name, function):
    try: print(name, function(), flush=True)
    except OSError as problem: print(name, errno.errorcode[problem.errno], flush=True)
for kind in (socket.SOCK_SEQPACKET, socket.SOCK_STREAM):
    server = socket.socket(socket.AF_UNIX, kind)
    server.bind(f"\\0NAME-{int(kind)}")
    server.listen(8)
    server.setblocking(False)
    globals()[f"server{int(kind)}"] = server
print("listening", flush=True)
deadline = time.monotonic() + 30
while not os.path.exists("go") and time.monotonic() < deadline: time.sleep(0.02)
for server in (server5, server1):
    attempt("accept", lambda: server.accept())
    attempt("receive", lambda: server.recv(10))
attempt("by a path", lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).bind("mine"))
attempt("datagrams", lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
attempt("a pair's end", lambda: one.connect("\\0NAME-5"))
"""
CALLING = """
import errno, socket
def attempt(name, function):
    try: print(name, function(), flush=True)
    except OSError as problem: print(name, errno.errorcode[problem.errno], flush=True)
for kind in (socket.SOCK_SEQPACKET, socket.SOCK_STREAM):
    made = socket.socket(socket.AF_UNIX, kind)
    attempt("connect", lambda: made.connect(f"\\0NAME-{int(kind)}"))
    attempt("send", lambda: made.sendto(b"secret", f"\\0NAME-{int(kind)}"))
    attempt("send a message", lambda: made.sendmsg([b"secret"], [], 0, f"\\0NAME-{int(kind)}"))
    attempt("take the name", lambda: made.bind(f"\\0NAME-{int(kind)}"))
"""


@pytest.mark.parametrize("name", LAYERS)
def test_a_bound_name_leads_nowhere(name: str, tmp_path: Path) -> None:
    """Two children of two experiments at the same time, and this process, which stands for any other outside."""
    need(LAYERS[name])
    label = f"autoresearch-{secrets.token_hex(6)}"
    server = launched(tmp_path / "server", SERVING.replace("NAME", label), LAYERS[name])
    for _ in range(400):
        if "listening" in server.log_tail() or server.poll() is not None:
            break
        time.sleep(0.02)
    caller = ended(launched(tmp_path / "caller", CALLING.replace("NAME", label), LAYERS[name]))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as outside:
        outside.settimeout(2)
        reached = outside.connect_ex(f"\0{label}-5") == 0
        if reached:
            outside.send(b"come in")
        (tmp_path / "server/go").touch()
        served = ended(server).splitlines()
    assert served[0] == "listening" and set(served[1:]) <= {
        "accept EACCES",
        *(f"receive {why}" for why in ("EINVAL", "ENOTCONN")),
        *("by a path EACCES", "datagrams EACCES", "a pair's end ECONNREFUSED"),
    }, served
    # A network namespace of its own hides the name. Without one it is there for all to see while its process lives: a
    # bit that another child of the same moment can look for (docs/sandbox.md), and no way in.
    shared = not LAYERS[name].namespaces
    assert reached == shared
    said = [line.rpartition(" ")[::2] for line in caller.splitlines()]
    assert [why for what, why in said if what == "connect"] == ["ECONNREFUSED"] * 2
    assert {why for what, why in said if what.startswith("send")} <= {"ENOTCONN", "ENOTSUP", "EINVAL"}
    assert {why for what, why in said if what == "take the name"} == {"EADDRINUSE" if shared else "None"}


@pytest.mark.parametrize("machine", seccomp.ARCHITECTURES)
def test_filter_for_a_card(machine: str) -> None:
    refused, allowed = seccomp.ERRNO | errno.EACCES, seccomp.ALLOW

    def told(call: str, *arguments: int) -> int:
        return filtered(machine, call, *arguments, cuda=True)

    for kind in (1, 5, 5 | 0o2000000):  # SOCK_STREAM, SOCK_SEQPACKET, with SOCK_CLOEXEC
        assert told("socket", 1, kind) == allowed
    for family, kind in ((1, 2), (2, 1), (10, 1), (16, 3), (40, 1), (2, 5)):
        assert told("socket", family, kind) == refused
    assert told("bind", 3) == told("listen", 3) == told("memfd_create") == allowed
    assert told("connect", 3) == seccomp.ERRNO | errno.ECONNREFUSED
    for call in set(seccomp.REFUSED) - set(seccomp.SERVED):
        if seccomp.CALLS[call][list(seccomp.ARCHITECTURES).index(machine)] is not None:
            assert told(call) == refused, call
    for call in ("clone3", "mincore", "cachestat", "fchmodat2", "openat2"):
        assert told(call) == seccomp.ERRNO | errno.ENOSYS
    assert told("socketpair", 1, 2) == refused
    assert told("kill", 1234) == allowed and filtered(machine, "kill", 1234, own=7, cuda=True) == seccomp.ERRNO | 1


# --- what lies beside a thread's name ------------------------------------------------------------------

BESIDE = """
import os, stat, time
folder = f"/proc/self/task/{os.getpid()}"
for place, inner, names in os.walk(folder):
    for name in names:
        path = os.path.join(place, name)
        try:
            if not stat.S_ISREG(os.lstat(path).st_mode): continue
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        except OSError: continue
        print(path[len(folder) + 1:])
for path in ("/proc/self/oom_score_adj", "/proc/self/coredump_filter", "/proc/self/timerslack_ns"):
    try: print("opened", os.open(path, os.O_WRONLY))
    except OSError: pass
"""
# docs/sandbox.md says of each what it is worth
KNOWN = set(
    readable.words(
        "comm sched mem clear_refs oom_adj oom_score_adj loginuid uid_map gid_map projid_map setgroups make-it-fail "
        "fail-nth attr/current attr/exec attr/fscreate attr/keycreate attr/sockcreate attr/smack/current "
        "attr/apparmor/current attr/apparmor/exec"
    )
)


def test_what_else_of_a_thread_can_be_written_is_known(tmp_path: Path) -> None:
    need(sandbox.Layers(namespaces=False))
    opened = set(ended(launched(tmp_path / "scratch", BESIDE)).split())
    assert "comm" in opened and opened <= KNOWN
    told = (Path(__file__).parent.parent / "docs/sandbox.md").read_text()
    assert all(f"`{name.partition('/')[0]}" in told for name in KNOWN - {"comm"})
    assert ended(launched(tmp_path / "other", BESIDE, backend="cpu")) == ""


LOWERED = """
import os, time
def lower(to):
    try:
        with open(f"/proc/self/task/{os.getpid()}/oom_score_adj", "w") as file: file.write(str(to))
    except OSError as problem:
        print("refused", flush=True)
        raise SystemExit(0)
lower(700)
time.sleep(1.5)
print("went on", flush=True)
lower(100)
time.sleep(30)
"""


@pytest.mark.parametrize("cgroups", [True, False])
def test_a_recipe_that_leaves_its_place_before_the_memory_killer_is_ended(cgroups: bool, tmp_path: Path) -> None:
    began = time.monotonic()
    child = launched(tmp_path / "scratch", LOWERED, sandbox.Layers(cgroups=cgroups))
    said = ended(child)
    if "refused" in said:  # with CAP_SYS_RESOURCE the launcher has set the least, too
        assert child.exceeded() is None
        return
    assert said == "went on" and time.monotonic() - began < 20
    assert (child.exceeded() or "").startswith(f"its oom_score_adj was lowered from {processes.FIRST_TO_GO} to 100")


# --- the machine's side ---------------------------------------------------------------------------------


def test_a_card_behind_the_vmbus_can_be_looked_up(tmp_path: Path) -> None:
    """Hyper-V passes cards through beneath /sys/devices/LNXSYSTM:00, which is no PCI root."""
    devices, bus = tmp_path / "devices", tmp_path / "bus"
    bus.mkdir()
    passed = "LNXSYSTM:00/VMBUS:00/pci0001:00/0001:00:00.0"
    for name, vendor in ((passed, "0x10de"), ("LNXSYSTM:00/2:00.0", "0x8086"), ("pci0000:00/1:00.0", "0x10de")):
        (devices / name).mkdir(parents=True)
        (devices / name / "vendor").write_text(f"{vendor}\n")
        (bus / Path(name).name).symlink_to(devices / name)
    (bus / "gone").symlink_to(tmp_path / "nowhere")
    assert readable.cards_elsewhere(bus, devices) == [str(devices / passed)]
    assert readable.cards_elsewhere(tmp_path / "none", devices) == []


def test_the_driver_that_triton_is_told_of_is_readable_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, store = tmp_path / "driver", tmp_path / "store"
    folder.mkdir()
    store.mkdir()
    (store / "libcuda.so.570").write_text("library")
    (folder / "libcuda.so.1").symlink_to(store / "libcuda.so.570")
    (folder / "diary").write_text("secret")
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(folder))
    rules = readable.driver_named()
    assert rules == [(str(folder), landlock.LIST), (str(store / "libcuda.so.570"), landlock.RUN)]
    need(sandbox.Layers(namespaces=False))
    code = "import os\nplace = os.environ['TRITON_LIBCUDA_PATH']\nprint(open(place + '/libcuda.so.1').read())\n"
    code += "try: open(place + '/diary')\nexcept PermissionError: print('closed')"
    assert ended(launched(tmp_path / "scratch", code)) == "library\nclosed"
    assert not set(rules) & set(readable.basics("cpu"))
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(tmp_path / "store"))
    (store / "libcuda.so.570").unlink()
    assert readable.driver_named() == []


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose driver has not been used for CUDA since it started."""
    dev, programs = tmp_path / "dev", tmp_path / "bin"
    dev.mkdir()
    programs.mkdir()
    (dev / "nvidiactl").touch()
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setattr(nvidia_nodes.missing, "__defaults__", (dev,))
    monkeypatch.setattr(nvidia_nodes.make, "__defaults__", (dev,))
    return dev


def program(bare: Path, text: str) -> None:
    made = bare.parent / "bin" / "nvidia-modprobe"
    made.write_text(f"#!/bin/sh\n{text}\n")
    made.chmod(0o755)


def test_the_node_of_cudas_memory_is_made_before_the_first_child(bare: Path, tmp_path: Path) -> None:
    program(bare, f'echo "$@" > {tmp_path}/asked; touch {bare}/nvidia-uvm')
    assert [check.ok for check in _node_check()] == [None]
    ended(launched(tmp_path / "cpu", "", backend="cpu"))
    assert not (tmp_path / "asked").exists()
    ended(launched(tmp_path / "scratch", ""))
    assert (tmp_path / "asked").read_text() == "-c 0 -u\n" and list(_node_check()) == []
    (tmp_path / "asked").unlink()
    nvidia_nodes.make()
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "did not make it: exit status 0"),
        ("echo modprobe: not permitted >&2; exit 1", "did not make it: modprobe: not permitted"),
        ("exec sleep 20", r"took more than 0\.2 s"),
        (None, "was not found"),
    ],
)
def test_without_that_node_the_command_is_told(
    text: str | None, why: str, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvidia_nodes, "SECONDS", 0.2 if text and "sleep" in text else 20)
    if text is not None:
        program(bare, text)
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    with pytest.raises(UserError, match=rf"nvidia-uvm, .*{why}.*sudo nvidia-modprobe -c 0 -u"):
        launched(tmp_path / "scratch", "")
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) == before
    (check,) = _node_check()
    assert check.ok is (False if text is None else None) and "sudo nvidia-modprobe -c 0 -u" in check.action


def test_no_driver_no_node(tmp_path: Path) -> None:
    assert not nvidia_nodes.missing(tmp_path)
    nvidia_nodes.make(tmp_path)
