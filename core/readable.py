"""What every child may read besides its own folders: interpreter, libraries, compiler, listed packages, kernel facts.

Landlock's rules only add: a rule on a folder opens all beneath it. Folders of installed packages are therefore never
opened as a whole, but package by package; a folder that holds one is opened child by child around it.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from core import landlock, paths

Rules = list[tuple[str, int]]


def words(text: str) -> list[str]:
    return text.split()


# Top-level names in package folders. Never `bible`: that package holds a data set, validation text included.
COMMON = words(
    "numpy numpy.libs safetensors psutil packaging typing_extensions typing_inspection setuptools _distutils_hack "
    "pkg_resources tqdm filelock fsspec jinja2 markupsafe sympy isympy mpmath networkx yaml _yaml ml_dtypes"
)
BACKENDS = {
    "torch": words(
        "torch torchgen functorch torch.libs triton pytorch_triton triton_windows nvidia cuda cuda_bindings "
        "cuda_pathfinder cusparselt cusparselt_cu12 intel_openmp mkl tbb umf tcmlib opt_einsum expecttest "
        "flash_attn flash_attn_interface flash_attn_3 flash_attn_config einops"
    ),
    "mlx": words("mlx mlx.libs mlx_metal mlx_cpu mlx_cuda nvidia"),
}
NVIDIA = ("cuda", "rtx")  # backends whose children load NVIDIA's driver
LIBRARIES = {"cpu": ("torch",), "cuda": ("torch",), "rtx": ("torch",), "mlx": ("mlx",)}

SYSTEM = words(  # programs, libraries, headers: no user's data
    "/usr/bin /usr/sbin /usr/lib /usr/lib32 /usr/lib64 /usr/libexec /usr/include /usr/local/bin /usr/local/lib "
    "/usr/local/lib64 /usr/local/include /bin /sbin /lib /lib64 /nix/store /opt/rocm /usr/local/cuda "
    "/usr/local/nvidia "  # the driver's libraries in many containers
    "/etc/ld.so.cache /etc/ld.so.conf /etc/ld.so.conf.d /etc/ld.so.preload /etc/localtime /usr/share/zoneinfo "
    "/etc/ssl/openssl.cnf /etc/pki/tls/openssl.cnf /usr/share/locale /System/Library /usr/share/icu "
    "/Library/Developer/CommandLineTools /Applications/Xcode.app/Contents/Developer"
)
KERNEL = words(  # facts about the machine; of processes only the child itself (see launcher.confine)
    "/proc/self /proc/cpuinfo /proc/meminfo /proc/stat /proc/version /proc/filesystems /proc/uptime /proc/loadavg "
    "/proc/vmstat /proc/devices /proc/sys/vm/overcommit_memory /proc/sys/vm/max_map_count "
    "/proc/sys/kernel/osrelease /proc/sys/kernel/ostype /proc/sys/kernel/pid_max /proc/sys/kernel/threads-max "
    "/sys/devices/system /sys/kernel/mm/transparent_hugepage /sys/kernel/mm/hugepages "
    "/dev/zero /dev/urandom /dev/random"
)
GPU_KERNEL = words("/sys/module/nvidia /sys/bus/pci /sys/class/drm /sys/class/kfd /etc/OpenCL")
# What CUDA reads at its start (canonical/snapd's interface `cuda-support`; nvidia-uvm: nolabs-ai/nono #673). Without
# /proc/modules it takes the driver for one that is not loaded and tries to load it (NVIDIA/nvidia-modprobe). That list
# names no data of anybody's, and its addresses are zeros to all who lack the privilege.
NVIDIA_PROC = ("driver/nvidia*", "sys/vm/mmap_min_addr", "modules")
# The daemon itself is never reached (core/seccomp.py); where its folder is there and may not be looked into, NVML takes
# that for a lack of permissions and gives up (NVIDIA/OpenShell #710). It holds a socket and a process's number.
PERSISTENCED = "/run/nvidia-persistenced"
# The driver's libraries where a container brings them: Colab; Apptainer's --nv
NVIDIA_LIBRARIES = ("/usr/lib64-nvidia", "/.singularity.d/libs")
GPU_DEVICES = ("nvidia*", "nvidia-caps/*", "dri/renderD*", "kfd", "dxg")


def package_folders() -> list[str]:
    """The package folders that this interpreter imports from, in its order."""
    return [p for p in dict.fromkeys(sys.path) if p.endswith("-packages") and Path(p).is_dir()]


def package_names(backend: str) -> list[str]:
    """Top-level names that a child of this backend may import."""
    return COMMON + [name for library in LIBRARIES.get(backend, ()) for name in BACKENDS[library]]


def packages(backend: str) -> Rules:
    """The listed packages and their metadata; of the folder itself the list of names."""
    wanted = set(package_names(backend))
    rules: Rules = []
    for folder in package_folders():
        rules.append((folder, landlock.LIST))
        for entry in sorted(path.name for path in Path(folder).iterdir()):
            name = entry.split("-")[0] if entry.endswith((".dist-info", ".egg-info")) else entry.split(".py")[0]
            if name in wanted or (name.partition(".")[0] in wanted and entry.endswith((".so", ".pyd", ".libs"))):
                rules.append((f"{folder}/{entry}", landlock.RUN))
    return rules


def around(root: Path, closed: Iterable[Path], rights: int) -> Rules:
    """`rights` on `root` without the `closed` folders: itself when none lies beneath it, else its children likewise.

    A folder that is so divided may be listed, as imports need it: names beneath it can be seen, contents cannot.
    """
    inside = [c for c in closed if c == root or root in c.parents]
    if not inside:
        return [(str(root), rights)]
    if root in inside or not root.is_dir():
        return []
    return [
        (str(root), landlock.LIST),
        *(rule for child in sorted(root.iterdir()) if not child.is_symlink() for rule in around(child, inside, rights)),
    ]


def closed_folders(roots: Iterable[Path]) -> set[Path]:
    """Package folders of any Python beneath `roots`, and our own data and records."""
    found = {Path(p).resolve() for p in package_folders()}
    found.add(paths.home().resolve())
    for root in roots:
        for pattern in ("python*/*-packages", "lib*/python*/*-packages", "*-packages"):
            found.update(path.resolve() for path in root.glob(pattern))
    return found


@lru_cache(maxsize=8)
def programs() -> tuple[tuple[str, int], ...]:
    """Interpreter, standard library, shared libraries and compiler."""
    base = Path(sys.base_prefix).resolve()
    roots = {Path(p).resolve() for p in SYSTEM if Path(p).exists()}
    if base not in (Path("/usr"), Path("/")):
        # "*-linux-gnu" is where conda keeps its compiler's headers
        wanted = [base / part for part in ("bin", "lib", "lib64", "libexec", "include", "Frameworks", "ssl")]
        roots.update(p.resolve() for p in [*wanted, *base.glob("*-linux-gnu")] if p.exists())
    for key in ("stdlib", "platstdlib", "include", "platinclude"):
        path = Path(sysconfig.get_path(key, vars={"base": sys.base_prefix, "platbase": sys.base_prefix})).resolve()
        if path.exists() and not any(root in path.parents for root in roots):
            roots.add(path)
    closed = closed_folders(roots)
    rules = [rule for root in sorted(roots) for rule in around(root, closed, landlock.RUN)]
    rules += [(str(Path(sys.executable).resolve()), landlock.RUN), (f"{sys.prefix}/pyvenv.cfg", landlock.READ)]
    return tuple(rules)


def project() -> Rules:
    """The parts of this project that children import. Not tests, prepare, labs."""
    root = paths.project_root()
    return [(str(root / part), landlock.READ) for part in ("core", "backends", "kernels")]


def pci_roots(devices: Path = Path("/sys/devices")) -> list[str]:
    """The trees of PCI devices, to which the links in /sys/bus/pci lead. A server has several, and its cards hang on
    any of them."""
    return sorted(str(path) for path in devices.glob("pci*"))


def cards_elsewhere(bus: Path = Path("/sys/bus/pci/devices"), devices: Path = Path("/sys/devices")) -> list[str]:
    """Folders of NVIDIA's cards outside these trees: under Hyper-V, a passed-through card hangs on the VMBus."""
    found = []
    for link in sorted(bus.glob("*")):
        try:
            vendor = (link / "vendor").read_text().strip()
        except OSError:
            continue
        place = link.resolve()
        if vendor == "0x10de" and not any(Path(root) in place.parents for root in pci_roots(devices)):
            found.append(str(place))
    return found


