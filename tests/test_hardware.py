"""Hardware: machines that are not here, presented through the facts interface; the choice and its reason; doctor."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import platformdirs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import doctor, hardware, paths
from core.errors import UserError
from core.facts import Gpu, GpuProblem, LocalFacts, Power
from core.hardware import choose, probe
from core.torchbuild import TorchBuild

GIB = 2**30
ALL = ("cuda", "rtx", "mlx", "cpu")


@dataclass
class Machine:
    """Facts of a machine that somebody else has."""

    os: tuple[str, str, str] = ("Linux", "6.8.0-45-generic", "x86_64")
    env: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=lambda: {"git --version": "git version 2.43.0"})
    processors: Sequence[int] = tuple(range(16))
    built_in: tuple[int, int] = (8, 16)
    ram: tuple[int, int] = (32 * GIB, 24 * GIB)
    modules: Sequence[str] = ("mlx",)
    disk: int = 500 * GIB
    battery: Power = field(default=Power())
    gpus: Sequence[Gpu] | str = "NVML Shared Library Not Found"
    pci: Sequence[str] = ()
    build: TorchBuild = field(default=TorchBuild("2.14.1+cu128", "12.8"))

    def system(self):
        return self.os

    def environ(self):
        return self.env

    def read(self, path):
        return self.files.get(path)

    def listdir(self, path):
        inside = {name[len(path) + 1 :].split("/")[0] for name in self.files if name.startswith(path + "/")}
        return sorted(inside)

    def pci_devices(self):
        return self.pci

    def run(self, *argv):
        return self.commands.get(" ".join(argv))

    def cpus(self):
        return self.processors

    def cores(self):
        return self.built_in

    def memory(self):
        return self.ram

    def disk_free(self, path):
        return self.disk

    def power(self):
        return self.battery

    def installed(self, module):
        return module in self.modules

    def torch(self):
        return self.build

    def nvidia(self):
        if isinstance(self.gpus, str):
            raise GpuProblem(self.gpus)
        return self.gpus


def gpu(name, gib, capability, index=0, **more):
    return Gpu(index, name, f"GPU-{index}aaa-{name[-4:]}", int(gib * GIB), int(gib * GIB), capability, "570.1", **more)


H100 = gpu("NVIDIA H100 80GB HBM3", 79.6, (9, 0))
WINDOWS = ("Windows", "11", "AMD64")
WSL = ("Linux", "5.15.153.1-microsoft-standard-WSL2", "x86_64")
CARD_ON_BUS = {
    "/sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
    "/sys/bus/pci/devices/0000:01:00.0/class": "0x030000\n",
}
M4 = {
    "sysctl -n machdep.cpu.brand_string": "Apple M4 Max",
    "sysctl -n sysctl.proc_translated": "0",
    "git --version": "git version 2.39.3 (Apple Git-146)",
}
CPUINFO = """processor : 0
model name\t: Intel(R) Xeon(R) Platinum 8480+
flags\t\t: fpu sse2 avx2 avx512f avx512_bf16 amx_bf16
"""


@pytest.mark.parametrize(
    ("machine", "backend", "fact"),
    [
        (Machine(gpus=[H100]), "cuda", "H100"),
        (Machine(gpus=[gpu("NVIDIA A100-SXM4-40GB", 39.4, (8, 0))]), "cuda", "A100"),
        (Machine(gpus=[gpu("NVIDIA B200", 179, (10, 0))]), "cuda", "B200"),
        (Machine(gpus=[gpu("NVIDIA GeForce RTX 3060", 11.7, (8, 6))]), "rtx", "sm_86"),
        (Machine(gpus=[gpu("NVIDIA GeForce RTX 4070 Laptop GPU", 7.9997, (8, 9))]), "rtx", "4070"),
        (Machine(gpus=[gpu("NVIDIA GeForce RTX 2080 Ti", 10.8, (7, 5))]), "rtx", "sm_75"),
        (Machine(gpus=[gpu("NVIDIA GeForce GTX 1650", 3.8, (7, 5))]), "rtx", "3.8 GiB"),
        (Machine(gpus=[gpu("NVIDIA GeForce RTX 5090", 31.4, (12, 0))]), "rtx", "sm_120"),
        (Machine(gpus=[gpu("NVIDIA GeForce GTX 1080", 8, (6, 1))]), "cpu", "compute capability 6.1, below 7.5"),
        (Machine(gpus=[gpu("NVIDIA GeForce MX450", 2, (7, 5))]), "cpu", "2.0 GiB, below 4.0 GiB"),
        (Machine(os=("Darwin", "24.1.0", "arm64"), commands=M4, built_in=(14, 14)), "mlx", "Apple M4 Max"),
        (Machine(), "cpu", "no GPU was found"),
        (Machine(files=CARD_ON_BUS, gpus="Driver Not Loaded"), "cpu", "does not answer (Driver Not Loaded)"),
        (Machine(gpus=[H100], env={"CUDA_VISIBLE_DEVICES": ""}), "cpu", "CUDA_VISIBLE_DEVICES=''"),
        (Machine(os=WINDOWS, pci=["VEN_8086&DEV_A0B0", "VEN_10DE&DEV_2484"]), "cpu", "but its driver does not answer"),
        (Machine(os=WINDOWS, pci=["VEN_8086&DEV_A0B0", "VEN_1002&DEV_73BF"]), "cpu", "no GPU was found"),
        (Machine(os=WSL, files={"/dev/dxg": ""}), "cpu", "install or update NVIDIA's driver in Windows"),
        (Machine(os=WSL), "cpu", "no GPU was found"),
    ],
)
def test_automatic_choice_keeps_its_reason(machine, backend, fact):
    choice = choose(probe(machine), available=ALL)
    assert choice.value == backend
    assert fact in choice.reason


@pytest.mark.parametrize(
    ("machine", "named"),
    [
        (Machine(gpus=[H100]), ["H100", "cuda backend, which this version does not have", "stays idle", "core(s)"]),
        (Machine(os=("Darwin", "24.1.0", "arm64"), commands=M4), ["Apple M4 Max", "mlx backend, which this version"]),
    ],
)
def test_a_backend_that_is_not_built_falls_to_cpu_and_says_what_it_costs(machine, named):
    choice = choose(probe(machine), available=["cpu"])
    assert choice.value == "cpu"
    for words in named:
        assert words in choice.reason


def test_an_explicit_backend_works_or_fails_and_is_never_replaced():
    here = probe(Machine(gpus=[gpu("NVIDIA GeForce RTX 3060", 11.7, (8, 6))]))
    assert choose(here, "cpu", ALL).value == "cpu"
    assert choose(here, "rtx", ALL).value == "rtx"
    with pytest.raises(
        UserError,
        match=r"cuda cannot run here: .*3060.* none of the cards .*8.0, 9.0, 10.0, 10.3.*; choose --backend rtx or cpu",
    ):
        choose(here, "cuda", ALL)
    with pytest.raises(UserError, match=r"mlx cannot run here: this is linux"):
        choose(replace(here, mlx=False), "mlx", ALL)
    with pytest.raises(UserError, match=r"rtx .*not built in this version; choose --backend cpu"):
        choose(here, "rtx", ["cpu"])
    with pytest.raises(UserError, match=r"no backend 'tpu'; known are: cuda, rtx, mlx, cpu"):
        choose(here, "tpu", ALL)


def test_rosetta_is_found_and_named():
    commands = {**M4, "sysctl -n sysctl.proc_translated": "1", "sysctl -n machdep.cpu.brand_string": "VirtualApple"}
    machine = probe(Machine(os=("Darwin", "23.0.0", "x86_64"), commands=commands))
    assert machine.emulated
    with pytest.raises(UserError, match="Rosetta"):
        choose(machine, "mlx", ALL)


# --- which GPUs CUDA would see -----------------------------------------------------------------

SMALL = replace(gpu("NVIDIA GeForce RTX 3060", 12, (8, 6), 0), uuid="GPU-11111111-aaaa")
BIG = replace(gpu("NVIDIA GeForce RTX 4090", 24, (8, 9), 1), uuid="GPU-22222222-bbbb")
TWIN = replace(BIG, index=2, uuid="GPU-22333333-cccc")
PART = Gpu(0, "H100 MIG 1g.10gb", "MIG-99999999-dddd", 10 * GIB, 10 * GIB, (9, 0), "570.1")
SPLIT = replace(H100, parts=(PART,))


@pytest.mark.parametrize(
    ("listed", "env", "uuids"),
    [
        ([BIG, TWIN], {}, [BIG.uuid, TWIN.uuid]),
        ([BIG, TWIN], {"CUDA_VISIBLE_DEVICES": "1"}, [TWIN.uuid]),
        ([BIG, TWIN], {"CUDA_VISIBLE_DEVICES": "1,0"}, [TWIN.uuid, BIG.uuid]),
        ([BIG, TWIN], {"CUDA_VISIBLE_DEVICES": "0,7,1"}, [BIG.uuid]),
        ([BIG, TWIN], {"CUDA_VISIBLE_DEVICES": "-1,0"}, []),
        ([BIG, TWIN], {"CUDA_VISIBLE_DEVICES": "0,0"}, [BIG.uuid]),
        ([BIG, TWIN], {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, []),
        ([BIG, TWIN], {"CUDA_VISIBLE_DEVICES": "GPU-2233"}, [TWIN.uuid]),
        ([BIG, TWIN], {"CUDA_VISIBLE_DEVICES": "GPU-ffff"}, []),
        ([SMALL, BIG, TWIN], {}, [BIG.uuid, SMALL.uuid, TWIN.uuid]),
        ([SMALL, BIG], {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, [SMALL.uuid, BIG.uuid]),
        ([SMALL, BIG], {"CUDA_VISIBLE_DEVICES": "0"}, [BIG.uuid]),
        ([SPLIT], {}, [PART.uuid]),
        ([SPLIT], {"CUDA_VISIBLE_DEVICES": "MIG-9999"}, [PART.uuid]),
        ([SPLIT], {"CUDA_VISIBLE_DEVICES": "0"}, [PART.uuid]),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(listed, env, uuids):
    found = probe(Machine(gpus=listed, env=env))
    assert [g.uuid for g in found.gpus] == uuids
    assert bool(found.gpu_problem) == (not uuids)


# --- processors, memory, containers ------------------------------------------------------------


def test_processor_facts_of_linux():
    topology = {
        f"/sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": f"{i % 4},{i % 4 + 4}\n" for i in range(8)
    }
    machine = Machine(files={"/proc/cpuinfo": CPUINFO, **topology}, processors=range(8), built_in=(4, 8))
    found = probe(machine)
    assert found.cpu == "Intel(R) Xeon(R) Platinum 8480+"
    assert "amx_bf16" in found.flags
    assert (found.cores, found.threads) == (4, 8)
    pinned = probe(replace(machine, processors=[0, 4]))
    assert (pinned.cores, pinned.threads) == (1, 2)
    assert "2 of 8 processors by CPU affinity" in pinned.cores_reason


@pytest.mark.parametrize(
    "files",
    [
        {"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "250000 100000\n"},
        {
            "/proc/self/cgroup": "0::/a/b\n",
            "/sys/fs/cgroup/a/cpu.max": "250000 100000",
            "/sys/fs/cgroup/a/b/cpu.max": "max 100000",
        },
        {
            "/proc/self/cgroup": "5:cpu,cpuacct:/docker/x\n1:name=systemd:/\n",
            "/sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us": "250000",
            "/sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us": "100000",
        },
    ],
)
def test_a_cpu_quota_counts(files):
    found = probe(Machine(files=files))
    assert (found.cores, found.threads) == (2, 3)
    assert "quota is 2.5" in found.cores_reason


@pytest.mark.parametrize(
    "files",
    [
        {
            "/proc/self/cgroup": "0::/pod\n",
            "/sys/fs/cgroup/pod/memory.max": str(4 * GIB),
            "/sys/fs/cgroup/pod/memory.current": str(3 * GIB),
            "/sys/fs/cgroup/pod/memory.stat": f"anon 5\ninactive_file {GIB}\n",
            "/sys/fs/cgroup/memory.max": "max",
        },
        {
            "/proc/self/cgroup": "4:memory:/pod\n",
            "/sys/fs/cgroup/memory/pod/memory.limit_in_bytes": str(4 * GIB),
            "/sys/fs/cgroup/memory/pod/memory.usage_in_bytes": str(3 * GIB),
            "/sys/fs/cgroup/memory/pod/memory.stat": f"total_inactive_file {GIB}\n",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        },
    ],
)
def test_a_memory_limit_counts_without_the_page_cache(files):
    found = probe(Machine(files=files))
    assert (found.memory, found.memory_free) == (4 * GIB, 2 * GIB)
    assert "4.0 GiB" in found.memory_reason


def test_bare_machines():
    bare = probe(Machine(files={}, commands={}, processors=(), built_in=(0, 0), ram=(0, 0), disk=0))
    assert bare.cores == bare.threads == 1
    assert bare.git == ""
    assert choose(bare, available=ALL).value == "cpu"
    assert json.loads(json.dumps(bare.to_dict()))["cores"] == 1
    assert not bare.container
    wsl = probe(Machine(os=("Linux", "5.15.153.1-microsoft-standard-WSL2", "x86_64")))
    assert wsl.wsl
    assert probe(Machine(files={"/.dockerenv": ""})).container


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40))
def test_odd_files_never_break_the_probe(group, cpuinfo, limit):
    files = {"/proc/self/cgroup": f"0::/{group}", "/proc/cpuinfo": cpuinfo, "/sys/fs/cgroup/cpu.max": limit}
    files["/sys/fs/cgroup/memory.max"] = limit
    found = probe(Machine(files=files))
    assert 1 <= found.cores <= found.threads <= 16
    assert found.memory <= 32 * GIB


def test_this_machine():
    found = probe()
    assert found.cores >= 1
    assert found.memory > 0
    assert found.disk_free > 0
    assert found.summary()
    assert choose(found, "cpu", ALL).value == "cpu"
    assert LocalFacts().read("/no/such/file") is None
    assert LocalFacts().run("no-such-command-here") is None
    assert list(LocalFacts().listdir("/no/such/folder")) == []


def test_probing_loads_neither_torch_nor_mlx():
    code = "import sys; from core.hardware import probe; probe(); print({'torch', 'mlx'} & set(sys.modules))"
    root = str(Path(hardware.__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "set()"


# --- doctor ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here():
    machine = probe()
    return machine, doctor.checks(machine)


def test_doctor_checks_this_machine(here):
    _, lines = here
    found = {line.name: line for line in lines}
    for name in ("python", "own modules", "packages", "torch", "memory", "git", "disk", "home", "clock", "backend"):
        assert name in found
    assert found["python"].ok
    assert found["own modules"].ok
    for line in lines:
        assert line.detail
        assert line.ok is not False or line.action


def test_doctor_names_the_next_command():
    broken = probe(Machine(files=CARD_ON_BUS, gpus="Driver/library version mismatch", commands={}, disk=GIB // 2))
    broken = replace(broken, memory_free=GIB, emulated=True, power=Power(False, 40.0), wsl=True)
    found = {line.name: line for line in doctor.checks(broken)}
    assert found["git"].ok is False
    assert "install git" in found["git"].action
    assert found["gpu"].ok is None
    assert found["gpu"].action == "restart the machine"
    assert found["disk"].ok is False
    assert "AUTORESEARCH_HOME" in found["disk"].action
    assert found["memory"].ok is False
    assert "40 %" in found["power"].detail
    assert "/mnt/c" in found["wsl"].action
    assert "powercfg" in found["sleep"].action, "Windows decides"


@pytest.mark.parametrize(
    ("machine", "action"),
    [
        (Machine(os=WINDOWS, pci=["VEN_10DE&DEV_2484"]), "run nvidia-smi; if it fails too, install NVIDIA's driver"),
        (Machine(os=WSL, files={"/dev/dxg": ""}, gpus="GPU access blocked by the operating system"), "in Windows"),
        (Machine(os=WSL, files={"/dev/dxg": ""}, gpus="the package nvidia-ml-py is not installed"), "pip install"),
    ],
)
def test_doctor_notes_a_driver_that_does_not_answer_on_windows_and_wsl2(machine, action):
    check = doctor._gpu_check(probe(machine))
    assert check.ok is None and "does not answer" in check.detail and action in check.action


RTX_3060 = gpu("NVIDIA GeForce RTX 3060", 11.7, (8, 6))


@pytest.mark.parametrize(
    ("card", "wanted", "programs", "headers", "ok", "said"),
    [
        (H100, None, ["gcc"], True, True, "/bin/gcc"),
        (H100, None, ["clang"], True, True, "/bin/clang"),
        (H100, None, [], True, False, "no C compiler (neither gcc nor clang): the cuda recipe does not run"),
        (H100, None, ["gcc"], False, False, "no Python headers"),
        (RTX_3060, None, [], True, None, "the rtx recipe goes by plain PyTorch"),
        (RTX_3060, "cpu", [], False, "no check", ""),
    ],
)
def test_doctor_says_what_tritons_launcher_lacks(monkeypatch, tmp_path, card, wanted, programs, headers, ok, said):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}" if name in programs else None)
    monkeypatch.setattr(doctor, "_python_headers", lambda: tmp_path / "Python.h")
    if headers:
        (tmp_path / "Python.h").touch()
    found = list(doctor._launcher_check(probe(Machine(gpus=[card])), wanted))
    assert [check.ok for check in found] == ([] if ok == "no check" else [ok])
    for check in found:
        assert said in check.detail
        assert ("gcc" in check.action, "-dev" in check.action) == (not programs, not headers) or check.ok


RTX_3060_ON_WINDOWS = Machine(os=WINDOWS, gpus=[RTX_3060])


@pytest.mark.parametrize(
    ("machine", "wanted", "said", "ok", "detail"),
    [
        (RTX_3060_ON_WINDOWS, None, None, None, "not installed: the rtx recipe goes by plain PyTorch"),
        (RTX_3060_ON_WINDOWS, "rtx", "triton", True, "compiles and runs"),
        (RTX_3060_ON_WINDOWS, None, "triton for norms and loss, torch for products: sm_75", True, "sm_75"),
        (RTX_3060_ON_WINDOWS, None, "torch: triton failed when tried: RuntimeError: no compiler", None, "no compiler"),
        (RTX_3060_ON_WINDOWS, "cpu", None, "no check", ""),
        (Machine(gpus=[RTX_3060]), None, None, "no check", ""),
        (Machine(os=WINDOWS), None, None, "no check", ""),
    ],
)
def test_doctor_says_on_windows_whether_triton_is_there_and_works(monkeypatch, machine, wanted, said, ok, detail):
    """PyPI's torch brings none there, and without it nothing but the speed of a whole night tells."""
    there, real = ("json" if said else "no_such_module"), importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: real(there if name == "triton" else name))
    monkeypatch.setattr(doctor, "_said_by_child", lambda code, backend, seconds: said)
    monkeypatch.setattr(sys, "platform", "win32")
    found = list(doctor._triton_check(probe(machine), wanted))
    assert [check.ok for check in found] == ([] if ok == "no check" else [ok])
    for check in found:
        assert detail in check.detail
        again = "--force-reinstall " if said else ""
        assert check.ok or check.action.endswith(f'-m pip install {again}--no-deps "triton-windows>=3.8,<3.9"')


