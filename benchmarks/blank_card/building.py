"""Builds the blank card's library for the torch and Triton that are installed here, once."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from core.errors import UserError
from core.paths import home

SOURCES = Path(__file__).resolve().parent
NAME = "libcuda.so.1"
ALIASES = ("libcuda.so", "libnvidia-ml.so.1")  # what Triton's compiler and pynvml ask for
OURS = re.compile(r"(__)?(cuda|cublas)[A-Z]\w*|cu[A-Z](?!File)\w*")  # of the names that torch's libraries import
PRODUCTS = re.compile(r"cublasLtMatmul|cublas(?!Lt)\w*([Gg]em[mv]|[Dd]ot)\w*")


def obstacle() -> str:
    """Why no blank card can be built here, "" if one can."""
    try:
        _needs()
    except UserError as error:
        return str(error)
    return ""


def library() -> Path:
    """The folder that holds the library under each of its names. UserError where it cannot be built."""
    compiler, includes, torch = _needs()
    key = hashlib.sha256(f"{torch} {importlib.metadata.version('triton')}".encode())
    for file in _sources():
        key.update(file.read_bytes())
    folder = home() / "blank-card" / key.hexdigest()[:16]
    if not (folder / NAME).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as made:
            _build(Path(made), compiler, includes)
            if not folder.exists():  # else another process was faster
                Path(made).rename(folder)
                Path(made).mkdir()  # for what removes it
    return folder


def _sources() -> list[Path]:
    return [SOURCES / "building.py", SOURCES / "card.h", *sorted(SOURCES.glob("*.c"))]


# --- what it takes ----------------------------------------------------------------------------


@functools.cache
def _needs() -> tuple[str, tuple[Path, ...], str]:
    """The compiler, the folders of CUDA's headers, torch's version."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise UserError(f"the blank card is for Linux on x86_64, not {sys.platform} on {platform.machine()}")
    said = dict(re.findall(r"^(__version__|cuda)\b[^=\n]*= *'([^']*)'", _version_file(), re.MULTILINE))
    if "cuda" not in said:
        fact = f"torch {said.get('__version__', '')} is a build without CUDA"
        raise UserError(fact, "install PyPI's torch for Linux (pip install torch), which is built with CUDA")
    _triton()
    compiler = shutil.which("gcc")
    missing = [name for name in ("gcc", "nm") if not shutil.which(name)]
    if compiler is None or missing:
        raise UserError(f"{' and '.join(missing)} not found", "sudo apt install gcc (which brings binutils with nm)")
    return compiler, _includes(said["cuda"]), said["__version__"]


def _version_file() -> str:
    """torch's own, read: whoever starts the children need not load torch."""
    return (_place("torch") / "version.py").read_text(encoding="utf-8")


def _includes(cuda: str) -> tuple[Path, ...]:
    """The runtime's headers of torch's own CUDA, which pip installs beside torch, and Triton's for the driver."""
    major = int(cuda.split(".")[0])
    for folder in sorted(_packages().glob("nvidia/*/include")):
        header = folder / "cuda_runtime_api.h"
        if header.is_file() and f"#define CUDART_VERSION  {major}0" in header.read_text(errors="replace"):
            return folder, _triton() / "backends" / "nvidia" / "include"
    raise UserError(
        f"there is no cuda_runtime_api.h of CUDA {major} in {_packages() / 'nvidia'}",
        f"pip install nvidia-cuda-runtime{'' if major > 12 else f'-cu{major}'}",
    )


def _place(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(f"{module} is not installed", f"pip install {module}")
    return Path(spec.origin).parent


def _packages() -> Path:
    return _place("torch").parent


def _triton() -> Path:
    return _place("triton")


# --- building ---------------------------------------------------------------------------------


def _build(folder: Path, compiler: str, includes: Iterable[Path]) -> None:
    options = ["-O1", "-fPIC", *(f"-I{place}" for place in includes)]
    objects: list[Path] = []
    for source in SOURCES.glob("*.c"):
        objects.append(folder / f"{source.stem}.o")
        _run(compiler, *options, "-c", source, "-o", objects[-1])
    rest = folder / "rest.c"
    rest.write_text(_rest(_symbols("--defined-only", *objects)))
    link = ("-shared", f"-Wl,-soname,{NAME}", "-ldl", "-lpthread")
    _run(compiler, "-O1", "-fPIC", *objects, rest, *link, "-o", folder / NAME)
    for name in ALIASES:
        (folder / name).symlink_to(NAME)


def _rest(defined: set[str]) -> str:
    """Every other function that torch's libraries import or Triton's header declares: products count and succeed, the
    others say that they are not supported."""
    libraries = sorted(_packages().glob("torch/lib/lib*.so"))
    wanted = {name for name in _symbols("-D", "--undefined-only", *libraries) if OURS.fullmatch(name)}
    header = (_triton() / "backends" / "nvidia" / "include" / "cuda.h").read_text(errors="replace")
    wanted.update(re.findall(r"CUDAAPI\s+(cu\w+)\(", header))
    lines = ["int blank_product(const char *), blank_absent(const char *);"]
    for name in sorted(wanted - defined):
        kind = "product" if PRODUCTS.fullmatch(name) else "absent"
        lines.append(f'int {name}(void) {{ return blank_{kind}("{name}"); }}')
    return "\n".join(lines) + "\n"


def _symbols(*arguments: str | Path) -> set[str]:
    """Names without their versions: `cudaMalloc@libcudart.so.13` is cudaMalloc."""
    lines = _run("nm", "-P", *arguments).splitlines()
    return {line.split()[0].partition("@")[0] for line in lines if line and not line.endswith(":")}


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        last = " ".join(done.stderr.split())[-400:]
        raise UserError(f"{Path(command[0]).name} failed: {last}", "the blank card is built with gcc and nm")
    return done.stdout