def driver_named() -> Rules:
    """libcuda where TRITON_LIBCUDA_PATH says: these files and the folder's list of names, nothing else in it. Who set
    the variable is the user; a recipe gets it as it is."""
    folder = os.environ.get("TRITON_LIBCUDA_PATH", "")
    files = sorted(Path(folder).glob("libcuda.so*")) if folder else []
    return [(folder, landlock.LIST), *((str(file.resolve()), landlock.RUN) for file in files)] if files else []


def devices(backend: str) -> Rules:
    found = [(path, landlock.DEVICE) for path in ("/dev/null",)]
    if backend != "cpu":  # also for `mlx[cuda]`; elsewhere there are none
        told = [str(path) for pattern in NVIDIA_PROC for path in sorted(Path("/proc").glob(pattern))]
        told += [PERSISTENCED, *pci_roots(), *cards_elsewhere()]
        found += [(path, landlock.READ) for path in (*GPU_KERNEL, *told)]
        found += [(str(p), landlock.DEVICE) for pattern in GPU_DEVICES for p in Path("/dev").glob(pattern)]
        found += [(path, landlock.RUN) for path in NVIDIA_LIBRARIES]
        found += driver_named()
    return found


def basics(backend: str) -> Rules:
    """All of the above, as (path, Landlock rights)."""
    kernel = [(path, landlock.READ) for path in KERNEL] if sys.platform == "linux" else []
    return [*programs(), *packages(backend), *project(), *kernel, *devices(backend)]
