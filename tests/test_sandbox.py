"""What a hostile recipe tries is refused, whatever walls the machine has; what an honest one needs works."""

from __future__ import annotations

import array
import errno
import json
import os
import re
import secrets
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from core import attacks, inside, landlock, paths, readable, sandbox, sandbox_macos, seccomp, selfcheck

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Landlock, seccomp and namespaces are Linux's")
REFEREE = Path(__file__).with_name("sandboxed_referee.py")
ABI = sandbox.abilities().landlock if sys.platform == "linux" else 0

# Walls that hold without each other's help. ABI 1 and 5 stand for the kernels of common distributions.
LAYERS = {
    "everything": sandbox.Layers(),
    "no namespaces": sandbox.Layers(namespaces=False),
    "no namespaces, no cgroups": sandbox.Layers(namespaces=False, cgroups=False),
    "Landlock 5, no namespaces": sandbox.Layers(landlock=5, namespaces=False),
    "Landlock 1, no namespaces": sandbox.Layers(landlock=1, namespaces=False),
}


def need(layers: sandbox.Layers) -> None:
    """Skip where this machine lacks what the case is about."""
    able = sandbox.abilities()
    if not able.landlock or not able.seccomp:
        pytest.skip(f"not on this kernel: Landlock {able.landlock}, seccomp {able.seccomp}")
    if layers.namespaces and not able.namespaces:
        pytest.skip("namespaces are refused to this user")


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


def start(scratch: Path, *argv: str, layers: sandbox.Layers | None = None, **fields: Any) -> sandbox.Child:
    policy = replace(sandbox.standard_policy(scratch, "cpu"), layers=layers or sandbox.Layers(), **fields)
    return sandbox.launch([sys.executable, *argv], policy, cwd=scratch, log=scratch.parent / "log")


def run(scratch: Path, code: str, timeout: float = 60, **fields: Any) -> sandbox.Child:
    child = start(scratch, "-c", code, **fields)
    child.wait(timeout)
    child.kill()
    child.channel.close()
    return child


def output(scratch: Path, code: str, **fields: Any) -> str:
    child = run(scratch, code, **fields)
    assert child.poll() == 0, child.log_tail()
    return child.log_tail()


def referee(orders: dict[str, Any], secret: str) -> dict[str, Any]:
    """A referee with the secret in its environment and its arguments, beside a bystander with the same."""
    environment = {**os.environ, "ANTHROPIC_API_KEY": secret, "HF_TOKEN": secret}
    bystander = subprocess.Popen([sys.executable, "-c", "input()", secret], stdin=subprocess.PIPE, env=environment)
    command = [sys.executable, str(REFEREE), str(paths.project_root()), json.dumps(orders), secret]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    finally:
        bystander.communicate(b"\n")
    return json.loads(done.stdout)


# --- attacks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("forked", [False, True], ids=["a new Python", "a fork"])
@pytest.mark.parametrize("name", LAYERS)
def test_attacks_are_refused(name: str, forked: bool, tmp_path: Path) -> None:
    layers = LAYERS[name]
    need(layers)
    secret = secrets.token_hex(16)
    planted = []
    shared = Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp") / f"planted-{secret[:6]}"
    with tempfile.TemporaryDirectory(dir=Path("~").expanduser()) as home:
        for place in (Path(home) / "notes", tmp_path / "lab.txt", shared):
            place.write_text(secret)
            planted.append(str(place))
        orders = {
            "do": "attacks",
            "folder": str(tmp_path),
            "secret": secret,
            "planted": planted,
            "layers": {"landlock": layers.landlock, "namespaces": layers.namespaces, "cgroups": layers.cgroups},
            "forked": forked,
        }
        said = referee(orders, secret)
        shared.unlink()
    assert said["code"] == 0, said["log"]
    results = json.loads(said["log"])
    assert set(results) == set(attacks.ATTACKS)
    assert {attack: how for attack, (held, how) in results.items() if not held} == {}
    assert said["enforced"]["landlock"] == min(ABI, layers.landlock)
    assert said["enforced"]["namespaced"] == layers.namespaces
    network = "tcp udp ipv6 unix_path unix_abstract unix_datagram unix_serve netlink listen"
    for attack in network.split():
        assert results[attack][1] == "EACCES"