def test_what_is_tried_for_triton_is_tried_where_experiments_run():
    """Here without a card: the child's own word for it comes back."""
    said = doctor._said_by_child(doctor.TRIED_AS_CHILDREN_DO, "rtx", 120.0)
    assert said.startswith(("torch: triton", "triton")), said
    assert doctor._said_by_child("import time; time.sleep(60)", "cpu", 0.2) == "not done within 0.2 s"


def test_doctor_takes_the_compiler_that_triton_takes(monkeypatch):
    monkeypatch.setenv("CC", "no-such-cc")
    (check,) = doctor._launcher_check(probe(Machine(gpus=[H100])), None)
    assert check.ok is False and "CC=no-such-cc is not found" in check.detail and "unset CC" in check.action
    assert list(doctor._launcher_check(probe(Machine(os=WINDOWS, gpus=[RTX_3060])), None)) == []


def test_the_headers_are_looked_for_where_triton_does(monkeypatch):
    monkeypatch.setattr(doctor.sysconfig, "get_default_scheme", lambda: "posix_local")  # as Debian's Python says
    folder = Path(doctor.sysconfig.get_path("include", "posix_prefix"))
    assert doctor._python_headers() == folder / "Python.h"


def test_doctor_finds_a_foreign_module_that_hides_ours(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    root = str(Path(hardware.__file__).parent.parent)
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {root!r}]"
    code += "; from core.doctor import _own_modules; print(_own_modules().line())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.startswith("FAIL  own modules: another package hides ours: kernels")
    assert "venv" in done.stdout


