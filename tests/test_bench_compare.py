"""Result files: what is read and what is refused, and which differences are called noise."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import agreeing, comparing, results
from benchmarks.metrics import METRICS
from benchmarks.results import BackendResult, Fixed, Machine, Peak, Result, Score, Speed, Work
from benchmarks.work import PROFILES, shapes
from cli import cli
from core.errors import UserError

WORK = Work(
    "tiny", 1, "kjv", "a" * 64, "b" * 64, "c" * 64, 2048, 256, 2048, 8, {"DEPTH": 4, "HEAD_DIM": 64},
    1_835_144, 32, 32768, 10.0,
)  # fmt: skip


def machine(label: str = "a PC, 2 cores") -> Machine:
    return Machine(label, "linux", "6.1", "x86_64", "a PC", ["avx2"], 2, 2, 2**34, [], False, False,
                   {"python": "3.11.9", "torch": "2.13.0"}, "0" * 16)  # fmt: skip


def backend(name: str, step: float, noise: float = 0.01, bpb: tuple[float, ...] = (2.2, 2.21), seed: int = 1):
    rng = random.Random(seed)
    times = [step * math.exp(rng.gauss(0, noise)) for _ in range(5)]
    scores = [Score(42 + i, b, "", 100, 204800, 10.0, 1.0, 15.0, 32768, [(1.0, 10, 20480, 5.0)])
              for i, b in enumerate(bpb)]  # fmt: skip
    return BackendResult(
        name, "measured", device="cpu", dtype="float32", flops_per_token=9e6, peak=Peak(1e11, "measured", 1e10, "m"),
        speed=Speed(times, [0, 1, 2, 3, 4], 28, 2048, [3e4] * 5, [2.0] * 5, [0.1] * 5, [1.0] * 5, [4e8] * 5),
        fixed=Fixed(32, 5.0, [(0.1, 1, 2048, 7.0)]), scores=scores,
    )  # fmt: skip


def result(*backends: BackendResult, work: Work = WORK, label: str = "a PC, 2 cores") -> Result:
    return Result(work, work.id(), machine(label), "2026-11-28", True, 100.0, list(backends))


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "compare", *argv])
    return int(ended.value.code or 0)


# --- files -------------------------------------------------------------------------------------


def test_a_result_comes_back_as_it_was_written(tmp_path):
    made = result(backend("cpu", 0.1), BackendResult("mlx", "crashed", reason="killed by SIGKILL after step 3 of 32"))
    results.save(made, tmp_path / "a.json")
    assert results.load(tmp_path / "a.json") == made
    assert list(tmp_path.iterdir()) == [tmp_path / "a.json"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: "", "is damaged"),
        (lambda text: "[1, 2]", "is no result of"),
        (lambda text: '{"schema": 1, "val_bpb": 0.9}', "is no result of"),
        (lambda text: text.replace('"schema": 2', '"schema": 99'), "is of schema 99, this version reads 2"),
        (lambda text: text.replace('"schema": 2', '"schema": 1'), "this version reads 2; run the bench again"),
        (lambda text: text.replace('"context": 256', '"context": 512'), "was changed"),
        (lambda text: text.replace('"status": "measured"', '"status": "splendid"'), "backends.0.status"),
        (lambda text: text.replace('"seed": 42', '"seed": "x"'), "backends.0.scores.0.seed"),
        (lambda text: text.replace('"dtype": "float32"', '"dtype": NaN', 1), "is damaged"),
    ],
)
def test_what_is_no_result_is_told_in_one_line(change, says, tmp_path, capsys):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    results.save(result(backend("cpu", 0.1)), good)
    changed = change(good.read_text())
    assert changed != good.read_text()
    bad.write_text(changed)
    assert run(str(good), str(bad)) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and says in errors and errors.count("\n") == 1 and str(bad) in errors


def test_a_missing_and_a_binary_file_are_told(tmp_path, capsys):
    assert run(str(tmp_path / "none.json")) == 1
    assert "cannot be read: No such file" in capsys.readouterr().err
    (tmp_path / "image.json").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    assert run(str(tmp_path / "image.json")) == 1
    assert "is damaged" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path):
    file = tmp_path / "a.json"
    results.save(result(backend("cpu", 0.1)), file)
    before = file.read_bytes()
    Path(f"{file}.part").mkdir()  # as a disk that takes no new file
    with pytest.raises(UserError, match="cannot be written"):
        results.save(result(backend("cpu", 0.2)), file)
    assert file.read_bytes() == before


def test_no_space_is_called_by_its_name(tmp_path):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no full device")
    (tmp_path / "a.json.part").symlink_to(full)
    with pytest.raises(UserError, match="no space is left on the disk"):
        results.save(result(backend("cpu", 0.1)), tmp_path / "a.json")


def test_a_named_file_is_never_written_over_and_our_own_names_count_up(tmp_path):
    (tmp_path / "a.json").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        results.reserve(tmp_path / "a.json", True)
    assert results.reserve(tmp_path / "a.json", False) == tmp_path / "a-2.json"
    with pytest.raises(UserError, match="cannot be written"):
        results.reserve(tmp_path / "a.json" / "b.json", True)


# --- different work ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"context": 512}, "context 256 and 512"),
        ({"text": "d" * 64}, "text aaaaaaaa... and dddddddd..."),
        ({"version": 2}, "version 1 and 2"),
        ({"model": {"DEPTH": 8, "HEAD_DIM": 64}}, "DEPTH 4 and 8"),
        ({"profile": "small", "budget": 60.0}, "profile tiny and small; budget 10.0 and 60.0"),
    ],
)
def test_different_work_is_refused_with_what_differs(change, says, tmp_path, capsys):
    results.save(result(backend("cpu", 0.1)), tmp_path / "a.json")
    results.save(result(backend("cpu", 0.1), work=replace(WORK, **change)), tmp_path / "b.json")
    assert run(str(tmp_path / "a.json"), str(tmp_path / "b.json")) == 1
    assert f"a.json and b.json did different work: {says}" in capsys.readouterr().err


def test_machines_stand_side_by_side(tmp_path, capsys):
    results.save(result(backend("cpu", 0.1)), tmp_path / "pc.json")
    results.save(result(backend("mlx", 0.02), label="Apple M4 Max"), tmp_path / "mac.json")
    assert run(str(tmp_path / "pc.json"), str(tmp_path / "mac.json")) == 0
    out = capsys.readouterr().out
    assert "A: a PC" in out and "B: Apple M4 Max" in out and "x, better)" in out
    assert run(str(tmp_path / "pc.json"), str(tmp_path / "mac.json"), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    (speed,) = [d for d in told["differences"]["B mlx"] if d["metric"] == "tokens/s"]
    assert told["columns"] == ["A cpu", "B mlx"] and speed["verdict"] == "better" and 4.5 < speed["ratio"] < 5.5


def test_files_without_a_measurement_are_refused(tmp_path, capsys):
    results.save(result(BackendResult("cpu", "crashed", reason="killed")), tmp_path / "a.json")
    assert run(str(tmp_path / "a.json")) == 1
    assert "nothing was measured" in capsys.readouterr().err


# --- noise -------------------------------------------------------------------------------------


def verdict(name: str, a: BackendResult, b: BackendResult) -> str:
    (metric,) = [m for m in METRICS if m.name == name]
    return comparing.difference(metric, a, b).verdict


def test_a_difference_below_the_resolution_or_within_the_spread_is_noise():
    assert verdict("tokens/s", backend("a", 0.1), backend("b", 0.102, seed=2)) == "within noise"
    assert verdict("tokens/s", backend("a", 0.1, noise=0.3), backend("b", 0.115, noise=0.3, seed=2)) == "within noise"
    assert verdict("tokens/s", backend("a", 0.1), backend("b", 0.15, seed=2)) == "worse"
    assert verdict("step", backend("a", 0.1), backend("b", 0.05, seed=2)) == "better"


def test_val_bpb_is_judged_over_seeds():
    a = backend("a", 0.1, bpb=(2.20, 2.21, 2.205))
    assert verdict("val_bpb in the budget", a, backend("b", 0.1, bpb=(2.10, 2.11, 2.105))) == "better"
    assert verdict("val_bpb in the budget", a, backend("b", 0.1, bpb=(2.10, 2.35, 2.24))) == "within noise"
    assert verdict("val_bpb in the budget", a, backend("b", 0.1, bpb=(2.10,))) == "not told"
    assert verdict("val_bpb in the budget", a, backend("b", 0.1, bpb=())) == "not told"


def in_rounds(name: str, step: float, states: dict[int, float]) -> BackendResult:
    """A backend whose steps take so long in a machine of these states, by round."""
    made = backend(name, step)
    assert made.speed is not None
    times = [step * state for state in states.values()]
    return replace(made, speed=replace(made.speed, step_seconds=times, rounds=list(states), scoring_rates=[]))


def told(name: str, a: BackendResult, b: BackendResult, together: bool) -> comparing.Difference:
    (metric,) = [m for m in METRICS if m.name == name]
    return comparing.difference(metric, a, b, together)


@given(st.floats(0.1, 10.0), st.lists(st.floats(0.5, 2.0), min_size=6, max_size=20))
def test_what_the_machine_did_meanwhile_cancels_within_a_file(ratio, speeds):
    states = dict(enumerate(speeds))
    found = told("step", in_rounds("a", 0.1, states), in_rounds("b", 0.1 * ratio, states), together=True)
    assert found.ratio == pytest.approx(ratio) and found.low == pytest.approx(ratio) == found.high


def test_rounds_are_paired_by_their_number_and_between_files_not_at_all():
    """b crashed in the middle of a slow half; what it did in its rounds is what counts."""
    a = in_rounds("a", 0.1, {i: 1.0 if i < 6 else 2.0 for i in range(12)})
    b = in_rounds("b", 0.2, {i: 1.0 if i < 6 else 2.0 for i in range(2, 8)})
    assert told("step", a, b, together=True).ratio == pytest.approx(2.0)
    assert told("step", a, b, together=False).ratio == pytest.approx(0.2 / 0.15)
    columns = comparing.columns([result(a, b), result(b)])
    steps = [next(d for d in comparing.compare(columns[0], c) if d.metric == "step") for c in columns[1:]]
    assert [d.ratio for d in steps] == [pytest.approx(2.0), pytest.approx(0.2 / 0.15)]


def test_a_round_in_which_the_machine_changed_moves_no_ratio():
    states = dict.fromkeys(range(9), 1.0)
    upset = in_rounds("b", 0.2, {**states, 3: 1.6, 7: 0.6})
    found = told("tokens/s", in_rounds("a", 0.1, states), upset, together=True)
    assert found.ratio == pytest.approx(0.5) and found.verdict == "worse"


def test_few_rounds_are_judged_by_welch_and_few_experiments_not_at_all():
    a, b = (in_rounds(n, s, {0: 1.0, 1: 1.02, 2: 0.98}) for n, s in (("a", 0.1), ("b", 0.2)))
    found = told("step", a, b, together=True)
    assert found.ratio == pytest.approx(2.0) and found.low is not None and found.low < 1.95 and found.verdict == "worse"
    overhead = told("overhead of an experiment", a, b, together=True)
    assert overhead.ratio is None and "from 3 repeats on, here are 2" in overhead.why and overhead.value == 5.0


def test_of_products_the_best_counts_and_of_bandwidth_what_is_sustained():
    """A host that puts the processors apart doubles a bandwidth in half of the rounds."""
    a, b = backend("a", 0.1), backend("b", 0.1)
    apart = replace(b, peak=Peak(2e11, "m", 1e10, "m", [1.2e11, 2e11, 1.1e11], [1e10, 2e10, 1e10, 2.1e10]))
    assert told("matmul peak", a, apart, together=True).ratio == pytest.approx(2.0)
    assert told("memory bandwidth", a, apart, together=True).ratio == pytest.approx(1.0)


def test_of_starts_the_fastest_counts():
    """Something else was started beside all of b's but one."""
    a, b = backend("a", 0.1), backend("b", 0.1)
    disturbed = replace(b, speed=replace(b.speed, startup_seconds=[1.9, 1.6, 1.0, 1.5, 1.7]))
    found = told("start-up", a, disturbed, together=True)
    assert found.value == 1.0 and found.ratio == pytest.approx(1.0 / min(a.speed.startup_seconds))


