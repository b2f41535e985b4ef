"""Windows' code paths with the platform presented as Windows; what this cannot show is listed in docs/verified.md."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace

import pytest
from test_hardware import Machine

from backends.rtx.profiles import remarks
from core import child, doctor, facts, files, sandbox_windows, torchbuild, trainer, versions, windows, wire
from core.doctor import DISTRIBUTIONS, MAX_PYTHON, MIN_PYTHON, _gpu_check
from core.hardware import probe, remedy
from core.interruptions import Interruptions
from core.nvml import Nvml
from core.outcome import Outcome
from core.places import synced_by
from core.steady import Steady, departure
from core.torchbuild import TorchBuild

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def win32(monkeypatch):
    """sys.platform is "win32" for our code, which asks for it anew each time."""
    monkeypatch.setattr(sys, "platform", "win32")
    return monkeypatch


def registry(*present):
    """A winreg that knows these keys."""

    def open_key(root, name):
        if not any(word in name for word in present):
            raise FileNotFoundError(2, "no such key")
        return name

    return SimpleNamespace(HKEY_LOCAL_MACHINE=0, OpenKey=open_key, CloseKey=lambda key: None)


@pytest.mark.parametrize(("keys", "due"), [((), False), (("RebootRequired",), True), (("RebootPending",), True)])
def test_a_pending_restart_is_announced(win32, keys, due):
    win32.setitem(sys.modules, "winreg", registry(*keys))
    assert windows.restart_pending() is due
    said = windows.warnings(PureWindowsPath(r"C:\labs\night"), {})
    assert bool(said) is due and all("restart first" in line for line in said)


class LongPaths:
    """A winreg with this value of LongPathsEnabled; None: it has none."""

    HKEY_LOCAL_MACHINE = 0

    def __init__(self, value):
        self.value = value

    def OpenKey(self, root, name):
        return contextlib.nullcontext(name)

    def QueryValueEx(self, key, name):
        if self.value is None or not (key.endswith("FileSystem") and name == "LongPathsEnabled"):
            raise FileNotFoundError(2, "no such value")
        return self.value, 4


@pytest.mark.parametrize(("value", "long"), [(1, True), (0, False), (None, False)])
def test_short_paths_are_told_by_doctor(win32, value, long):
    win32.setitem(sys.modules, "winreg", LongPaths(value))
    assert windows.long_paths() is long


@pytest.mark.skipif(sys.platform == "win32", reason="this is Windows")
def test_elsewhere_no_registry_is_asked():
    assert windows.restart_pending() is False and windows.long_paths() is True


class Bus:
    """A winreg with these PCI devices; None: it has no such key."""

    HKEY_LOCAL_MACHINE = 0

    def __init__(self, names):
        self.names = names

    def OpenKey(self, root, name):
        if self.names is None or not name.endswith(r"CurrentControlSet\Enum\PCI"):
            raise FileNotFoundError(2, "no such key")
        return contextlib.nullcontext(name)

    def QueryInfoKey(self, key):
        return len(self.names), 0, 0

    def EnumKey(self, key, index):
        return self.names[index]


@pytest.mark.parametrize("names", [["VEN_8086&DEV_A0B0&SUBSYS_1", "VEN_10DE&DEV_2484&SUBSYS_2"], [], None])
def test_pci_devices_are_those_of_the_registry(win32, names):
    win32.setitem(sys.modules, "winreg", Bus(names))
    assert facts.LocalFacts().pci_devices() == (names or [])


def test_sleep_is_what_the_unbiased_clock_left_out(win32):
    """A training of 60 s in which the machine slept for 40."""
    times = iter([100.0, 160.0])
    ticks = iter([90 * 10**7, 110 * 10**7])

    def query(place):
        place._obj.value = next(ticks)
        return 1

    kernel, asked = SimpleNamespace(QueryUnbiasedInterruptTime=query), []
    win32.setattr(windows, "library", lambda name: asked.append(name) or kernel)
    win32.setattr("core.deadline.time", SimpleNamespace(monotonic=lambda: next(times)))
    win32.setattr("core.interruptions.time", SimpleNamespace(time=lambda: 1e9))
    watch = Interruptions()
    win32.setattr("core.interruptions.time", SimpleNamespace(time=lambda: 1e9 + 60.0))
    found = watch.report()
    assert (found["slept_seconds"], found["clock_set_seconds"], asked) == (40.0, 0.0, ["kernel32"] * 2)
    assert "slept for 40 s" in departure({"health": found}, Steady())


def test_the_driver_is_asked_where_linux_has_no_module_of_it():
    def absent(path):
        raise FileNotFoundError(2, "no such file", str(path))

    assert versions._driver("cuda:0", absent, lambda: "581.29") == "581.29"
    assert versions._driver("cpu", absent, lambda: pytest.fail("no card is used")) is None
    assert versions._driver("cuda:0", lambda path: "570.1\n", lambda: pytest.fail("Linux told it")) == "570.1"


@pytest.mark.parametrize(("answer", "told"), [("581.29", "581.29"), (b"581.29", "581.29"), (None, None)])
def test_nvml_tells_the_drivers_version(monkeypatch, answer, told):
    class Refused(Exception):
        pass

    def version():
        if answer is None:
            raise Refused
        return answer

    nvml = SimpleNamespace(NVMLError=Refused, nvmlSystemGetDriverVersion=version)
    nvml.nvmlInit = nvml.nvmlShutdown = lambda: None
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert facts.nvidia_driver() == told
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert facts.nvidia_driver() is None


class Mismatch(Exception):
    """What pynvml raises where the driver does not know the newest of a function: no NVMLError."""


CARD = facts.Gpu(0, "NVIDIA GeForce RTX 4060", "GPU-a", 8 * 2**30, 7 * 2**30, (8, 9), "581.29")


def cards(count, lost, monkeypatch, driver="581.29", processes=None, memory_told=True, pci=None):
    """A pynvml that counts so many cards, of which these are lost: an eGPU that was pulled out.

    `processes`: what is called for those that compute; by default it refuses. `pci`: what PCI says of the cards."""

    class Lost(Exception):
        pass

    class NotSupported(Lost):
        pass

    def handle(index):
        if index in lost:
            raise Lost("GPU is lost")
        return index

    def refuse(*arguments):
        raise NotSupported("Not Supported")

    memory = SimpleNamespace(total=8 * 2**30, free=7 * 2**30)
    answers = {"Count": count, "MemoryInfo": memory, "CudaComputeCapability": (8, 9), "UUID": "GPU-a"}
    answers |= {"Name": b"NVIDIA GeForce RTX 4060"}
    nvml = SimpleNamespace(NVMLError=Lost, NVMLError_NotSupported=NotSupported, nvmlDeviceGetHandleByIndex=handle)
    nvml.nvmlSystemGetDriverVersion = lambda: driver
    nvml.nvmlInit = nvml.nvmlShutdown = lambda: None
    for name, answer in answers.items():
        setattr(nvml, f"nvmlDeviceGet{name}", lambda *a, answer=answer: answer)
    for name in ("ComputeRunningProcesses", "DisplayActive", "MigMode", "PciInfo"):
        setattr(nvml, f"nvmlDeviceGet{name}", refuse)
    if pci is not None:
        nvml.nvmlDeviceGetPciInfo = lambda handle: pci
    if not memory_told:
        nvml.nvmlDeviceGetMemoryInfo = refuse
    if processes:
        nvml.NVMLLibraryMismatchError = Mismatch
        nvml.nvmlDeviceGetComputeRunningProcesses = processes
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return facts.LocalFacts().nvidia()


def test_a_card_that_shares_the_machines_memory_has_all_of_it(monkeypatch):
    """GB10: NVML tells nothing of its memory. With that it was no card at all, and a driver was asked for."""
    (found,) = cards(1, (), monkeypatch, memory_told=False)
    total, available = facts.LocalFacts().memory()
    assert found.memory == total and found.memory_free == pytest.approx(available, rel=0.2)


def test_a_cards_product_is_what_pci_calls_it_above_the_vendor(monkeypatch):
    assert [card.product for card in cards(1, (), monkeypatch)] == [0]
    pci = SimpleNamespace(pciDeviceId=0x1F1110DE)
    (card,) = cards(1, (), monkeypatch, pci=pci)
    assert card.product == 0x1F11
    mobile = probe(Machine(gpus=[replace(card, name="NVIDIA GeForce RTX 2060", capability=(7, 5))]))
    assert any("a laptop's card" in remark for remark in remarks(mobile))


def test_a_card_that_is_lost_hides_no_other_and_is_named(monkeypatch):
    (left,) = cards(2, {1}, monkeypatch)
    assert left.name == "NVIDIA GeForce RTX 4060" and left.lost == ("card 1 of 2 (GPU is lost)",)
    here = probe(Machine(gpus=[left]))
    assert any("card 1 of 2 (GPU is lost) does not answer" in remark for remark in remarks(here))
    check = _gpu_check(here)
    assert check.ok is None and "card 1 of 2 (GPU is lost) does not answer" in check.detail and check.action
    assert [gpu.lost for gpu in cards(2, set(), monkeypatch)] == [(), ()]
    with pytest.raises(facts.GpuProblem, match=r"card 0 of 1 \(GPU is lost\)"):
        cards(1, {0}, monkeypatch)


@pytest.mark.parametrize(("used", "others"), [((None, None), 0), ((None, 2**30), 2), ((2**30, 2**20), 2), ((), 0)])
def test_the_desktops_programs_are_no_processes_that_have_to_be_ended(monkeypatch, used, others):
    """WDDM lists them among those that compute, and tells the memory of none."""
    listed = [SimpleNamespace(pid=2**22 + 1 + i, usedGpuMemory=size) for i, size in enumerate(used)]
    (card,) = cards(1, (), monkeypatch, processes=lambda handle: listed)
    assert card.processes == others
    check = _gpu_check(probe(Machine(gpus=[card])))
    assert ("end them" in check.action, check.ok) == ((True, None) if others else (False, True))


def test_a_driver_that_is_too_old_to_list_processes_leads_to_a_newer_one(monkeypatch):
    def mismatch(*arguments):
        raise Mismatch("Unversioned function called and the pyNVML version does not match the NVML lib version")

    (card,) = cards(1, (), monkeypatch, driver="472.12", processes=mismatch)
    assert (card.driver, card.processes) == ("472.12", 0)
    here = probe(Machine(os=("Windows", "11", "AMD64"), gpus=[card]))
    assert remedy(here).startswith("update the driver to 525 or newer") and _gpu_check(here).ok
    monkeypatch.setattr("core.nvml.cuda_uuid", lambda index: "GPU-a")
    nvml = sys.modules["pynvml"]
    nvml.nvmlDeviceGetHandleByUUID, nvml.NVML_CLOCK_SM, nvml.NVML_TEMPERATURE_GPU = str, 1, 0
    for name in ("UtilizationRates", "EnforcedPowerLimit", "CurrentClocksThrottleReasons", "ClockInfo", "MaxClockInfo",
                 "Temperature", "ProcessUtilization"):  # fmt: skip
        setattr(nvml, f"nvmlDeviceGet{name}", mismatch)
    nvml.nvmlDeviceGetMemoryInfo = lambda handle: SimpleNamespace(used=900, free=100)
    look = Nvml().look("cuda:0", (10,))
    assert (look.error, look.ours, look.used, look.free) == ("", None, 900, 100)


@pytest.mark.parametrize(
    ("said", "mend"),
    [
        ("OSError: [WinError 126] Modul nicht gefunden.", "aka.ms/vs/17/release/vc_redist.x64.exe"),
        ("OSError: [WinError 127] The specified procedure could not be found.", "vc_redist"),
        ("OSError: [WinError 1114] A dynamic link library (DLL) initialization routine failed.", "vc_redist"),
        ("OSError: [WinError 1455] The paging file is too small for this operation to complete.", "page file's size"),
        ("OSError: [WinError 193] %1 is not a valid Win32 application", "/whl/cu130"),
        ("ModuleNotFoundError: No module named 'torch._C'", "/whl/cu130"),
    ],
)
def test_what_no_reinstall_mends_is_told_by_windows_number(win32, tmp_path, said, mend):
    """A torch or a Triton that cannot be loaded; PyPI's torch would be no remedy either, as it has no CUDA."""
    (tmp_path / "torch.py").write_text(f"import sys; sys.exit({said!r})")
    win32.setenv("PYTHONPATH", str(tmp_path))
    here = probe(Machine(os=("Windows", "11", "AMD64"), gpus=[CARD], build=TorchBuild("2.14.1+cu130", "13.0")))
    (check,) = [c for c in doctor._library_checks(here) if c.name == "torch"]
    assert check.ok is False and said in check.detail and mend in check.action
    win32.setattr(doctor.importlib.util, "find_spec", lambda name: name)
    win32.setattr(doctor, "_said_by_child", lambda *given: said)
    (check,) = doctor._triton_check(here, "rtx")
    assert (mend if "whl" not in mend else f'--no-deps "{torchbuild.WINDOWS_TRITON}"') in check.action