def test_a_running_library_that_holds_its_own_file_is_no_inherited_descriptor(tmp_path: Path) -> None:
    """As libffi does where ctypes can be used without writable code, such as Debian 14."""
    library, other = import_module("_ctypes").__file__, tmp_path / "other"
    other.write_text("")
    script = f"""
import _ctypes, os, sys
sys.path.insert(0, {str(paths.project_root())!r})
from core import attacks
for name, flags in (({library!r}, os.O_RDONLY), ({str(other)!r}, os.O_RDONLY), ({str(other)!r}, os.O_PATH)):
    fd = os.open(name, flags)
    print(attacks.open_descriptors({{}}))
    os.close(fd)
"""
    environment = {**os.environ, "AUTORESEARCH_CHANNEL": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    mine, inherited, named = done.stdout.splitlines()
    assert mine == "None"
    assert inherited.endswith(str(other)) and named.endswith(str(other))


def test_attacks_work_outside(tmp_path: Path) -> None:
    """The control: without the sandbox the same attacks succeed, so that their failure within it says something."""
    harmless = [
        *("tcp", "udp", "unix_path", "unix_abstract", "unix_serve", "netlink", "listen", "read_planted"),
        "parent_in_proc",
        *("all_of_proc", "own_environment", "mode_and_time", "write_outside", "run_written", "embedded_corpus"),
        "cached_pages",
    ]
    secret = secrets.token_hex(16)
    (tmp_path / "outside").mkdir()
    with selfcheck.surroundings(tmp_path / "outside", secret) as targets:
        environment = {**os.environ, "AUTORESEARCH_CHANNEL": "0", "HF_TOKEN": secret}
        command = [sys.executable, "-m", "core.attacks", json.dumps(targets), *harmless]
        root = paths.project_root()
        command[1:3] = [
            "-c",
            f"import sys, os; sys.path.insert(0, {str(root)!r}); from core import attacks; attacks.main()",
        ]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    results = json.loads(done.stdout)
    assert {name for name, (held, _) in results.items() if held} == set(), results


def test_doctor_shows_every_attack() -> None:
    assert set(attacks.ATTACKS) == set(" ".join(selfcheck.GROUPS.values()).split())


@pytest.mark.parametrize(
    ("said", "detail"),
    [("processes: 22 of 16", "ended at 22, 16 allowed"),
     ("memory: 128.0 of 128.0 MiB", "ended at 128.0, 128.0 MiB allowed"),
     ("processes: more than 16 processes and threads", "more than 16 processes and threads"),
     (None, "a child went over it unseen")],
)  # fmt: skip
def test_a_limit_is_told_whoever_saw_it_first(said: str | None, detail: str) -> None:
    """Our own count, or the kernel, which may refuse a process before it is counted."""
    child = SimpleNamespace(wait=lambda seconds: 0, exceeded=lambda: said)
    check = selfcheck.limit_checked(child, "processes", SimpleNamespace(processes="cgroup v1"))  # type: ignore[arg-type]
    assert (check.ok, check.detail) == (said is not None, f"{detail} (cgroup v1)")


def test_self_check_passes_here() -> None:
    need(sandbox.Layers(namespaces=False))
    checks = sandbox.self_check()
    assert [c for c in checks if c.ok is False] == []
    assert {"sandbox: network", "sandbox: files", "sandbox: limit of memory"} <= {c.name for c in checks}
    limits = [c.detail for c in checks if c.name.startswith("sandbox: limit of")]
    assert all(re.match(r"ended at [\d.]+( \w+)?, [\d.]+( \w+)? allowed \(|more than \d+ ", said) for said in limits), (
        limits
    )


def test_planted_modules_are_not_imported(scratch: Path) -> None:
    """Files in the working directory, which is scratch, take nobody's place."""
    scratch.mkdir()
    for name in ("backends", "core", "numpy", "json"):
        (scratch / name).mkdir()
        (scratch / name / "__init__.py").write_text("raise SystemExit('planted')")
        (scratch / f"{name}.py").write_text("raise SystemExit('planted')")
    said = output(scratch, "import backends, core, numpy, json, sys; print(core.__file__); print('' in sys.path)")
    assert said.splitlines() == [str(paths.project_root() / "core/__init__.py"), "False"]


def test_nothing_passes_from_child_to_child(scratch: Path) -> None:
    """Shared memory, file times, modes and attributes of readable files: one child cannot leave notes for the next."""
    need(sandbox.Layers(namespaces=False))
    write = """
import os
from core import landlock
try: open("/dev/shm/note", "w").write("x")
except OSError: pass
for attempt in (lambda: os.utime(landlock.__file__, (7, 7)), lambda: os.chmod(landlock.__file__, 0o755),
                lambda: os.setxattr(landlock.__file__, "user.note", b"x")):
    try: attempt()
    except OSError: pass
"""
    before = Path(landlock.__file__).stat()
    output(scratch, write)
    after = Path(landlock.__file__).stat()
    assert (before.st_mtime_ns, before.st_mode, before.st_ctime_ns) == (
        after.st_mtime_ns,
        after.st_mode,
        after.st_ctime_ns,
    )
    assert output(scratch, "import os; print(os.path.exists('/dev/shm/note'))") == "False"
    assert not Path("/dev/shm/note").exists()


# --- what an honest recipe needs -------------------------------------------------------------------


def test_environment_is_made_not_inherited(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SETTING", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    environment = json.loads(output(scratch, "import os, json; print(json.dumps(dict(os.environ)))"))
    assert "SOME_SETTING" not in environment
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["HOME"] == str(scratch)
    assert Path(environment["TMPDIR"]).parent == scratch


def test_precompiled_header_goes_to_the_caches(scratch: Path, tmp_path: Path) -> None:
    """torch.compile puts it below TMPDIR, which is thrown away; it takes seconds to make."""
    policy = sandbox.standard_policy(scratch, "cpu", caches=tmp_path / "caches")
    code = """
import getpass, os, tempfile
folder = os.path.join(tempfile.gettempdir(), "torchinductor_" + getpass.getuser(), "precompiled_headers")
os.makedirs(folder)
open(os.path.join(folder, "x.gch"), "w").write("header")
"""
    child = sandbox.launch([sys.executable, "-c", code], policy, cwd=scratch, log=tmp_path / "log")
    assert child.wait(20) == 0, child.log_tail()
    child.channel.close()
    assert (tmp_path / "caches/headers/precompiled_headers/x.gch").read_text() == "header"


def test_file_is_handed_over_the_channel(scratch: Path, tmp_path: Path) -> None:
    """By descriptor only: the path stays closed, and so does a second opening through /proc/self/fd."""
    data = tmp_path / "shard"
    data.write_bytes(b"tokens")
    code = """
import array, os, socket
channel = socket.socket(fileno=int(os.environ["AUTORESEARCH_CHANNEL"]))
message, control, _, _ = channel.recvmsg(16, socket.CMSG_SPACE(4))
fd = array.array("i", control[0][2])[0]
answer = os.pread(fd, 100, 0)
for again in (message.decode(), f"/proc/self/fd/{fd}"):
    try: answer += os.read(os.open(again, os.O_RDONLY), 10)
    except OSError as problem: answer += b" " + type(problem).__name__.encode()
try: os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
except OSError as problem: answer += b" " + type(problem).__name__.encode()
channel.sendall(answer)
"""
    need(sandbox.Layers(namespaces=False))
    child = start(scratch, "-c", code)
    with data.open("rb") as file:
        handed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()]))]
        child.channel.sendmsg([b"x" if len(str(data)) > 16 else str(data).encode()], handed)
    child.channel.settimeout(20)
    assert child.channel.recv(200).startswith(b"tokens")
    assert child.channel.recv(10) == b""  # closed with the child
    assert child.wait(10) == 0
    child.channel.close()