def test_the_interval_of_a_median_covers_it_as_often_as_it_says():
    """Of ratios with outliers on one side: rounds in which the machine grew slower."""
    rng = random.Random(5)
    held = 0
    for _ in range(2000):
        drawn = [math.exp(rng.gauss(0, 0.03)) * (1.3 if rng.random() < 0.1 else 1.0) for _ in range(12)]
        low, high = agreeing.interval(drawn)
        held += low <= 1.004 <= high  # the median of that mixture
    assert 0.94 < held / 2000 < 0.985
    assert agreeing.interval([1.0] * 5) is None and agreeing.unsure([1.0] * 5) == math.inf
    assert agreeing.unsure([1.0] * 6) == 0.0


def test_steps_and_scoring_are_each_known_or_not_and_who_tells_nothing_is_left_out():
    def turns(*rates: float) -> dict[int, dict[str, float]]:
        return {n: {"seconds": 0.1, "scored": rate} for n, rate in enumerate(rates)}

    steady, wild = [1000.0] * 9, [1000.0, 1300.0, 900.0, 1000.0, 1250.0, 800.0, 1000.0, 1100.0, 950.0]
    both = {"cpu": turns(*steady), "mlx": turns(*wild), "upstream": {n: {"seconds": 0.2} for n in range(9)}}
    assert agreeing.unsure_sides(both, "seconds") == [("mlx", 0.0), ("upstream", 0.0)]
    ((name, share),) = agreeing.unsure_sides(both, "scored")
    assert name == "mlx" and 0.1 < share < 0.3
    ((name, alone),) = agreeing.unsure_sides({"mlx": turns(*wild)}, "scored")
    assert name == "mlx" and alone == pytest.approx(agreeing.unsure(wild))
    assert agreeing.unsure_sides({"cpu": {}}, "seconds") == [("", math.inf)], "nothing is known yet"