def test_doctor_says_when_an_import_breaks(tmp_path, monkeypatch):
    (tmp_path / "breaking_library.py").write_text("raise ImportError('libfoo.so: no such file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    check = doctor._import_check("breaking_library", "import breaking_library", "pip install it")
    assert check.ok is False
    assert "libfoo.so" in check.detail
    assert doctor._import_check("no_such_library_x", "import no_such_library_x", "pip install it").ok is False


@pytest.mark.parametrize(
    ("line", "ok"), [("2.9.1 12.8 True", False), ("2.13.0+cpu none False", True), ("2.13.0 12.8 True", True)]
)
def test_doctor_reads_torch(line, ok):
    assert doctor._told_torch(line, probe(Machine())).ok is ok


def test_doctor_says_when_torch_cannot_reach_the_gpu():
    check = doctor._told_torch("2.13.0+cpu none False", probe(Machine(gpus=[H100])))
    assert check.ok is None
    assert "without CUDA" in check.detail


def test_file_systems_are_told_apart():
    mounts = "/dev/sda1 / ext4 rw 0 0\nserver:/x /home nfs4 rw 0 0\n/dev/sdb /home/anna/my\\040disk xfs rw 0 0\n"
    assert doctor._file_system(Path("/var/lib/x"), mounts) == "ext4"
    assert doctor._file_system(Path("/home/anna/x"), mounts) == "nfs4"
    assert doctor._file_system(Path("/home/anna/my disk/x"), mounts) == "xfs"
    assert doctor._file_system(Path("/homes/x"), mounts) == "ext4"


def test_a_home_that_cannot_be_written_fails(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "file"))
    check = doctor._writable(tmp_path / "file")
    assert check.ok is False
    assert "AUTORESEARCH_HOME" in check.action