def test_a_child_knows_where_packages_lie(scratch: Path) -> None:
    """Before Python 3.14 `-S` leaves a virtual environment out, in which Triton for Windows has its compiler."""
    told = output(scratch, "import sys, sysconfig; print(sysconfig.get_path('platlib'), sys.prefix, sys.exec_prefix)")
    assert told.split() == [sysconfig.get_path("platlib"), sys.prefix, sys.prefix]


def test_exit_status_signal_and_traceback(scratch: Path) -> None:
    assert run(scratch, "import sys; sys.exit(3)").poll() == 3
    crashed = run(scratch, "import ctypes; ctypes.string_at(0)")
    assert crashed.poll() == -11
    assert "Segmentation fault" in crashed.log_tail()
    assert "ZeroDivisionError" in run(scratch, "1/0").log_tail()


def test_failure_to_start_is_told(scratch: Path) -> None:
    policy = sandbox.standard_policy(scratch, "cpu")
    child = sandbox.launch([sys.executable, "-c", ""], policy, cwd=scratch / "missing", log=scratch.parent / "log")
    assert child.wait(20) == 125
    assert "No such file" in child.log_tail()
    child.channel.close()


def test_packages(scratch: Path) -> None:
    code = """
import importlib.util
names = ["numpy", "safetensors", "torch", "bible", "optuna", "anthropic", "git", "tests", "cli", "prepare"]
print([name for name in names if importlib.util.find_spec(name)])
"""
    installed = [name for name in ("numpy", "safetensors", "torch") if __import__("importlib").util.find_spec(name)]
    assert output(scratch, code) == str(installed)


