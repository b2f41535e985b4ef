"""`bench kernels`: every way of a kernel is held to the reference before its time counts; a crash leaves the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import kernel_cases, kernel_run
from benchmarks.kernel_cases import Case, Shape, Side, Work
from benchmarks.results import Peak, load, save
from benchmarks.work import PROFILES
from cli import cli
from core.paths import project_root

torch = pytest.importorskip("torch")

from test_bench_page import a_result  # noqa: E402

from benchmarks import kernels_torch  # noqa: E402

SMALL = Shape("small", 8, 64, 2, 32, 2, 96)
CLOCK = kernels_torch.TorchClock(torch.device("cpu"), "float32", "a test")


def found_cases(shape: Shape = SMALL) -> list[Case]:
    return list(kernels_torch.cpu_cases(shape, CLOCK))


# --- correctness ---------------------------------------------------------------------------------


def test_the_model_of_a_bench_profile() -> None:
    shape = kernel_cases.shape_of(PROFILES["tiny"])
    assert (shape.rows, shape.context, shape.heads, shape.head_dim, shape.depth) == (8, 256, 2, 64, 4)
    assert shape.dim == 128 and shape.tokens == 2048


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_way_computes_the_same(dtype: str) -> None:
    clock = replace(CLOCK, dtype=dtype)
    cases = list(kernels_torch.cpu_cases(SMALL, clock))
    assert {c.kernel for c in cases} == {"attention", "mlp", "head", "optimizer"}
    for case in cases:
        assert len(case.sides) >= 2 and sum(side.ours for side in case.sides) == 1
        for name, error in kernel_cases.checked(case, clock).items():
            assert isinstance(error, float) and error <= case.tolerance[dtype], (case.kernel, case.what, name, error)


def broken_attention(q: Any, k: Any, v: Any, dy: Any) -> list[Any]:
    """The window is dropped."""
    T = q.size(1)
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    return kernels_torch.differentiated(lambda q, k, v: kernels_torch.plain_attention(q, k, v, seen), 3)(q, k, v, dy)


def broken_head(x: Any, head: Any, targets: Any) -> list[Any]:
    """Another softcap."""
    x, head = x.detach().requires_grad_(), head.detach().requires_grad_()
    loss = torch.nn.functional.cross_entropy(30 * torch.tanh((x @ head.T) / 30), targets)
    return [loss.detach(), *torch.autograd.grad(loss, (x, head))]


def broken_muon(given: Any) -> list[Any]:
    """NorMuon's scale is missing."""
    from kernels import plain

    for weights, grads, momentum, _ in given:
        momentum.lerp_(grads, 1 - kernels_torch.RATES[1])
        g = plain.orthogonalise(grads.lerp(momentum, kernels_torch.RATES[1]), torch.float32, 5)
        lr = max(1.0, weights.size(1) / weights.size(2)) ** 0.5
        weights -= lr * g + lr * kernels_torch.RATES[2] * weights * ((g * weights) >= 0)
    return [weights for weights, *_ in given]


@pytest.mark.parametrize(
    ("kernel", "what", "broken"),
    [("attention", "window 32", broken_attention), ("head", "", broken_head), ("optimizer", "Muon", broken_muon)],
)
def test_who_computes_something_else_is_not_timed(kernel: str, what: str, broken: Any) -> None:
    case = next(c for c in found_cases() if c.kernel == kernel and what in c.what and c.direction != "forward")
    lines = kernel_cases.measure("cpu", replace(case, sides=[*case.sides, Side("broken", broken)]), CLOCK, 0.0)
    *right, wrong = lines
    assert wrong.way == "broken" and not wrong.passed and wrong.seconds == []
    assert wrong.note.startswith("it does not compute the same: ")
    assert all(line.passed and len(line.seconds) >= kernel_cases.LEAST_ROUNDS for line in right)