def test_a_home_with_a_space_in_its_name_is_told_and_not_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "my lab"))
    (note,) = [c for c in doctor._home_checks(probe(Machine())) if c.name == "name of the home"]
    assert note.ok is None and "my lab" in note.detail
    monkeypatch.delenv("AUTORESEARCH_HOME")
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    usual = tmp_path / "Library" / "Application Support" / "autoresearch"  # a Mac's
    monkeypatch.setattr(platformdirs, "user_data_dir", lambda *_, **__: str(usual))
    monkeypatch.setattr("sys.platform", "darwin")
    assert paths.home() == tmp_path / ".autoresearch"
    usual.mkdir(parents=True)  # records from before stay where they are
    assert paths.home() == usual


SECRETS = [
    "sk-ant-api03-abcdefgh12345678",
    "hf_abcdefghijklmnop",
    "ghp_0123456789abcdefghij",
    "AKIAIOSFODNN7EXAMPLE",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc",
    "hunter2hunter2",
    "swordfish99",
    "anna.example@mail.example.org",
    "192.168.17.23",
    "fe80::1ff:fe23:4567:890a",
    "00:1a:2b:3c:4d:5e",
    "GPU-1b2c3d4e-aaaa-bbbb-cccc-1234567890ab",
    "annaexample",
    "Otto Example",
    "secretbox",
]
TEXT = r"""
ANTHROPIC_API_KEY=sk-ant-api03-abcdefgh12345678 HF_TOKEN: hf_abcdefghijklmnop
{"password": "hunter2hunter2", "x_api_key":"swordfish99"} https://annaexample:hunter2hunter2@server.example/x
remote https://ghp_0123456789abcdefghij@github.com and AKIAIOSFODNN7EXAMPLE
Authorization: Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc
anna.example@mail.example.org at 192.168.17.23 fe80::1ff:fe23:4567:890a 00:1a:2b:3c:4d:5e
GPU-1b2c3d4e-aaaa-bbbb-cccc-1234567890ab
/home/annaexample/labs/x  /Users/annaexample/y  C:\Users\Otto Example\z  "C:\\Users\\Otto Example\\z"
c:/users/annaexample/q
host secretbox.lan, SECRETBOX
"""