def test_a_child_names_versions_as_its_parent_does(scratch: Path) -> None:
    """Also of a package whose folder is closed to it: what was chosen by time is kept under them, and what benchmarks
    keep a recipe finds."""
    measured = pytest.importorskip("kernels.measured", reason="it needs torch")
    names = ("torch", "numpy", "optuna", "no-such-package")
    told = output(scratch, f"from kernels.measured import installed; print(installed({names!r}))")
    here = measured.installed(names)
    assert told == str(here) and any(name.startswith("optuna-") for name in here)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["everything", "Landlock 1, no namespaces"])
def test_torch_compiles(name: str, scratch: Path) -> None:
    pytest.importorskip("torch")
    code = """
import torch
@torch.compile
def f(x): return torch.nn.functional.gelu(x).sum()
x = torch.linspace(-1, 1, 64)
print(abs(f(x).item() - torch.nn.functional.gelu(x).sum().item()) < 1e-4)
"""
    child = run(scratch, code, timeout=240, layers=LAYERS[name])
    assert child.poll() == 0, child.log_tail()
    assert child.log_tail(1) == "True"
    assert list(scratch.glob("caches/inductor/**/*.so"))


# --- the parts, without a kernel -------------------------------------------------------------------


def test_policy_leaves_private_folders_out(scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "home"))
    rules = sandbox.standard_policy(scratch, "cpu").rules()
    opened = [Path(path) for path, rights in rules if rights != landlock.LIST]
    private = [paths.home(), Path("~").expanduser(), paths.project_root(), paths.project_root() / "tests", Path("/")]
    private += [paths.project_root() / "labs", paths.project_root() / "prepare.py", Path("/proc"), Path("/tmp")]
    private += [Path(folder) / "bible" for folder in readable.package_folders()]
    for place in private:
        assert [path for path in opened if path == place or path in place.parents] == []


@pytest.mark.skipif(sys.platform != "linux", reason="these trees are Linux's")
def test_cards_on_every_pci_root_can_be_looked_up(tmp_path: Path) -> None:
    """A desktop has one, a server one for each socket or more."""
    for name in ("pci0000:00", "pci0000:c0", "pci0001:00", "system"):
        (tmp_path / name).mkdir()
    assert readable.pci_roots(tmp_path) == [f"{tmp_path}/pci{n}" for n in ("0000:00", "0000:c0", "0001:00")]
    here = {str(path) for path in Path("/sys/devices").glob("pci*")}
    assert here <= dict(readable.devices("cuda")).keys()
    assert not here & dict(readable.devices("cpu")).keys()


def test_around_divides_only_what_it_must(tmp_path: Path) -> None:
    for folder in ("a/open", "a/closed", "b"):
        (tmp_path / folder).mkdir(parents=True)
    rules = dict(readable.around(tmp_path, [tmp_path / "a/closed"], landlock.READ))
    assert rules == {
        str(tmp_path): landlock.LIST,
        str(tmp_path / "a"): landlock.LIST,
        str(tmp_path / "a/open"): landlock.READ,
        str(tmp_path / "b"): landlock.READ,
    }


