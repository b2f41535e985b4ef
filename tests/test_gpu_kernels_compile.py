"""Every shipped configuration of the Triton kernels, compiled for every card it is meant for: no GPU is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from core.paths import project_root

pytest.importorskip("torch")
pytest.importorskip("triton")

from binaries import require_cuobjdump

from benchmarks.compile_cases import cases, wrong
from kernels import residual_norm, targets

require_cuobjdump()


@pytest.mark.slow
@pytest.mark.parametrize("target", targets.TARGETS)
def test_every_configuration_fits_its_card(target: int) -> None:
    lines = wrong(target)
    assert not lines, "\n".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("target", [86, 90])
def test_the_norms_backward_saves_no_registers_and_all_its_programs_fit(target: int) -> None:
    """Left alone, ptxas spills in order to make room for programs that are never launched (Triton 3.6 on sm_86)."""
    found = [case.compile() for case in cases(target) if "norm of 768 bf16 backward" in case.label]
    assert len(found) == 8
    for one in found:
        assert ".maxnreg 128" in one.ptx and not one.spills
        assert one.blocks >= residual_norm.BACKWARD[target].programs


@pytest.mark.parametrize(("card", "wanted"), [(75, 75), (80, 80), (87, 86), (90, 90), (103, 100), (121, 120)])
def test_a_card_gets_the_newest_target_that_it_runs(card, wanted):
    assert targets.target_of(card) == wanted


def test_a_card_too_old_is_refused():
    with pytest.raises(ValueError, match="75 is the least"):
        targets.target_of(70)


@pytest.mark.slow
def test_the_command_prints_what_each_kernel_needs_and_knows_all_of_them():
    def run(*options):
        command = [sys.executable, "-m", "benchmarks.kernels", *options]
        return subprocess.run(command, cwd=project_root(), capture_output=True, text=True, timeout=300, check=False)

    done = run("--compile-only", "--target", "90", "--kernel", "attention delta")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[1:]
    assert [line.split()[4] for line in lines] == ["32", "64", "128"] and all("sm_90" in line for line in lines)
    labels = {case.label.split()[0] for case in cases(90)}
    assert labels >= {"attention", "mlp", "loss", "weighted", "plain", "symmetric", "momentum", "update"}
    wrong = run("--compile-only", "--target", "70")
    assert wrong.returncode == 1 and "no target 70; known are: 75, 80" in wrong.stderr