def test_who_fails_is_told_and_the_others_are_timed() -> None:
    def failing(*given: Any) -> Any:
        raise RuntimeError("no such instruction\non this card")

    case = found_cases()[0]
    refused = {"fa3": "it needs sm_90"}
    lines = kernel_cases.measure(
        "cpu", replace(case, sides=[*case.sides, Side("peer", failing)], refused=refused), CLOCK, 0.0
    )
    told = {line.way: line.note for line in lines if not line.passed}
    assert told == {"fa3": "it needs sm_90", "peer": "RuntimeError: no such instruction on this card"}
    assert len({len(line.seconds) for line in lines if line.passed}) == 1  # rounds are whole


def test_who_has_no_room_for_all_rows_is_told() -> None:
    case = next(c for c in found_cases() if c.kernel == "mlp")
    (ours, *_) = case.sides

    def hungry(x: Any, *rest: Any) -> Any:
        if len(x) > SMALL.tokens // 8:
            raise MemoryError("9.6 of 10.0 GiB")
        return ours.run(x, *rest)

    (told,) = [
        line for line in kernel_cases.measure("cpu", replace(case, sides=[ours, Side("peer", hungry)]), CLOCK, 0.0)
        if not line.passed
    ]  # fmt: skip
    assert (told.way, told.note) == ("peer", "with all rows: MemoryError: 9.6 of 10.0 GiB")


def test_what_is_not_finite_or_of_another_shape_is_infinitely_wrong() -> None:
    wanted = [np.ones((2, 2))]
    for bad in (torch.full((2, 2), torch.nan), torch.ones(4)):
        assert kernel_cases.worst(CLOCK, [bad], wanted) == float("inf")
    assert kernel_cases.worst(CLOCK, [torch.ones(2, 2)], wanted) == 0.0


# --- timing --------------------------------------------------------------------------------------


def test_inputs_take_turns_and_exceed_the_cache() -> None:
    case = next(c for c in found_cases() if c.kernel == "mlp")
    sets = kernel_cases.rotated(case, CLOCK)
    size = CLOCK.size(sets[0])
    assert size * len(sets) >= 2 * CLOCK.cache() or len(sets) == kernel_cases.MOST_INPUTS
    assert not torch.equal(sets[0][0], sets[1][0])


def test_all_sides_run_in_every_round_and_begin_in_turns() -> None:
    ran: list[str] = []
    sides = [Side(name, lambda name=name: ran.append(name)) for name in "abc"]
    times = kernel_cases.timed(sides, [(), ()], CLOCK, 0.0)
    rounds = ["".join(ran[i : i + 3]) for i in range(3 * kernel_cases.WARM, len(ran), 3)]
    assert rounds == ["abc", "bca", "cab"] and {len(t) for t in times.values()} == {3}


@given(st.floats(1, 1e15), st.floats(1, 1e12), st.floats(1, 1e15), st.floats(1, 1e12))
def test_of_two_peaks_the_better_of_each(f1: float, b1: float, f2: float, b2: float) -> None:
    found = kernel_cases.higher(Peak(f1, "1", b1, "1"), Peak(f2, "2", b2, "2"))
    assert (found.flops, found.bandwidth) == (max(f1, f2), max(b1, b2))
    assert kernel_cases.higher(None, found) is found


def test_work_is_counted_once_whoever_does_it() -> None:
    every = Shape("x", 2, 4, 1, 8, 1, 16)
    assert kernel_cases.attention_work(every, 4, 2, False) == Work(4 * 2 * 8 * (1 + 2 + 3 + 4), 4 * 2 * 4 * 8 * 2)
    assert kernel_cases.attention_work(every, 1, 2, True).flops == 3 * 4 * 2 * 8 * (1 + 2 + 2 + 2)
    assert kernel_cases.head_work(every, 2, True).flops == 3 * 2 * 8 * 8 * 16


# --- other backends ------------------------------------------------------------------------------