def filtered(
    machine: str, call: str | int, *arguments: int, arch: int = 0, own: int | None = None, cuda: bool = False
) -> int:
    """What the filter returns for a call: a small interpreter of the BPF that `seccomp` makes."""
    number = call if isinstance(call, int) else seccomp.CALLS[call][list(seccomp.ARCHITECTURES).index(machine)]
    padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("=iIQ6Q", number, arch or seccomp.ARCHITECTURES[machine], 0, *padded)
    program = list(struct.iter_unpack("=HBBI", seccomp.program(machine, own, cuda)))
    at = accumulator = 0
    while True:
        code, yes, no, value = program[at]
        at += 1
        if code == seccomp.LOAD:
            accumulator = struct.unpack_from("=I", data, value)[0]
        elif code == seccomp.AND:
            accumulator &= value
        elif code == seccomp.RETURN:
            return value
        else:
            met = {
                seccomp.JUMP_EQUAL: accumulator == value,
                seccomp.JUMP_ANY_BIT: accumulator & value,
                seccomp.JUMP_AT_LEAST: accumulator >= value,
            }[code]
            at += yes if met else no


@pytest.mark.parametrize("machine", seccomp.ARCHITECTURES)
def test_filter(machine: str) -> None:
    for call in seccomp.REFUSED:
        if seccomp.CALLS[call][list(seccomp.ARCHITECTURES).index(machine)] is not None:
            assert filtered(machine, call) == seccomp.ERRNO | 13, call
    assert filtered(machine, "clone3") == seccomp.ERRNO | 38
    assert filtered(machine, "memfd_create") == seccomp.ERRNO | 38
    assert filtered(machine, "fchmod") == filtered(machine, "fadvise64", 3, 0, 0, 4) == seccomp.ERRNO
    assert filtered(machine, "mincore") == filtered(machine, "cachestat") == seccomp.ERRNO | 38
    assert filtered(machine, "madvise", 0, 4096, seccomp.MADV_PAGEOUT) == seccomp.ERRNO | 22
    assert filtered(machine, "madvise", 0, 4096, 4) == seccomp.ALLOW  # MADV_DONTNEED, as allocators call it
    assert filtered(machine, "preadv2", 3, 0, 1, 0, 0, seccomp.RWF_NOWAIT) == seccomp.ERRNO | 95
    assert filtered(machine, "preadv2", 3, 0, 1, 0, 0, 0) == seccomp.ALLOW
    assert filtered(machine, "clone", 0x003D0F00) == seccomp.ALLOW  # a thread
    assert filtered(machine, "clone", 0x10000000 | 17) == seccomp.ERRNO | 1  # CLONE_NEWUSER
    assert filtered(machine, "socketpair", 1, 1 | 0o2000000) == seccomp.ALLOW  # SOCK_STREAM | SOCK_CLOEXEC
    assert filtered(machine, "socketpair", 1, 2) == seccomp.ERRNO | 13  # SOCK_DGRAM
    assert filtered(machine, "openat", 0, 0, 0o1000) == seccomp.ERRNO | 1  # O_RDONLY | O_TRUNC
    assert filtered(machine, "openat", 0, 0, 0o1001) == seccomp.ALLOW
    assert filtered(machine, "prlimit64", 0, 7) == seccomp.ALLOW
    assert filtered(machine, "prlimit64", 1234, 7) == seccomp.ERRNO | 1
    assert filtered(machine, "kill", 1234) == seccomp.ALLOW  # Landlock's scope decides
    assert filtered(machine, "kill", 1234, own=77) == seccomp.ERRNO | 1
    assert filtered(machine, "kill", 0xFFFFFFFFFFFFFFFF, own=77) == seccomp.ERRNO | 1
    assert filtered(machine, "tgkill", 77, own=77) == seccomp.ALLOW
    assert filtered(machine, "socket", arch=0x40000003) == seccomp.KILL  # 32-bit x86
    assert filtered(machine, 5000) == seccomp.ALLOW
    if machine == "x86_64":
        assert filtered(machine, 0x40000000 + 41) == seccomp.KILL  # socket by its x32 number


def test_call_numbers_are_the_headers() -> None:
    headers = {
        "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        "aarch64": Path("/usr/include/asm-generic/unistd.h"),
    }
    found = 0
    for column, header in enumerate(headers.values()):
        if not header.exists():
            continue
        for line in header.read_text().splitlines():
            parts = line.split()
            if len(parts) == 3 and parts[0] == "#define" and parts[1].startswith("__NR") and parts[2].isdigit():
                name = parts[1].removeprefix("__NR3264_").removeprefix("__NR_")
                if name in seccomp.CALLS:
                    assert seccomp.CALLS[name][column] == int(parts[2]), name
                    found += 1
    if not found:
        pytest.skip("no kernel headers on this machine")