@pytest.mark.parametrize("system", ["win32", "linux"])
def test_pypis_torch_is_told_only_where_no_card_is(monkeypatch, system):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    card, none = probe(Machine(gpus=[CARD])), probe(Machine())
    silent = replace(none, gpu_problem="an NVIDIA card does not answer")
    old = replace(CARD, driver="566.03")
    for here, index in ((card, "cu130"), (silent, "cu130"), (replace(card, gpus=(old,)), "cu126"), (none, "")):
        missing = next(c for c in doctor._library_checks(here) if c.name == "torch")
        for check in (missing, doctor._told_torch("2.9.1 12.8 True", here)):
            assert check.ok is False and "-m pip install" in check.action
            assert check.action.endswith(f"/whl/{index}") if index else "index-url" not in check.action


@pytest.mark.parametrize(
    ("device", "reported", "peak"),
    [("cuda:0", 3 * 2**30, 3 * 2**30), ("cuda:0", 0, 9 * 2**30), ("cpu", 3 * 2**30, 9 * 2**30)],
)
def test_the_peak_of_a_card_is_what_the_card_says(monkeypatch, tmp_path, device, reported, peak):
    """The process has much of the computer's memory too, on Windows as much as the driver commits for the card."""
    handed = wire.Message("handed", {"peak_memory": reported, "describe": {}})
    process = SimpleNamespace(peak_memory=lambda: 9 * 2**30)
    worker = SimpleNamespace(scratch=tmp_path, expect=lambda *given: handed, kill=lambda: None, child=process)
    request, settings = SimpleNamespace(seconds=lambda: 1.0), SimpleNamespace(device=device)
    run = SimpleNamespace(request=request, settings=settings, outcome=Outcome())
    training = trainer.Trainer(run, worker, None, None)
    monkeypatch.setattr(training, "_open", lambda took: 0)
    training.hand_over()
    assert run.outcome.peak_memory == peak


