"""What this machine is, and which backend fits it, with the reason. Imports no torch and no mlx.

`probe()` turns raw facts into a `Hardware`; `choose()` picks a backend. Both are pure once the facts are given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from core.apple import Apple, identify
from core.commands import pip_install
from core.contract import Choice
from core.errors import UserError
from core.facts import Facts, Gpu, GpuProblem, LocalFacts, Power
from core.paths import home, project_root
from core.torchbuild import Problem as TorchProblem
from core.torchbuild import TorchBuild
from core.torchbuild import problem as torch_problem
from core.windows import under_wsl

GIB = 2**30

BACKENDS: Mapping[str, str] = {  # in the order of detection
    "cuda": "a data-centre GPU of NVIDIA (A100, H100, H200, B200)",
    "rtx": "a GeForce, RTX or other NVIDIA GPU from Turing (compute capability 7.5) on",
    "mlx": "an Apple Silicon Mac",
    "cpu": "any processor",
}
_DATACENTRE = {(8, 0), (9, 0), (10, 0), (10, 3)}
_MIN_CAPABILITY = {"cuda": (8, 0), "rtx": (7, 5)}
_MIN_GPU_MEMORY = 4 * GIB
_OLDEST_DARWIN = 23  # the kernel of macOS 14, which MLX's wheels ask for
_MIN_UNIFIED = 7 * GIB  # macOS keeps about a third of it from the GPU
_MEMORY_TOLERANCE = 0.93  # a "4 GB" card reports a little less: 3.8 GiB


@dataclass(frozen=True)
class Hardware:
    """One machine. Sizes in bytes; `cores` and `memory` are what this process may use, not what is built in."""

    os: str  # "linux", "darwin", "windows"
    release: str
    machine: str  # "x86_64", "arm64", ...
    cpu: str  # model name
    flags: tuple[str, ...]  # instruction sets that matter for the speed of training
    cores: int  # usable physical cores, at least 1
    threads: int  # usable logical processors, at least 1
    cores_reason: str
    memory: int
    memory_free: int
    memory_reason: str
    disk_free: int  # where data and records go
    gpus: tuple[Gpu, ...] = ()  # those that CUDA_VISIBLE_DEVICES leaves, in CUDA's order
    gpu_problem: str = ""  # why a GPU that seems to be there cannot be used
    chip: str = ""  # "Apple M4 Max"
    apple: Apple = field(default=Apple())  # what is particular to such a chip
    emulated: bool = False  # an x86 Python on an Apple chip (Rosetta)
    wsl: bool = False
    container: bool = False
    mlx: bool = False  # the library is installed
    torch: TorchBuild = field(default=TorchBuild())
    git: str = ""  # version; empty: none found
    power: Power = field(default=Power())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        """One line for banners: "AMD EPYC, 2 cores, 24 GiB"."""
        parts = [g.name for g in self.gpus[:1]]
        parts += [self.chip or self.cpu, f"{self.cores} core{'s' if self.cores > 1 else ''}", _gib(self.memory)]
        parts += [self.apple.summary()]
        return ", ".join(p for p in parts if p)


def probe(source: Facts | None = None) -> Hardware:
    """Look at the machine. Takes about 20 ms; a broken GPU driver or a missing command is noted, never raised."""
    facts = source or LocalFacts()
    system, release, machine = facts.system()
    os_name = system.lower()
    chip, emulated = _apple(facts) if os_name == "darwin" else ("", False)
    cores, threads, cores_reason = _cores(facts, os_name)
    memory, free, memory_reason = _memory(facts)
    gpus, problem = _gpus(facts, os_name)
    return Hardware(
        os=os_name,
        release=release,
        machine={"AMD64": "x86_64", "aarch64": "arm64"}.get(machine, machine),
        cpu=_cpu_name(facts, os_name) or machine,
        flags=_flags(facts, os_name),
        cores=cores,
        threads=threads,
        cores_reason=cores_reason,
        memory=memory,
        memory_free=free,
        memory_reason=memory_reason,
        disk_free=facts.disk_free(str(home())),
        gpus=gpus,
        gpu_problem=problem,
        chip=chip,
        apple=identify(chip, facts) if chip and not emulated else Apple(),
        emulated=emulated,
        wsl=under_wsl(release),
        container=_in_container(facts),
        mlx=facts.installed("mlx"),
        torch=facts.torch(),
        git=_git(facts),
        power=facts.power(),
    )


# --- processor ---------------------------------------------------------------------------------


def processor(source: Facts | None = None) -> str:
    """What trains where no NVIDIA card does: "AMD EPYC, 2 cores" or "Apple M4 Max, 16 cores, 40 GPU cores"."""
    facts = source or LocalFacts()
    system, _, machine = facts.system()
    chip, emulated = _apple(facts) if system == "Darwin" else ("", False)
    gpu_cores = identify(chip, facts).gpu_cores if chip and not emulated else 0
    cores = usable_cores(facts)
    parts = [chip or _cpu_name(facts, system.lower()) or machine, f"{cores} core{'s' if cores > 1 else ''}"]
    return ", ".join([*parts, *([f"{gpu_cores} GPU cores"] if gpu_cores else [])])


def _cpu_name(facts: Facts, os_name: str) -> str:
    if os_name == "darwin":
        return facts.run("sysctl", "-n", "machdep.cpu.brand_string") or ""
    if os_name == "windows":
        return facts.environ().get("PROCESSOR_IDENTIFIER", "")
    match = re.search(r"^(?:model name|Model|cpu)\s*:\s*(.+)$", facts.read("/proc/cpuinfo") or "", re.MULTILINE)
    return match.group(1).strip() if match else ""


_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_bf16",
    "amx_tile",
    "asimd",
    "asimdhp",
    "bf16",
    "i8mm",
    "sve",
    "sve2",
)


def _flags(facts: Facts, os_name: str) -> tuple[str, ...]:
    if os_name != "linux":
        return ()
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", facts.read("/proc/cpuinfo") or "", re.MULTILINE)
    words = set(match.group(1).split()) if match else set()
    return tuple(flag for flag in _FLAGS if flag in words)


def _apple(facts: Facts) -> tuple[str, bool]:
    """(chip name, Python runs under Rosetta)."""
    brand = facts.run("sysctl", "-n", "machdep.cpu.brand_string") or ""
    emulated = facts.run("sysctl", "-n", "sysctl.proc_translated") == "1"
    return (brand, emulated) if brand.startswith("Apple") or emulated else ("", False)


def usable_cores(facts: Facts) -> int:
    """Physical cores that this process may use."""
    return _cores(facts, facts.system()[0].lower())[0]


def _cores(facts: Facts, os_name: str) -> tuple[int, int, str]:
    """(usable physical cores, usable logical processors, why so many)."""
    physical, logical = facts.cores()
    allowed = list(facts.cpus())
    logical = max(logical, len(allowed), 1)
    threads = len(allowed) or logical
    cores = _distinct_cores(facts, allowed) if os_name == "linux" else 0
    if not cores:
        cores = min(physical or logical, threads)
    reasons = [f"{threads} of {logical} processors by CPU affinity"] if threads < logical else []
    quota = _cpu_quota(facts)
    if quota and quota < threads:
        cores = max(1, min(cores, math.floor(quota)))
        threads = max(1, min(threads, math.ceil(quota)))
        reasons.append(f"the container's CPU quota is {quota:g}")
    if not reasons:
        reasons.append(f"{logical} processors on {cores} physical cores" if cores < logical else "all of the machine")
    return cores, threads, "; ".join(reasons)


def _distinct_cores(facts: Facts, cpus: Sequence[int]) -> int:
    """Physical cores behind these logical processors; 0: unknown."""
    found = set()
    for cpu in cpus:
        siblings = facts.read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        if siblings is None:
            return 0
        found.add(siblings.strip())
    return len(found)


# --- limits of containers ----------------------------------------------------------------------


def _groups(facts: Facts, controller: str) -> list[str]:
    """Folders of this process's control groups, innermost first: of the controller (v1), else of the one tree (v2)."""
    v2: list[str] = []
    for line in (facts.read("/proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if names == "":
            v2 = _upwards("/sys/fs/cgroup", path)
        elif controller in names.split(","):
            return _upwards(f"/sys/fs/cgroup/{controller}", path)
    return v2


def _upwards(root: str, path: str) -> list[str]:
    parts = [p for p in path.split("/") if p not in ("", "..")]
    return ["/".join([root, *parts[:n]]) for n in range(len(parts), -1, -1)]


def _cpu_quota(facts: Facts) -> float:
    """Processors that the control group allows; 0: no limit."""
    limits = []
    for folder in _groups(facts, "cpu"):
        words = (facts.read(f"{folder}/cpu.max") or "").split()
        if not words:
            words = [(facts.read(f"{folder}/cpu.cfs_{key}_us") or "").strip() for key in ("quota", "period")]
        quota, period = (_whole(w) for w in (*words, "", "")[:2])
        if quota > 0 and period > 0:
            limits.append(quota / period)
    return min(limits, default=0.0)


def _memory(facts: Facts) -> tuple[int, int, str]:
    total, free = facts.memory()
    reason = "all of the machine"
    for folder in _groups(facts, "memory"):
        for limit_file, used_file in (
            ("memory.max", "memory.current"),
            ("memory.high", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit = _whole(facts.read(f"{folder}/{limit_file}") or "")
            if not 0 < limit < total:
                continue
            used = _whole(facts.read(f"{folder}/{used_file}") or "")
            cache = re.search(r"^(?:total_)?inactive_file (\d+)$", facts.read(f"{folder}/memory.stat") or "", re.M)
            free = min(free, max(0, limit - used + int(cache.group(1) if cache else 0)))
            total, reason = limit, f"the container's memory limit is {_gib(limit)}"
    return total, free, reason


def _whole(text: str) -> int:
    text = text.strip()
    return int(text) if text.isdecimal() else 0


def _in_container(facts: Facts) -> bool:
    if any(facts.read(marker) is not None for marker in ("/.dockerenv", "/run/.containerenv")):
        return True
    words = facts.read("/proc/1/cgroup") or ""
    return any(w in words for w in ("docker", "kubepods", "containerd", "lxc"))


def _git(facts: Facts) -> str:
    match = re.search(r"(\d+\.\d+(?:\.\d+)*)", facts.run("git", "--version") or "")
    return match.group(1) if match else ""


# --- GPUs --------------------------------------------------------------------------------------


def _gpus(facts: Facts, os_name: str) -> tuple[tuple[Gpu, ...], str]:
    """(devices that this process may use, what is wrong if one seems to be there and cannot be used)."""
    if os_name == "darwin":
        return (), ""
    try:
        listed = list(facts.nvidia())
    except GpuProblem as error:
        seen = _nvidia_card(facts, os_name)
        return (), f"{seen} does not answer ({error})" if seen else ""
    chosen = facts.environ().get("CUDA_VISIBLE_DEVICES")
    visible = _visible(listed, chosen, facts.environ().get("CUDA_DEVICE_ORDER", ""))
    if listed and not visible:
        return (), f"CUDA_VISIBLE_DEVICES={chosen!r} leaves none of {len(listed)} NVIDIA GPU(s)"
    return tuple(visible), ""


def _nvidia_card(facts: Facts, os_name: str) -> str:
    """Where an NVIDIA card was seen whose driver does not answer, up to that verb; "" where none was."""
    if os_name == "windows":
        known = any(name.upper().startswith("VEN_10DE") for name in facts.pci_devices())
        return "Windows knows an NVIDIA card, but its driver" if known else ""
    if _on_the_bus(facts):
        return "an NVIDIA GPU is on the bus, but its driver"
    if "dxg" in facts.listdir("/dev"):  # WSL2; it does not say whose card it is
        return "WSL2 passes a graphics card through (/dev/dxg), but if it is NVIDIA's its driver"
    return ""


def _on_the_bus(facts: Facts) -> bool:
    root = "/sys/bus/pci/devices"
    for name in facts.listdir(root):
        vendor, kind = (facts.read(f"{root}/{name}/{f}") or "" for f in ("vendor", "class"))
        if vendor.strip() == "0x10de" and kind.strip().startswith("0x03"):
            return True
    return bool(facts.listdir("/proc/driver/nvidia/gpus"))


def _visible(listed: Sequence[Gpu], chosen: str | None, order: str) -> list[Gpu]:
    """What CUDA would number 0, 1, ...: entries up to the first that is not valid, as the driver reads them."""
    gpus = list(listed)
    if order != "PCI_BUS_ID" and len({g.name for g in gpus}) > 1:
        # CUDA's own order puts the fastest card first, the others stay in the order of the bus.
        gpus.sort(key=lambda g: (g.capability, g.memory), reverse=True)
        gpus = gpus[:1] + sorted(gpus[1:], key=lambda g: g.index)
    flat = [part for g in gpus for part in (g.parts or (g,))]
    if chosen is None:
        return flat
    found: list[Gpu] = []
    for item in (word.strip() for word in chosen.split(",")):
        if item.isdecimal() and int(item) < len(gpus):
            gpu: Gpu | None = (gpus[int(item)].parts or (gpus[int(item)],))[0]
        elif item.startswith(("GPU-", "MIG-")):
            matches = [g for g in (*flat, *gpus) if g.uuid.startswith(item)]
            gpu = (matches[0].parts or (matches[0],))[0] if matches else None
        else:
            gpu = None
        if gpu is None or gpu in found:
            break
        found.append(gpu)
    return found


# --- the choice --------------------------------------------------------------------------------


def built() -> list[str]:
    """Backends that this version has, in the order of detection: folders with all three files."""
    root = project_root() / "backends"
    files = ("train.py", "device.py", "profiles.py")
    return [name for name in BACKENDS if all((root / name / f).is_file() for f in files)]


def suits(hardware: Hardware, name: str) -> tuple[bool, str]:
    """(whether this machine can run the backend, the fact that decides it)."""
    if name == "cpu":
        return True, f"{hardware.cpu}, {hardware.cores} usable core(s), {_gib(hardware.memory)}"
    if name == "mlx":
        return _suits_mlx(hardware)
    if not hardware.gpus:
        return False, hardware.gpu_problem or "no NVIDIA GPU was found"
    gpu = hardware.gpus[0]
    what = f"{gpu.name}, {_gib(gpu.memory)}, {gpu.arch}"
    if gpu.capability < (least := _MIN_CAPABILITY[name]):
        return False, f"{gpu.name} has compute capability {_dotted(gpu.capability)}, below {_dotted(least)}"
    if gpu.memory < _MIN_GPU_MEMORY * _MEMORY_TOLERANCE:
        return False, f"{gpu.name} has {_gib(gpu.memory)}, below {_gib(_MIN_GPU_MEMORY)}"
    if name == "cuda" and gpu.capability not in _DATACENTRE:
        own = ", ".join(f"{major}.{minor}" for major, minor in sorted(_DATACENTRE))
        return False, f"{what} is none of the cards that the cuda backend is for (compute capability {own})"
    if wrong := _wrong_torch(hardware):
        return False, f"{what}: {wrong.fact}"
    return True, what


def remedy(hardware: Hardware) -> str:
    """What makes an NVIDIA GPU usable that is there and cannot be used; "" where nothing is known to help."""
    problem = hardware.gpu_problem
    if "CUDA_VISIBLE_DEVICES" in problem:
        return "unset CUDA_VISIBLE_DEVICES, or name a GPU that `nvidia-smi -L` lists"
    if "nvidia-ml-py" in problem:
        return pip_install("nvidia-ml-py")
    if "/dev/dxg" in problem:
        return "install or update NVIDIA's driver in Windows, none inside WSL2; then `wsl --shutdown`"
    if "mismatch" in problem.lower():
        return "restart the machine"
    if problem:
        return "run nvidia-smi; if it fails too, install NVIDIA's driver"
    wrong = _wrong_torch(hardware)
    return wrong.action if wrong else ""


def _wrong_torch(hardware: Hardware) -> TorchProblem | None:
    """Why the installed torch cannot use the first card."""
    gpu = hardware.gpus[0] if hardware.gpus else None
    return torch_problem(hardware.torch, gpu.driver, gpu.capability) if gpu else None


def _mend(hardware: Hardware, fact: str) -> str:
    """The remedy where `fact` is what it mends; another torch makes no card of another kind."""
    wrong = _wrong_torch(hardware)
    mendable = fact == hardware.gpu_problem or (wrong is not None and fact.endswith(wrong.fact))
    return remedy(hardware) if mendable else ""


def _suits_mlx(hardware: Hardware) -> tuple[bool, str]:
    if hardware.os != "darwin":
        return False, f"this is {hardware.os}, not macOS on Apple Silicon"
    darwin = _whole(hardware.release.split(".")[0])
    if hardware.chip and not hardware.emulated and 0 < darwin < _OLDEST_DARWIN:
        return False, f"macOS {darwin - 9} is too old for MLX, which asks for macOS 14: update the system"
    if hardware.emulated:
        return False, f"this Python is built for Intel and runs under Rosetta on {hardware.chip or 'an Apple chip'}"
    if not hardware.chip:
        return False, f"{hardware.cpu} is no Apple Silicon"
    if 0 < hardware.memory < _MIN_UNIFIED:
        return False, f"{hardware.chip} with {_gib(hardware.memory)} of unified memory, below {_gib(_MIN_UNIFIED)}"
    if not hardware.mlx:
        return False, f"MLX is not installed on this {hardware.chip}: {pip_install('mlx')}"
    return True, ", ".join(part for part in (hardware.chip, _gib(hardware.memory), hardware.apple.summary()) if part)


def _on_linux(hardware: Hardware) -> bool:
    """MLX's builds for Linux serve to try the backend out: used when asked for, never by themselves."""
    return hardware.os == "linux" and hardware.mlx


def choose(hardware: Hardware, wanted: str | None = None, available: Sequence[str] | None = None) -> Choice:
    """The backend for this machine. An explicit `wanted` works or raises UserError; it is never replaced.

    `available`: the backends of this version, by default those whose folders are complete.
    """
    present = list(built() if available is None else available)
    if wanted is not None:
        return _chosen(hardware, wanted, present)
    fitting = [(name, fact) for name in BACKENDS for ok, fact in [suits(hardware, name)] if ok]
    best, fact = fitting[0]
    if best in present:
        return Choice(best, fact if best != "cpu" else f"{_why_cpu(hardware)}: {fact}")
    for name, other in fitting[1:]:
        if name in present:
            cost = "that device stays idle and experiments are as slow as the processor is"
            return Choice(
                name, f"{fact} would take the {best} backend, which this version does not have; {cost}: {other}"
            )
    raise UserError(f"no backend is installed for {fact}", f"this version has: {', '.join(present) or 'none'}")


def _chosen(hardware: Hardware, wanted: str, present: Sequence[str]) -> Choice:
    if wanted not in BACKENDS:
        raise UserError(f"there is no backend {wanted!r}", f"known are: {', '.join(BACKENDS)}")
    if wanted not in present:
        raise UserError(
            f"the backend {wanted} (for {BACKENDS[wanted]}) is not built in this version",
            f"choose --backend {' or '.join(present) or 'none'}",
        )
    ok, fact = suits(hardware, wanted)
    if wanted == "mlx" and _on_linux(hardware):
        return Choice(wanted, f"as asked with --backend mlx: MLX's build for Linux, {hardware.summary()}")
    if wanted == "mlx" and hardware.os == "linux":
        fact += "; to try MLX's build for Linux: pip install -e '.[mlx]'"
    if not ok:
        possible = [name for name in present if suits(hardware, name)[0]]
        other = f"choose --backend {' or '.join(possible)}"
        mend = _mend(hardware, fact)
        raise UserError(f"the backend {wanted} cannot run here: {fact}", f"{mend}; or {other}" if mend else other)
    return Choice(wanted, f"as asked with --backend {wanted}: {fact}")


ARM_PYTHON = "install Python for arm64, from python.org or by `arch -arm64 brew install python`"


def torch_for_cpu(hardware: Hardware) -> str:
    """What brings the PyTorch that the cpu backend needs."""
    if hardware.emulated:
        return f"{ARM_PYTHON}, and make the virtual environment again with it"
    if hardware.os == "darwin" and not hardware.chip:
        return "there is none for Macs with Intel's processors since PyTorch 2.3: use another machine"
    return pip_install("torch")


def _why_cpu(hardware: Hardware) -> str:
    for name in ("rtx", "mlx"):
        _, fact = suits(hardware, name)
        if name == "rtx" and (mend := _mend(hardware, fact)):
            return f"{fact} (to use it: {mend})"
        if hardware.gpu_problem or hardware.gpus or (name == "mlx" and hardware.os == "darwin"):
            return fact
    return "no GPU was found"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _gib(size: int) -> str:
    return f"{size / GIB:.0f} GiB" if size >= 10 * GIB else f"{size / GIB:.1f} GiB"