def test_the_cases_of_a_card_in_tritons_interpreter() -> None:
    """The recipe's kernels and what of their peers a CPU can do. The interpreter's switch is read once per process."""
    pytest.importorskip("triton")
    code = (
        "import torch\nfrom benchmarks import kernel_cases as k, kernels_cuda, kernels_torch\n"
        "shape = k.Shape('x', 1, 32, 1, 32, 2, 64)\n"
        "clock = kernels_torch.TorchClock(torch.device('cpu'), 'float32', 'x')\n"
        "for case in kernels_cuda.cuda_cases(shape, clock):\n"
        "    for name, error in k.checked(case, clock).items():\n"
        "        right = isinstance(error, float) and error <= case.tolerance['float32']\n"
        "        print(case.kernel, name, right, sep='\\t')\n"
        "    print(*case.refused, sep='\\t')\n"
    )
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project_root(), env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-800:]
    lines = [line.split("\t") for line in done.stdout.splitlines() if "True" in line or "False" in line]
    assert {line[0] for line in lines} == {"attention", "mlp", "head", "optimizer"}
    assert [line for line in lines if line[2] != "True"] == []
    assert any("recipe (triton)" in line for line in lines) and "fa3" in done.stdout


def test_mlx_computes_the_same() -> None:
    """Uncompiled: compiling takes a minute of C++."""
    mx = pytest.importorskip("mlx.core")
    from benchmarks import kernels_mlx

    mx.disable_compile()
    try:
        clock = kernels_mlx.MlxClock("cpu", "float32", "a test")
        with mx.stream(mx.cpu):
            cases = list(kernels_mlx.mlx_cases(SMALL, clock))
            assert {c.kernel for c in cases} == {"attention", "mlp", "head", "optimizer"}
            for case in cases:
                for name, error in kernel_cases.checked(case, clock).items():
                    assert isinstance(error, float) and error <= case.tolerance["float32"], (case.kernel, name, error)
    finally:
        mx.enable_compile()


# --- the command ---------------------------------------------------------------------------------


def order(backend: str) -> kernel_run.Order:
    return kernel_run.Order(backend, SMALL, 0.0, "mlp")


def test_a_child_that_crashes_or_hangs_is_told() -> None:
    crashed = kernel_run.measured(order("nonesuch"), lambda text: None)
    assert crashed.failed.startswith("it ended with status 1: ") and "nonesuch" in crashed.failed
    assert kernel_run.measured(order("cpu"), lambda text: None, patience=0.0).failed == "it said nothing for 0 s"


def test_an_interrupted_measurement_leaves_no_process() -> None:
    def interrupted(text: str) -> None:
        raise KeyboardInterrupt

    before = set(psutil.Process().children())
    with pytest.raises(KeyboardInterrupt):
        kernel_run.measured(order("cpu"), interrupted)
    assert set(psutil.Process().children()) <= before


def test_what_was_said_before_a_crash_stands() -> None:
    import queue

    said: queue.Queue[str | None] = queue.Queue()
    (line, *_) = kernel_cases.measure("cpu", found_cases()[0], CLOCK, 0.0)
    for text in ("a library's remark", json.dumps({"stage": "mlp"}), json.dumps({"kernel": line.__dict__}), None):
        said.put(text)
    found, stages = kernel_run.Found("cpu"), []
    assert kernel_run._gathered(found, said, stages.append, 1.0) == "" and stages == ["mlp"]
    assert found.kernels == [line]


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "kernels", *argv])
    return int(ended.value.code or 0)


@pytest.mark.slow
def test_kernels_are_measured_and_added_to_a_result(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "result.json"
    save(replace(a_result(), kernels=[], kernel_peaks={}), file)
    argv = ["--backend", "cpu", "--quick", "--only", "mlp", "--json", "--into", str(file)]
    assert run(*argv, "--page", str(tmp_path / "out")) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["failed"] == {} and len(document["kernels"]) == 4
    assert all(k["passed"] and k["inputs"] > 1 for k in document["kernels"])
    (peak,) = document["peaks"].values()
    assert peak["flops"] > 1e9 and peak["bandwidth"] > 1e8
    result = load(file)
    assert [k.way for k in result.kernels if k.ours] == ["recipe (own backward)"] * 2
    assert list((tmp_path / "out").glob("roofline-cpu-*.png"))


def test_wrong_use_costs_no_measurement(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    assert run("--page", str(tmp_path)) == 2
    (tmp_path / "damaged.json").write_text("{")
    assert run("--into", str(tmp_path / "damaged.json")) == 1
    assert "is damaged" in capsys.readouterr().err
    assert run("--backend", "nonesuch") == 1
    assert "there is no backend 'nonesuch'" in capsys.readouterr().err