def test_tritons_build_for_windows_is_a_library_too():
    assert "triton-windows" in versions.LIBRARIES and "triton-windows" in DISTRIBUTIONS


@pytest.mark.parametrize(
    ("folder", "environ", "name"),
    [
        (PureWindowsPath(r"C:\Users\a\OneDrive\labs"), {}, "OneDrive"),
        (PureWindowsPath(r"C:\Users\a\OneDrive - Company\labs"), {}, "OneDrive"),
        (PureWindowsPath(r"D:\Cloud\labs"), {"OneDriveConsumer": r"d:\cloud"}, "OneDrive"),
        (PureWindowsPath(r"C:\Users\a\Dropbox\x"), {}, "Dropbox"),
        (PureWindowsPath(r"C:\Users\a\labs"), {"OneDrive": r"C:\Users\a\OneDrive"}, ""),
        (PureWindowsPath(r"C:\NoDropboxHere\labs"), {}, ""),
        (PurePosixPath("/Users/a/Library/Mobile Documents/labs"), {}, "Mobile Documents"),
    ],
)
def test_a_synchronised_folder_is_found_by_name_or_by_onedrives_variables(folder, environ, name):
    assert synced_by(folder, environ) == name
    assert bool(windows.warnings(folder, environ)) is bool(name)