def test_the_report_tells_nothing_private():
    private = [("secretbox.lan", "<host>"), ("secretbox", "<host>"), ("annaexample", "<user>")]
    told = doctor.redact(TEXT, private)
    for secret in SECRETS:
        assert secret.lower() not in told.lower(), secret
    assert "/labs/x" in told
    assert "GPU-<id>" in told


def test_names_of_user_host_and_homes_are_private(monkeypatch, tmp_path):
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "records"))
    names = dict(
        doctor.private_names({"USER": "annaexample", "HOME": "/data/annaexample", "HOSTNAME": "secretbox.lan"})
    )
    assert names["annaexample"] == "<user>"
    assert names["/data/annaexample"] == "~"
    assert names["secretbox"] == "<host>"
    assert names[str(tmp_path / "records")] == "<autoresearch-home>"


def test_the_bundle_is_redacted_and_whole(here, tmp_path, monkeypatch):
    machine, lines = here
    monkeypatch.setenv("USER", "annaexample")
    lines = [*lines, doctor.Check("odd", False, f"{Path.home()}/x of annaexample, token=swordfish99", "see it")]
    machine = replace(machine, gpus=(H100,))
    written = doctor.bundle(tmp_path / "a" / "report.zip", machine, lines, notes="/home/annaexample/log")
    with zipfile.ZipFile(written) as archive:
        text = archive.read("doctor.md").decode()
    assert "FAIL  odd" in text
    assert "H100" in text
    assert "torch" in text
    for secret in ("annaexample", "swordfish99", str(Path.home()) + "/"):
        assert secret not in text
    plain = doctor.bundle(tmp_path / "report.md", machine, lines)
    assert plain.read_text().startswith("# autoresearch doctor")
    with pytest.raises(UserError, match="cannot be written"):
        doctor.bundle(tmp_path / "report.md" / "under" / "x.md", machine, lines)
