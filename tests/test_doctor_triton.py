"""What `doctor` says of a Triton that is of another release than torch's or leaves out a fence, and of compilers."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace

import pytest
from test_hardware import H100, RTX_3060, WINDOWS, Machine

from core import doctor
from core.hardware import probe
from core.torchbuild import TorchBuild


@pytest.mark.parametrize(
    ("torch", "triton", "said", "detail", "action"),
    [
        ("2.14.1+cu130", "3.8.0.post29", "triton", "", ""),
        ("2.14.0+cu130", "", "triton", "", ""),  # built by hand: whose release it is is not known
        (
            "2.13.0+cu130",
            "3.8.0.post29",
            "triton",
            "triton-windows 3.8.0.post29 does not match torch 2.13.0+cu130, whose Triton is 3.7; it compiles and",
            '--force-reinstall --no-deps "triton-windows>=3.7,<3.8"',
        ),
        (
            "2.11.0+cu128",
            "3.8.0.post29",
            "torch: triton failed when tried: ImportError: cannot import name 'triton_key'",
            "does not match torch 2.11.0+cu128, whose Triton is 3.6; torch: triton failed when tried: ImportError",
            '--force-reinstall --no-deps "triton-windows>=3.6,<3.7"',
        ),
        ("2.11.0+cu128", None, None, "not installed: the rtx", 'install --no-deps "triton-windows>=3.6,<3.7"'),
        ("2.14.1+cu130", "3.6.0.post26", "triton", "whose Triton is 3.8", '--no-deps "triton-windows>=3.8,<3.9"'),
        ("2.15.0+cu130", "3.8.0.post29", "triton", "2.15.0+cu130: it is for torch 2.14", '"torch>=2.14,<2.15" --index'),
        ("2.15.0+cu130", "3.7.0.post26", "triton", "it is for torch 2.12 and 2.13;", '"torch>=2.14,<2.15" --index'),
        ("2.15.0+cu130", "3.9.0.post30", "triton", "", ""),  # neither is known, and they work
        ("2.15.0+cu130", None, None, "not installed, and none is known for torch 2.15", '"torch>=2.14,<2.15" --index'),
    ],
)
def test_doctor_says_on_windows_where_triton_is_of_another_release(monkeypatch, torch, triton, said, detail, action):
    """`triton` is installed alone, so that pip never says that it does not fit the torch that is there."""
    there, real = ("json" if said else "no_such_module"), importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: real(there if name == "triton" else name))
    monkeypatch.setattr(doctor, "_said_by_child", lambda code, backend, seconds: said)
    monkeypatch.setattr(doctor, "_version", lambda name: {"triton-windows": triton}[name] or "not installed")
    monkeypatch.setattr(sys, "platform", "win32")
    cuda = "13.0" if "cu130" in torch else "12.8"
    here = probe(Machine(os=WINDOWS, gpus=[replace(RTX_3060, driver="581.29")], build=TorchBuild(torch, cuda)))
    (check,) = doctor._triton_check(here, None)
    assert (check.ok is True) == (not detail) and detail in check.detail and action in check.action


@pytest.mark.parametrize(("machine", "action"), [(Machine(), "g++"), (Machine(os=WINDOWS), "")])
def test_doctor_asks_for_no_compiler_that_children_would_not_find(monkeypatch, machine, action):
    """Visual C++ is gigabytes, and works in a prompt of its own: of which a child of ours on Windows gets nothing."""
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    check = doctor._compiler_check(probe(machine))
    assert (check.ok is True) == (not action) and check.action.endswith(action)


B200 = replace(H100, name="NVIDIA B200", capability=(10, 0), driver="580.82")


@pytest.mark.parametrize(
    ("triton", "card", "said"),
    [
        ("3.7.1", H100, True),
        ("3.8.0", H100, False),
        ("3.8.0", B200, True),
        ("3.9.0", B200, False),
        ("3.6.0", replace(H100, name="NVIDIA A100-SXM4-80GB", capability=(8, 0)), False),
        ("3.6.0", RTX_3060, False),
        ("not installed", H100, False),
    ],
)
def test_doctor_says_where_triton_leaves_a_fence_out(monkeypatch, triton, card, said):
    monkeypatch.setattr(doctor, "_version", lambda name: triton)
    found = list(doctor._fence_check(probe(Machine(gpus=[card])), None))
    assert len(found) == said
    for check in found:
        assert (
            check.ok is None and check.detail.startswith(f"{triton} makes no fence") and "pip install" in check.action
        )