def test_a_file_that_somebody_reads_is_replaced_when_they_are_done(win32, tmp_path):
    """Windows refuses to replace an open file; another thread closes it after the second refusal."""
    source, target, refusals = tmp_path / "new", tmp_path / "old", []
    source.write_text("new")
    target.write_text("old")
    real = Path.replace

    def replace(self, other):
        if len(refusals) < 2:
            refusals.append(other)
            raise PermissionError(13, "The process cannot access the file", str(other))
        return real(self, other)

    win32.setattr(Path, "replace", replace)
    files.replace_open(source, target)
    assert target.read_text() == "new" and len(refusals) == 2


def test_a_file_that_stays_open_is_an_error_in_the_end(win32, tmp_path):
    def replace(self, other):
        raise PermissionError(13, "in use")

    win32.setattr(Path, "replace", replace)
    with pytest.raises(PermissionError):
        files.replace_open(tmp_path / "new", tmp_path / "old", patience=0.05)


class Kernel:
    """kernel32, whose calls are noted and answer 7, or 0 where they are to be refused."""

    def __init__(self, *refused):
        self.refused, self.calls = refused, []

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, [getattr(a, "_obj", getattr(a, "value", a)) for a in arguments]))
            return 0 if name in self.refused else 7

        return call


def test_the_job_ends_its_processes_when_we_end_and_holds_memory_and_number(monkeypatch):
    kernel = Kernel()
    monkeypatch.setattr(sandbox_windows, "library", lambda name: kernel)
    assert sandbox_windows.Windows().make_job(2**30, 12) == 7
    (_, (_, kind, limits, _)) = kernel.calls[1]
    assert limits.Basic.LimitFlags & 0x2000  # JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE: no child outlives us
    assert limits.Basic.LimitFlags & 0x400  # JOB_OBJECT_LIMIT_DIE_ON_UNHANDLED_EXCEPTION: no dialogue that waits
    assert (limits.Basic.ActiveProcessLimit, limits.JobMemoryLimit) == (12, 2**30)
    assert kind == 9 and len(kernel.calls) == 2  # no JobObjectBasicUIRestrictions, with which no job can be nested