def test_macos_profile() -> None:
    rules = [("/a b", landlock.READ), ('/q"uote', landlock.WRITE), ("/lib", landlock.RUN), ("/site", landlock.LIST)]
    text = sandbox_macos.profile(rules)
    assert text.startswith("(version 1)\n(deny default)")
    assert "(deny network*)" in text
    assert '(allow file-read* (subpath "/a b"))' in text
    assert '(allow file-write* file-map-executable (subpath "/q\\"uote"))' in text
    assert '(allow process-exec* file-map-executable (subpath "/lib"))' in text
    assert '(allow file-read-data (literal "/site"))' in text
    assert text.count("(") == text.count(")")


# --- limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cgroups", [True, False])
def test_memory(cgroups: bool, scratch: Path) -> None:
    layers = sandbox.Layers(cgroups=cgroups)
    slow = "import time\nb = []\nwhile True: b.append(bytearray(b'x') * (4 << 20)); time.sleep(0.005)"
    child = run(scratch, slow, memory_bytes=200 << 20, layers=layers)
    assert child.poll() is not None and child.poll() < 0
    said = child.exceeded()
    assert said is not None and said.startswith("memory: ") and said.endswith(" of 200.0 MiB"), said
    assert child.peak_memory() > 150 << 20


def test_memory_is_that_of_the_tree(scratch: Path) -> None:
    each = "import os, time\nfor _ in range(4):\n    if not os.fork():\n        b = bytearray(b'x') * (60 << 20)\n        time.sleep(60)\ntime.sleep(60)"  # noqa: E501
    child = run(scratch, each, memory_bytes=200 << 20, layers=sandbox.Layers(cgroups=False))
    assert "of 200.0 MiB" in (child.exceeded() or "")


@pytest.mark.parametrize("name", ["everything", "no namespaces, no cgroups"])
def test_fork_storm(name: str, scratch: Path) -> None:
    need(LAYERS[name])
    child = run(scratch, selfcheck.STORM, processes=16, layers=LAYERS[name])
    assert (child.exceeded() or "").startswith("processes: ")


def test_endless_printing(scratch: Path, tmp_path: Path) -> None:
    child = start(
        scratch,
        "-c",
        "import os\nprint('first', flush=True)\nwhile True: os.write(1, b'y' * 63 + b'\\n')",
        log_bytes=100_000,
    )
    time.sleep(1.5)
    assert child.poll() is None
    child.kill()
    assert (tmp_path / "log").stat().st_size <= 100_000
    text = (tmp_path / "log").read_text()
    assert text.startswith("first\n") and "bytes not kept]" in text and text.endswith("y\n")
    assert child.log_tail(3) == "\n".join(["y" * 63] * 3)
    child.channel.close()


def test_file_size(scratch: Path) -> None:
    code = "open('big', 'wb').write(b'x' * 3000000)"
    child = run(scratch, code, file_bytes=1 << 20)
    assert "File too large" in child.log_tail()


def test_disk(scratch: Path) -> None:
    code = "import time\nfor n in range(400): open(str(n), 'wb').write(b'x' * 100000); time.sleep(0.02)\ntime.sleep(60)"
    child = run(scratch, code, disk_bytes=10 << 20)
    assert (child.exceeded() or "").endswith(" of 10.0 MiB")


def test_nothing_is_left_behind(scratch: Path) -> None:
    def count() -> tuple[int, int]:
        groups = sum(len(list(place.folder.glob("autoresearch-*"))) for place in sandbox.cgroups.places())
        return sum(1 for _ in Path("/proc/self/fd").iterdir()), groups

    run(scratch, "")
    before = count()
    for _ in range(5):
        run(scratch, "")
    assert count()[0] == before[0]
    assert [g for p in sandbox.cgroups.places() for g in p.folder.glob(f"autoresearch-{os.getpid()}-*")] == []


def test_a_rename_that_copies_is_no_method_where_a_class_keeps_it(tmp_path: Path) -> None:
    """As pathlib's accessor does in Python 3.10, through which torch's compiler renames."""

    def refuse_elsewhere(src: str, dst: str) -> None:
        if Path(src).parent != Path(dst).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        Path(src).rename(dst)

    class Accessor:
        rename = inside.Copying(refuse_elsewhere)

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("kept")
    Accessor().rename(tmp_path / "a" / "file", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept" and not list((tmp_path / "a").iterdir())
