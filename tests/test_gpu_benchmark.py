"""`benchmarks.gpu` on a CPU: every section runs small by Triton's interpreter, and what it writes is whole."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from core.paths import project_root

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from backends.cuda.learning import LEARNING  # noqa: E402 - after the skips
from benchmarks import gpu, gpu_correctness, gpu_rtx, gpu_run, gpu_sections, kernel_cases, upstream_side  # noqa: E402
from benchmarks.gpu import LIMITS, SMOKE, run_section, table  # noqa: E402
from core import sandbox  # noqa: E402
from kernels import mlp_choice, plain  # noqa: E402


@pytest.mark.slow
def test_all_sections_run_small_and_write_what_they_found(tmp_path):
    """In two commands side by side: a section is one thread's work, half of it the import of torch."""
    alone = {"correctness", "run", "step"}
    parts = {"a": [n for n in LIMITS if n in alone], "b": [n for n in LIMITS if n not in alone | {"upstream"}]}
    started = []
    for name, sections in parts.items():
        command = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--out", str(tmp_path / name)]
        command += [f"--only={section}" for section in sections]
        started.append(subprocess.Popen(command, cwd=project_root(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    said = [process.communicate(timeout=500)[0].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    rows = [r for name in parts for r in json.loads((tmp_path / name / "results.json").read_text())["rows"]]
    assert {row["section"] for row in rows} == LIMITS.keys() - {"upstream"}
    assert len([row for row in rows if row.get("passed")]) == 44
    sides = [row["side"] for row in rows if row["section"] == "mlp" and "side" in row]
    assert sides == ["ours", "ours, products of torch", "torch.compile", "ratio"]
    (chosen,) = [row for row in rows if row["section"] == "mlp" and "chosen" in row]
    assert chosen["products"] == "triton" and "interpreted" in chosen["chosen"], "there is no card to time them on"
    stacks = [row for row in rows if "plain reference" in row]
    assert len(stacks) == 6 and all(row["kernel"].startswith("muon") for row in stacks)
    sides = [row["side"] for row in rows if row["section"] == "rtx"]
    assert sides == [*gpu_rtx.OURS, "peer", *(f"peer / {side}" for side in gpu_rtx.OURS)]
    ours, upstreams = [row for row in rows if row["section"] == "step" and "steps" in row]
    assert (ours["steps"], ours.get(gpu.CONSTANTS)) == (3, None)
    assert (upstreams["steps"], upstreams[gpu.CONSTANTS]) == (3, gpu.ALIKE) and ours["loss"] != upstreams["loss"]
    (scored,) = [row for row in rows if row["section"] == "run" and row.get("status")]
    assert scored["status"] == "scored" and scored["val_bpb"] > 0
    assert "## correctness" in (tmp_path / "a" / "results.md").read_text()


def test_a_section_that_fails_leaves_a_row_with_the_reason():
    rows = list(run_section("nonesuch", SMOKE, 60))
    assert rows[-1]["failed"] == "exit status 1" and "nonesuch" in rows[-1]["error"]
    assert "Traceback" in rows[-1]["stderr"] and "Traceback" not in table(rows), "what is to be mended is in the JSON"


def test_what_a_section_leaves_over_is_for_the_others(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(gpu, "run_section", lambda name, order, limit, caches: given.append((name, limit)) or iter(()))
    gpu.measure(SMOKE, ["step", "run"], tmp_path)
    assert given[0] == ("step", pytest.approx(gpu.TOTAL - LIMITS["run"], abs=1))
    assert given[1] == ("run", pytest.approx(gpu.TOTAL, abs=1))
    monkeypatch.setattr(gpu, "TOTAL", float(LIMITS["step"]))  # too little for both: the first has its own limit
    gpu.measure(SMOKE, ["step", "run"], tmp_path)
    assert given[2] == ("step", pytest.approx(LIMITS["step"], abs=1))


def printer(folder: Path, code: str) -> str:
    """A program that takes the place of a section's Python and does something else."""
    made = folder / "python"
    made.write_text(f"#!{sys.executable}\n{code}\n")
    made.chmod(0o755)
    return str(made)


def test_lines_of_others_are_no_rows(tmp_path, monkeypatch):
    code = 'print(\'{not json}\\n{1: 2}\\n[1]\\n{"time": 1}\\nnote\\n{"time": 2, "cut\')'
    monkeypatch.setattr(gpu.sys, "executable", printer(tmp_path, code))
    assert list(run_section("facts", SMOKE, 60)) == [{"section": "facts", "time": 1}]


def test_a_section_that_cannot_be_killed_holds_nobody_up(tmp_path, monkeypatch):
    """As one that is stuck in the driver: what it has printed counts."""
    code = "import time; print('{\"time\": 1}', flush=True); time.sleep(60)"
    monkeypatch.setattr(gpu.sys, "executable", printer(tmp_path, code))
    monkeypatch.setattr(gpu, "KILLED_WITHIN", 0.2)
    stuck = []
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: stuck.append(process))
    rows = list(run_section("facts", SMOKE, 3))
    monkeypatch.undo()
    for process in stuck:
        process.kill()
        process.wait()
    assert rows[0] == {"section": "facts", "time": 1} and rows[1]["failed"] == "not done within 3 s" and stuck


def test_a_child_of_the_run_finds_what_the_sections_compiled(tmp_path, monkeypatch):
    caches = tmp_path / "caches"
    childs = sandbox.environment(tmp_path, tmp_path, caches)
    counts = ("TORCH_COMPILE_CACHE_KEY_TAG", "TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD", "PYTHONHASHSEED")
    wanted = {k: v for k, v in childs.items() if k in counts or (str(caches) in v and k != "CUDA_CACHE_PATH")}
    assert len(wanted) == 6
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    monkeypatch.setattr(gpu.sys, "executable", printer(tmp_path, code))
    (row,) = run_section("facts", SMOKE, 60, caches)
    assert {k: row.get(k) for k in wanted} == wanted


def test_a_run_starts_from_them_and_its_warm_up_ends_before_its_section(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("core.referee.execute", asked.append)
    facts = {"path": tmp_path, "sha256": "", "vocab_size": 257, "bos_id": 256}
    for change in ({}, {"caches": str(tmp_path), "limit": 125.0}, {"device": "cuda:0", "caches": str(tmp_path)}):
        gpu_run.experiment(replace(SMOKE, **change), SimpleNamespace(**facts), tmp_path)
    alone, among, on_card = asked
    assert (alone.caches, alone.settings.warmup_cap) == (None, 180.0)
    assert (among.caches, among.settings.warmup_cap) == (tmp_path, 65.0)
    assert b'\nATTENTION = "triton"' in on_card.source  # nothing has timed the others
    (tmp_path / "xdg").mkdir()
    (tmp_path / "xdg" / "attention-1.json").touch()
    gpu_run.experiment(replace(SMOKE, device="cuda:0", caches=str(tmp_path)), SimpleNamespace(**facts), tmp_path)
    assert b'\nATTENTION = "auto"' in asked[-1].source


def test_the_output_gradient_is_made_once_for_all_that_is_timed(monkeypatch):
    made = []
    monkeypatch.setattr(gpu_sections, "output_gradient", lambda y: made.append(y.shape) or torch.ones_like(y))
    monkeypatch.setattr(gpu_correctness, "output_gradient", lambda y: pytest.fail("made while it was timed"))
    double = [(torch.ones(3, 2),)]
    rows = list(gpu_sections.against(SMOKE, lambda x: 2 * x, lambda x: x + x, double, 1))
    assert made == [(3, 2)] and rows[-1]["side"] == "ratio"


@pytest.mark.parametrize("side", ["found", "wanted"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_fails(side, wrong):
    """Also where another of the tensors is right: the larger of 0.001 and NaN is 0.001 to Python."""
    good, bad = torch.ones(4), torch.tensor([1.0, wrong, 1.0, 1.0])
    found, wanted = ([good, bad], [good, good]) if side == "found" else ([good, good], [good, bad])
    row = gpu_correctness.compare("one", found, wanted, torch.float16)
    assert row["passed"] is False and row["error"] == float("inf")
    assert gpu_correctness.compare("one", [good], [good], torch.float16)["passed"]


def test_the_output_gradient_of_many_halves_is_finite():
    dy = gpu_correctness.output_gradient(torch.empty(2**10, 2**11, dtype=torch.float16))
    assert dy.dtype == torch.float16 and dy.isfinite().all() and (float(dy.min()), float(dy.max())) == (-1.0, 1.0)


def test_a_kernel_that_fails_leaves_the_others(monkeypatch):
    def breaks(*_):
        raise RuntimeError("PassManager::run failed\nmore")

    monkeypatch.setattr("kernels.linear_relu2.mlp", breaks)
    monkeypatch.setattr(gpu_correctness, "attention", lambda name, *_: {"kernel": name})
    monkeypatch.setattr(gpu_correctness, "muon", lambda name, *_, of: {"kernel": name})
    found = list(gpu_correctness.correctness(SMOKE))
    broken = [row for row in found if row["kernel"] == "mlp"]
    assert [row["failed"] for row in broken] == ["RuntimeError: PassManager::run failed"] * 2
    assert not any(row["passed"] for row in broken) and found[-1]["kernel"].startswith("muon")


HALVES = {
    "project": partial(gpu_correctness.project, gated=False),
    "project, value embeddings": partial(gpu_correctness.project, gated=True),
    "feed": partial(gpu_correctness.feed, by="torch", keep_hidden=True),
    "feed, hidden made again": partial(gpu_correctness.feed, by="torch", keep_hidden=False),
    "last_norm": gpu_correctness.last_norm,
}


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_halves_of_a_layer_are_looked_at_as_the_recipes_have_them(monkeypatch, name, dtype):
    """In plain torch; and told where a norm is taken for another row's, or a gradient is left out."""
    row = HALVES[name](name, SMOKE, dtype)
    assert row["kernel"] == name and row["passed"] and row["error"] < gpu_correctness.TOLERANCE[dtype] / 3
    real = plain.inverse_rms
    monkeypatch.setattr(plain, "inverse_rms", lambda z: real(z).roll(1, 0))
    assert HALVES[name](name, SMOKE, dtype)["error"] > 0.1
    monkeypatch.setattr(plain, "inverse_rms", real)
    for door in ("norm_backward", "scaled_backward"):
        monkeypatch.setattr(plain, door, zeros_of(getattr(plain, door)))
    assert HALVES[name](name, SMOKE, dtype)["passed"] is False


def zeros_of(function):
    def run(*given):
        found = function(*given)
        return tuple(t.zero_() for t in found) if isinstance(found, tuple) else found.zero_()

    return run


def test_a_step_that_fails_is_repeated_with_tritons_attention(monkeypatch):
    real, asked = gpu_sections.recipe, []

    def recipe(order, **constants):
        asked.append(constants)
        if not constants:
            raise RuntimeError("no kernel image is available")
        return real(order, ATTENTION="reference")  # as the interpreter is not on here

    monkeypatch.setattr(gpu_sections, "recipe", recipe)
    monkeypatch.setattr(gpu_sections, "steps", lambda order, one, *most: iter([{"ms": 1.0}]))
    first, *others = gpu_sections.step(SMOKE)
    assert first["failed"].endswith("no kernel image is available") and first["passed"] is False
    assert asked == [{}, {"ATTENTION": "triton"}]
    assert others[0]["ms"] == 1.0 and all("triton" in row["repeated"] for row in [first, *others])


def test_our_steps_learn_as_on_an_h100_and_then_as_upstream(monkeypatch):
    """The recipe's module is one, so that the second training compiles nothing."""
    made, built, epsilons, trainings = [], [], [], weakref.WeakSet()

    class Training:
        def describe(self):
            return {}

        def step(self, tokens, progress):
            return torch.tensor(1.0)

    def build(spec):
        gpu_sections.gc.collect()
        assert not trainings, "there may be no room for two"
        training = Training()
        trainings.add(training)
        built.append({name: getattr(made[0], name) for name in LEARNING})
        epsilons.append(made[0].SCALAR_EPSILON)
        return training

    real = gpu_sections.recipe

    def recipe(order, **constants):
        made.append(real(order, **constants))
        made[0].build = build
        return made[0]

    monkeypatch.setattr(gpu_sections, "recipe", recipe)
    rows = [row for row in gpu_sections.our_steps(replace(SMOKE, steps=120)) if "steps" in row]
    assert len(made) == 1 and built[0] == LEARNING
    shipped = real(SMOKE)
    assert built[1] == {name: getattr(shipped, name) for name in LEARNING} != built[0]
    assert epsilons == [1e-10, 1e-5], "or the first step of scalars would be chance in the comparison of kernels"
    assert [(row["steps"], row["of"], gpu.CONSTANTS in row) for row in rows] == [
        *((n, 120, False) for n in (10, 50, 100, 120)),
        *((n, 120, True) for n in (10, 50)),
    ]


def steps(monkeypatch, count, ends=0.0, takes=0.0):
    """Rows of steps whose loss is how many there were before, by a clock that goes on by `takes` in each."""
    clock, seen = [1000.0], []

    def one(tokens, progress):
        clock[0] += takes
        seen.append(progress)
        return torch.tensor(float(len(seen) - 1))

    monkeypatch.setattr(gpu_sections.time, "time", lambda: clock[0])
    rows = list(gpu_sections.steps(replace(SMOKE, steps=count, ends=ends), one))
    return rows, seen


def test_steps_tell_what_there_is_on_the_way(monkeypatch):
    rows, _ = steps(monkeypatch, 120)
    assert [(row["steps"], row["loss"]) for row in rows] == [(10, 9.0), (50, 49.0), (100, 99.0), (120, 119.0)]
    assert all(row["ms"] > 0 and row["first_seconds"] > 0 for row in rows)
    assert [row["steps"] for row in steps(monkeypatch, 100)[0]] == [10, 50, 100]
    assert [row["steps"] for row in steps(monkeypatch, 3)[0]] == [3]


def test_steps_end_in_time_and_keep_to_the_schedule_of_all(monkeypatch):
    rows, seen = steps(monkeypatch, 100, ends=1040.0, takes=1.0)
    assert [(row["steps"], row["of"], row["loss"]) for row in rows] == [(10, 100, 9.0), (31, 100, 30.0)]
    assert seen == [i / 100 for i in range(31)]


@pytest.mark.parametrize(
    ("loss", "data", "done", "passed"),
    [
        (float("nan"), "", 3, False),
        (float("inf"), "data", 100, False),
        (4.5, "data", 50, False),  # ln 97 is 4.57
        (4.1, "data", 50, True),
        (4.5, "data", 10, True),  # too early
        (4.5, "", 100, True),  # random tokens teach nothing
    ],
)
def test_a_loss_that_says_the_training_is_wrong_fails(loss, data, done, passed):
    row = gpu_sections.after(replace(SMOKE, data=data), done, [0.0, 1.0], loss)
    assert row.get("passed", True) is passed and ("reason" in row) is not passed


def test_upstream_starts_from_our_weights(monkeypatch):
    ours = gpu_sections.recipe(SMOKE).build(gpu_sections.spec(SMOKE)).weights()
    monkeypatch.setattr("benchmarks.gpu_upstream.Training", lambda order, attention, weights: weights)
    loaded = {name: w.numpy() for name, w in gpu_sections.upstream_step(SMOKE, None).items()}
    assert sorted(loaded) == sorted(ours)
    model = torch.nn.Module()
    model.register_parameter("lm_head", torch.nn.Parameter(torch.zeros(97, 64, dtype=torch.bfloat16)))
    with pytest.raises(ValueError, match="other names"):
        upstream_side.load(model, loaded)
    assert all((loaded[name] == value).all() for name, value in ours.items())


def test_a_step_tells_its_settings_with_its_first_row_and_what_the_loader_takes(monkeypatch, dataset):
    real, order = gpu_sections.recipe, replace(SMOKE, data=str(dataset.path), vocab=dataset.vocab_size)
    monkeypatch.setattr(gpu_sections, "recipe", lambda order, **_: real(order, ATTENTION="reference"))
    monkeypatch.setattr(
        gpu_sections, "steps", lambda order, one, *most: iter([] if most else [{"ms": 8.0}, {"ms": 10.0}])
    )
    first, *told, last, loader = gpu_sections.step(order)
    assert (first, last) == ({"ms": 8.0}, {"ms": 10.0})
    assert [row["setting"] for row in told] == [
        "rows_at_once", "rows_reason", "attention over 32", "attention over 64", "mlp",
    ]  # fmt: skip
    assert loader["loader_batches"] == 50 and loader["loader_seconds"] > 0
    assert loader["loader_share"] == pytest.approx(loader["loader_seconds"] / 50 * 1e3 / 10.0)


def test_attention_is_told_beside_tritons(monkeypatch):
    choice = SimpleNamespace(milliseconds={"triton": 2.0, "flex": 3.0}, refused={}, name="triton", reason="")
    monkeypatch.setattr("kernels.attention_choice.choose", lambda case: choice)
    monkeypatch.setattr("kernels.attention_choice.keep", lambda *_: None)
    times = [row["times triton's"] for row in gpu_sections.attention(SMOKE) if "ms" in row]
    assert times == [1.0, 1.5] * 3, "per window and peer"


def test_the_mlp_is_told_by_each_that_it_was_timed_with_and_kept_for_the_next_sections(monkeypatch):
    choice, kept = mlp_choice.Choice("torch", "faster", {"torch": 1.0, "triton": 2.0}), []
    monkeypatch.setattr("kernels.mlp_choice.choose", lambda case: choice)
    monkeypatch.setattr("kernels.mlp_choice.keep", lambda case, found: kept.append((case, found)))
    monkeypatch.setattr(gpu_sections, "against", lambda *given: iter(()))
    *timed, chosen = gpu_sections.mlp(SMOKE)
    assert [(row["products"], row["ms"]) for row in timed] == [("torch", 1.0), ("triton", 2.0)]
    assert timed[0]["tflops"] == 2 * timed[1]["tflops"]
    assert chosen == {"products": "torch", "chosen": "faster"}
    assert kept[0][1] is choice and kept[0][0].hidden == 4 * SMOKE.dim
    choice = mlp_choice.Choice("torch", "triton is wrong", {"torch": 1.0}, {"triton": "refused: it is 9 % off"})
    _, wrong, chosen = gpu_sections.mlp(SMOKE)
    assert wrong == {"products": "triton", "not measured": "refused: it is 9 % off"} and chosen["products"] == "torch"


def test_tolerances_are_those_of_the_bench():
    for ours, benchs in (("TOLERANCE", kernel_cases.TOLERANCE), ("MUON_TOLERANCE", kernel_cases.MUON_TOLERANCE)):
        assert {str(k)[6:]: v for k, v in getattr(gpu_correctness, ours).items()} == benchs


def test_packages_that_were_brought_along_are_found(tmp_path, monkeypatch):
    (tmp_path / "triton.py").write_text("__version__ = 'brought along'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (row,) = run_section("facts", SMOKE, 60)
    assert row["triton"] == "brought along"


def test_without_a_trainer_of_tokenizers_a_run_reads_bytes(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rustbpe", None)
    dataset = gpu_run.data(SMOKE, tmp_path)
    assert dataset.vocab_size == 257 and dataset.bos_id == 256


def test_one_that_hangs_is_ended():
    assert list(run_section("step", SMOKE, 0.01))[-1]["failed"] == "not done within 0 s"


def test_nine_minutes_at_most(tmp_path, monkeypatch):
    """Also beside an upstream: every section has its time. One that finds none left says so."""
    order = list(LIMITS)
    assert order.index("upstream") == order.index("step") + 1 and order.index("run") < order.index("rtx")
    assert sum(LIMITS.values()) <= gpu.TOTAL <= 540
    monkeypatch.setattr(gpu, "TOTAL", 0.01)
    assert gpu.measure(SMOKE, ["facts", "step"], tmp_path) == 1
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["failed"] for row in rows] == ["not done within 0 s"] * 2


def test_rows_are_kept_as_they_come(tmp_path, monkeypatch):
    """Whoever is killed in a section has lost nothing of it, and leaves no process behind."""
    code = "import time; print('{\"time\": 1}', flush=True); time.sleep(60)"
    monkeypatch.setattr(gpu.sys, "executable", printer(tmp_path, code))
    monkeypatch.setattr(gpu, "POLL", 0.05)
    rows = run_section("facts", SMOKE, 50)
    began = time.monotonic()
    assert next(rows) == {"section": "facts", "time": 1}
    rows.close()
    assert time.monotonic() - began < 30

    def interrupted(name, *_):
        yield {"section": name, "time": 1}
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "run_section", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu.measure(SMOKE, ["facts"], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == [{"section": "facts", "time": 1}]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["results.json", "results.md"]


def test_what_is_compiled_lies_outside_and_goes(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(gpu, "run_section", lambda *a: given.append((a[3], a[3].is_dir())) or iter(()))
    gpu.measure(SMOKE, ["facts", "step"], tmp_path)
    (first, was), second = given
    assert was and second == (first, True), "one section finds what the one before compiled"
    assert not first.exists() and not first.is_relative_to(tmp_path)


def test_both_sides_are_compared_after_equal_steps():
    ours = [{"section": "step", "steps": n, "ms": 2.0, "peak_gib": 3.0, "loss": 5.0 - n / 100} for n in (10, 50, 100)]
    peer = [{"section": "upstream", "steps": n, "ms": 3.0, "peak_gib": 6.0, "loss": 5.0} for n in (10, 50, 73)]
    assert gpu.ratios([*ours, {"section": "step", "failed": "x"}, *peer]) == [
        {"section": "upstream", "steps": 50, "step_ratio": 1.5},
        {"section": "upstream", "steps": 50, "memory_ratio": 0.5},
        {"section": "upstream", "steps": 50, "loss_difference": -0.5},
    ]
    assert gpu.ratios(ours) == []
    alike = [{**row, "loss": row["loss"] + 0.25, gpu.CONSTANTS: gpu.ALIKE} for row in (*ours[:2], *peer)]
    *others, last = gpu.ratios([*ours, *alike, *peer])
    assert others == gpu.ratios([*ours, *peer]), "what is learnt is compared with our own constants"
    assert last == {"section": "upstream", "steps": 50, gpu.CONSTANTS: gpu.ALIKE, "loss_difference": -0.5}


def test_the_table_has_a_column_for_every_name():
    text = table([{"section": "a", "x": 1.23456}, {"section": "a", "y": "p|q"}, {"section": "b", "z": None}])
    assert "| x | y |" in text and "| 1.235 |  |" in text and "p/q" in text and "## b" in text


def test_it_imports_nothing_beyond_what_its_machine_has():
    """torch, triton, numpy, tiktoken, pyarrow: what else is there makes a section say that it was not measured."""
    absent = ("click", "rich", "psutil", "scipy", "git", "anthropic", "optuna", "rustbpe", "safetensors", "pynvml")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r}))\n"
    code += "from benchmarks.gpu import SMOKE, LIMITS; from benchmarks import gpu_sections, kernels\n"
    code += "assert gpu_sections.SECTIONS.keys() == LIMITS.keys()\n"
    code += "print(list(gpu_sections.run(SMOKE)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=project_root(), capture_output=True, text=True, timeout=120)
    assert "is not installed" in done.stdout, done.stderr


def test_without_a_card_it_is_told_at_once(tmp_path):
    """PyTorch's build for the processor, as PyPI has it for Windows, or a machine without a card."""
    given = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "results")]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(given, cwd=project_root(), env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and done.stdout == ""
    assert re.match(r"torch \S+ finds no NVIDIA GPU; `autoresearch doctor` says what to do", done.stderr)
    assert not (tmp_path / "results").exists()