@pytest.mark.parametrize(("refused", "closed"), [("CreateJobObjectW", False), ("SetInformationJobObject", True)])
def test_a_job_without_its_limits_is_none(monkeypatch, refused, closed):
    kernel = Kernel(refused)
    monkeypatch.setattr(sandbox_windows, "library", lambda name: kernel)
    monkeypatch.setattr(sandbox_windows.ctypes, "get_last_error", lambda: 5, raising=False)
    with pytest.raises(OSError, match=r"refused with error 5"):
        sandbox_windows.Windows().make_job(0, 12)
    assert ("CloseHandle" in dict(kernel.calls)) is closed


@pytest.mark.parametrize(
    ("status", "said"),
    [(3, "3"), (0xC0000005, "0xc0000005 (access violation)"), (0xC0000999, "0xc0000999"), (1, "1")],
)
def test_the_status_of_a_fault_is_said_as_it_is_looked_up(status, said):
    assert child._status(status) == said


def test_a_read_only_file_is_no_obstacle_to_removing_a_folder(win32, tmp_path):
    """Of a recipe's scratch folder, or of the repository of a half-made lab, whose objects git makes read-only."""
    (tmp_path / "scratch").mkdir()
    file = tmp_path / "scratch" / "file"
    file.write_text("x")
    file.chmod(0o400)
    refusals = []
    real = os.unlink

    def unlink(path, **more):  # as Windows does
        if not os.stat(path, **more).st_mode & 0o200:  # noqa: PTH116 - may be relative to a folder
            refusals.append(path)
            raise PermissionError(13, "Access is denied", str(path))
        real(path, **more)

    win32.setattr(os, "unlink", unlink)
    files.remove(tmp_path / "scratch")
    assert refusals and not (tmp_path / "scratch").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_what_a_recipe_closed_is_removed_and_nothing_around_it_is_opened(tmp_path):
    work = tmp_path / "work"
    (work / "a" / "b").mkdir(parents=True)
    (work / "a" / "b" / "file").write_text("x")
    for folder in (work / "a" / "b", work / "a", work):
        folder.chmod(0)
    files.remove(work)
    assert not work.exists()
    work.mkdir()
    tmp_path.chmod(0o500)
    files.remove(work)
    assert tmp_path.stat().st_mode & 0o777 == 0o500
    tmp_path.chmod(0o700)


