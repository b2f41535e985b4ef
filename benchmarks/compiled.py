"""What a Triton kernel becomes on a card that is not there: registers, spills and shared memory.

Triton compiles for any target without a GPU or a driver; the `cuobjdump` that it brings along reads the resources of
the finished binary. Nothing is launched: this says whether a configuration fits a card, not whether it is right or
fast.

    found = compiled(kernel, {"X": "*bf16", "n": "i32", "BLOCK": "constexpr"}, {"BLOCK": 128}, 4, 2, cc=90)
    found.registers, found.spills, found.shared, found.problems()
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernels.targets import SHARED_MEMORY


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled for one card."""

    name: str
    cc: int
    num_warps: int
    num_stages: int
    registers: int  # per thread
    spills: int  # bytes per thread of stack and local memory
    shared: int  # bytes per block, static and dynamic
    ptx: str = field(repr=False)
    ttgir: str = field(repr=False, default="")  # Triton's own code, with the layouts of what threads hold

    @property
    def blocks(self) -> int:
        """How many blocks fit an SM by registers alone (64 K of them, handed out to a warp by the 256)."""
        per_warp = -(-self.registers * 32 // 256) * 256
        return 65536 // (per_warp * self.num_warps) if per_warp else 32

    def count(self, instruction: str) -> int:
        """How often an instruction stands in the PTX: `wgmma.mma_async`, `mma.sync`, `tcgen05.mma`, `atom`, ..."""
        return len(re.findall(rf"(?<![\w.]){re.escape(instruction)}\b", self.ptx))

    def problems(self) -> list[str]:
        """What is wrong with it, one sentence each; empty when it fits."""
        found = []
        if self.spills:
            found.append(
                f"{self.name} sm_{self.cc}: {self.spills} bytes per thread spilled ({self.registers} registers)"
            )
        if self.shared > SHARED_MEMORY[self.cc]:
            found.append(
                f"{self.name} sm_{self.cc}: {self.shared} bytes of shared memory, {SHARED_MEMORY[self.cc]} at most"
            )
        return found


def compiled(
    kernel: Any,  # a function under @triton.jit
    signature: Mapping[str, str],  # argument -> type ("*bf16", "i32", "fp32", "constexpr"), in the kernel's order
    constants: Mapping[str, Any],  # values of the constexpr arguments
    num_warps: int,
    num_stages: int,
    cc: int,  # 90 for sm_90
    aligned: Collection[str] = (),  # integer arguments that are multiples of 16; pointers always count as aligned
    most: int | None = None,  # registers that a thread may have, where a launch says so (`maxnreg`)
) -> Compiled:
    """Compile `kernel` for sm_`cc` and read what it needs. Raises what Triton or ptxas raises where it cannot."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from triton.runtime.jit import JITFunction

    if cc not in SHARED_MEMORY:
        raise ValueError(f"no limits known for sm_{cc}; known: {', '.join(map(str, SHARED_MEMORY))}")
    if not isinstance(kernel, JITFunction):
        raise TypeError(f"{kernel!r} is not a compiled kernel; is TRITON_INTERPRET set?")
    unknown = set(signature) ^ set(kernel.arg_names)
    if unknown:
        raise ValueError(f"{kernel.__name__}: signature and arguments differ in {', '.join(sorted(unknown))}")
    types = {name: signature[name] for name in kernel.arg_names}
    hint = [["tt.divisibility", 16]]
    attrs = {
        (i,): hint for i, (n, t) in enumerate(types.items()) if t[0] == "*" or (n in aligned and n not in constants)
    }
    source = ASTSource(kernel, types, dict(constants), attrs)
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": most}
    binary = compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    use = resources(binary.asm["cubin"])
    return Compiled(
        name=kernel.__name__,
        cc=cc,
        num_warps=num_warps,
        num_stages=num_stages,
        registers=use["REG"],
        spills=use["STACK"] + use["LOCAL"],
        shared=use["SHARED"] + binary.metadata.shared,
        ptx=binary.asm["ptx"],
        ttgir=binary.asm["ttgir"],
    )


@dataclass(frozen=True)
class Case:
    """One kernel with one configuration for one target."""

    label: str
    kernel: Any  # under @triton.jit
    target: int  # compute capability
    types: Mapping[str, str]  # of the arguments that are no constants
    constants: Mapping[str, Any]
    warps: int
    stages: int
    aligned: tuple[str, ...] = ()  # integers that are multiples of 16
    expected: str = ""  # an instruction that must be there: a product that misses the tensor cores is useless
    most: int | None = None  # registers of a thread, where the launch says so

    def compile(self) -> Compiled:
        signature = dict(self.types) | dict.fromkeys(self.constants, "constexpr")
        return compiled(
            self.kernel, signature, self.constants, self.warps, self.stages, self.target, self.aligned, self.most
        )


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL and (static) SHARED of the one function in a binary. Bytes, except for REG."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(cuobjdump()), "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    if len(found) < 4:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    return found


def cuobjdump() -> Path:
    """The binary that Triton's wheel brings along; the wheel for Windows brings none, and the CUDA toolkit does."""
    import triton

    place = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for name in ("cuobjdump", "cuobjdump.exe"):
        if (place / name).is_file():
            return place / name
    if found := shutil.which("cuobjdump"):
        return Path(found)
    action = "install NVIDIA's CUDA toolkit, which brings it" if sys.platform == "win32" else "reinstall triton"
    raise FileNotFoundError(f"no cuobjdump in {place}, and none on the PATH; {action}")