@settings(deadline=None)
@given(
    st.lists(st.floats(0.01, 100.0), min_size=2, max_size=9),
    st.lists(st.floats(0.01, 100.0), min_size=2, max_size=9),
    st.floats(0.1, 10.0),
)
def test_the_interval_holds_the_ratio_and_does_not_depend_on_the_unit(a, b, unit):
    low, high = comparing.interval(a, b)
    assert low is not None and high is not None
    middle = math.exp(sum(map(math.log, b)) / len(b) - sum(map(math.log, a)) / len(a))
    assert low <= middle * (1 + 1e-6) and middle <= high * (1 + 1e-6)
    scaled = comparing.interval([x * unit for x in a], [x * unit for x in b])
    assert scaled == pytest.approx((low, high), rel=1e-6)
    assert comparing.interval(b, a) == pytest.approx((1 / high, 1 / low), rel=1e-6)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """2,000 pairs of equal benches: a difference is found in about one of twenty."""
    rng = random.Random(3)
    wrong = 0
    for _ in range(2000):
        a, b = ([math.exp(rng.gauss(0, 0.05)) for _ in range(5)] for _ in range(2))
        low, high = comparing.interval(a, b)
        wrong += not low <= 1 <= high
    assert 0.03 < wrong / 2000 < 0.065


# --- the work ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_names_every_weight_of_the_recipe(name):
    pytest.importorskip("torch")
    import sys
    from types import ModuleType

    import backends
    from core.contract import Spec
    from core.recipe import replace as replace_constants

    profile = PROFILES[name]
    small = replace(profile, vocab_size=97, model={**profile.model, "ASPECT_RATIO": 16})
    source = replace_constants(backends.load("cpu").recipe().decode(), small.constants())
    module = ModuleType("train_of_a_profile")
    sys.modules[module.__name__] = module
    exec(compile(source, "train.py", "exec"), module.__dict__)
    weights = module.build(Spec(97, 64, 96, "cpu", "float32", 1, 0)).weights()
    assert {n: w.shape for n, w in weights.items()} == shapes(small)