def test_what_only_windows_calls_a_link():
    """A junction is a folder with a reparse point; Python before 3.12 does not say that it is a link."""
    plain = SimpleNamespace(st_mode=0o040755, st_file_attributes=0x10)
    junction = SimpleNamespace(st_mode=0o040755, st_file_attributes=0x410)
    assert not files.leads_elsewhere(plain) and files.leads_elsewhere(junction)
    assert files.leads_elsewhere(SimpleNamespace(st_mode=0o120777))


def test_the_readmes_powershell_lines_use_nothing_that_powershell_5_lacks():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = [part.split("```", 1)[0] for part in text.split("```powershell\n")[1:]]
    assert blocks and any("--index-url https://download.pytorch.org" in b and "[rtx]" in b for b in blocks)
    assert not any(word in block for block in blocks for word in ("&&", "||", "source ", "export ", "bin/"))
    # Its usual policy runs no script, and pip.exe cannot replace itself; `py` alone may be a Python without a Triton.
    assert not any(word in block for block in blocks for word in ("Activate", "Scripts\\pip ", "py -m "))
    assert all(re.search(r"^py -3\.1[0-4] -m venv", block, re.M) for block in blocks)


def test_no_command_that_is_told_needs_a_shell_that_powershell_5_is_not():
    """`&&` is an error there, and what `>` writes is UTF-16."""
    places = [ROOT / "cli.py", *(ROOT / "console").glob("*.py"), *(ROOT / "docs").glob("*.md")]
    for place in places:
        text = place.read_text(encoding="utf-8")
        assert not re.search(r"^(?!#).*\w && \w", text, re.M) and not re.search(r"> *\w+\.py\b", text), place


def test_the_pythons_that_are_named_are_those_that_pip_takes():
    least, most = (".".join(map(str, numbers)) for numbers in (MIN_PYTHON, MAX_PYTHON))
    asked = f'requires-python = ">={least},<{MAX_PYTHON[0]}.{MAX_PYTHON[1] + 1}"'
    assert asked in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"Python {least} to {most}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_no_module_that_windows_loads_forks_or_renames_over_open_files():
    """Of ours on Windows: all but what starts a child of Linux' sandbox and its self-check."""
    elsewhere = {"launcher.py", "forking.py", "selfcheck.py", "attacks.py", "inside.py", "trees.py"}
    for folder in ("core", "console", "backends", "researchers"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if path.name not in elsewhere:
                assert "os.fork" not in text and "os.rename(" not in text, path
