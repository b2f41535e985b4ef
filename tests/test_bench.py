"""`autoresearch bench` with real backends in their processes, on work small enough for a test."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from broken_ports import broken
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bench_compare import backend, result

import backends
from benchmarks import bench, energy, kept_code, results, running, side, sides, upstream, work
from benchmarks.bystanders import Bystanders
from benchmarks.machine import anonymous, fingerprint
from benchmarks.side import Order
from benchmarks.work import BenchProfile
from cli import cli
from console.output import Screen
from core import caches as compile_caches
from core.errors import UserError
from core.facts import Gpu, Power
from core.hardware import probe

SMALL = BenchProfile(
    name="tiny",
    about="for tests",
    data="kjv",
    vocab_size=512,
    context=64,
    batch_tokens=512,
    micro_rows=4,
    model={"DEPTH": 2, "ASPECT_RATIO": 32, "HEAD_DIM": 32, "WINDOW_PATTERN": "SL", "WEIGHT_DECAY": 0.2},
    fixed_steps=10,
    scored_tokens=4096,
    budget=2.0,
    warm_steps=2,
)


@pytest.fixture
def small(monkeypatch, dataset, tmp_path):
    """The profile `tiny` is SMALL, in a folder of its own."""
    pytest.importorskip("torch")
    monkeypatch.setitem(work.PROFILES, "tiny", SMALL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "--quick", *argv])
    return int(ended.value.code or 0)


# --- whole benches -----------------------------------------------------------------------------


@pytest.mark.slow
def test_one_backend_is_proven_timed_and_scored_and_its_file_says_all(small, capsys, monkeypatch):
    monkeypatch.setattr(kept_code, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(kept_code, "root", lambda: small / "kept")
    assert run("--backend", "cpu", "--repeats", "2", "--out", "a.json") == 0
    out = capsys.readouterr().out
    assert "tokens/s" in out and "val_bpb in the budget" in out and "PASS" in out
    made = results.load(small / "a.json")
    (cpu,) = made.measured()
    assert made.work.params > 0 and made.quick and made.machine.software["torch"]
    assert cpu.speed is not None and cpu.speed.rounds == [0, 1] and 2 <= cpu.speed.steps <= 64
    assert len(cpu.speed.step_seconds) == len(cpu.speed.scoring_rates) == 2 and min(cpu.speed.scoring_rates) > 0
    assert len(cpu.speed.peak_memory) == 2 and min(cpu.speed.peak_memory) > 2**26  # one round in each of two processes
    assert len(cpu.speed.startup_seconds) == 2 and min(cpu.speed.startup_seconds) > 0
    assert cpu.fixed is not None and cpu.fixed.curve[0][3] > cpu.fixed.loss > 0 and len(cpu.fixed.curve) == 10
    assert cpu.scores[0].val_bpb is not None and 0.5 < cpu.scores[0].val_bpb < 4 and cpu.scores[0].scored_tokens > 4000
    assert cpu.peak is not None and cpu.peak.flops > 1e9 and cpu.peak.bandwidth > 1e8 and 0 < (cpu.mfu() or 0) < 1.5
    assert max(cpu.peak.flops_rounds) == cpu.peak.flops and len(cpu.peak.bandwidth_rounds) == 2
    assert cpu.energy is not None and cpu.energy.source
    assert {p.dtype for p in cpu.parity} >= {"float32"} and all(p.passed for p in cpu.parity)
    assert (cpu.experiments_per_night() or 0) > 10
    assert run("--backend", "cpu", "--out", "a.json") == 1  # never written over
    assert "exists" in capsys.readouterr().err
    kept = kept_code.find(place_of("cpu"))  # for the next bench
    assert kept is not None and kept.seconds == cpu.speed.compile_seconds[0] and kept.day == date.today().isoformat()


def place_of(name: str) -> Path:
    return kept_code.place(name, backends.load(name).recipe_path, SMALL, fingerprint(probe(), [name]))


# Before MLX has compiled anything anew, which takes half a minute.
CRASH = "        if TOTAL_BATCH_SIZE == 512:\n            raise RuntimeError('zaphod42 was here: ' + __file__)\n"


@pytest.mark.slow
def test_a_backend_that_crashes_in_the_middle_leaves_the_others_and_tells_no_names(small, capsys, monkeypatch):
    pytest.importorskip("mlx.core")
    monkeypatch.setenv("LOGNAME", "zaphod42")
    source = backends.load("mlx").recipe().decode()
    anchor = "        loss: mx.array = self.compiled("
    assert source.count(anchor) == 1
    (small / "port.py").write_text(source.replace(anchor, CRASH + anchor))
    monkeypatch.setattr(kept_code, "root", lambda: small / "kept")
    (small / "code").mkdir()
    kept_code.keep(place_of("cpu"), small / "code", 30.0, "2026-01-02")
    argv = ["--backend", "cpu", "--backend", "mlx", "--recipe", "mlx=port.py", "--repeats", "1", "--seeds", "0"]
    assert run(*argv, "--out", "a.json") == 1
    out = capsys.readouterr().out
    assert "mlx: crashed: in its first steps: ended with status 1 after `ready`: RuntimeError" in out
    made = results.load(small / "a.json")
    cpu, mlx = made.backends
    assert (cpu.status, mlx.status) == ("measured", "crashed")
    assert cpu.speed is not None and mlx.speed is None and mlx.recipe != "shipped"
    assert not mlx.parity and all(p.passed for p in cpu.parity)
    assert cpu.speed.compile_seconds[0] == 30 and "cpu compiled in 30.0 s on 2026-01-02" in made.notes[-1]
    text = (small / "a.json").read_text()
    for private in ("zaphod42", str(Path.home()), os.uname().nodename, str(small), "/tmp/", str(work.__file__)):
        assert private not in text, private


@pytest.mark.slow
def test_what_was_measured_before_a_crash_stands(small, capsys):
    """It trains, is scored, and fails in the steps after that: in its second turn."""
    source = backends.load("cpu").recipe().decode()
    fails = "assert TOTAL_BATCH_SIZE != 512 or not hasattr(self, 'was_scored')"
    for anchor, line in (("logits(self, tokens", "self.was_scored = True"), ("step(self, batches", fails)):
        body = source.index(":\n", source.rindex(f"    def {anchor}")) + 2
        source = source[:body] + f"        {line}\n" + source[body:]
    (small / "port.py").write_text(source)
    argv = ["--recipe", "cpu=port.py", "--backend", "cpu", "--repeats", "4", "--seeds", "0", "--out", "a.json"]
    assert run(*argv) == 1
    assert "cpu: crashed: in round 2: ended with status 1 after `turn`: AssertionError" in capsys.readouterr().out
    (cpu,) = results.load(small / "a.json").backends
    assert (
        cpu.status == "crashed"
        and cpu.speed is not None
        and cpu.speed.rounds == [0]
        and all(p.passed for p in cpu.parity)
    )


@pytest.mark.slow
def test_a_backend_that_computes_something_else_is_not_compared_but_shown(small, capsys):
    (small / "port.py").write_bytes(broken("cpu", "the softcap is 20"))
    assert run("--recipe", "cpu=port.py", "--backend", "cpu", "--out", "a.json") == 1
    assert "cpu: different: the softcap is 20; the reference has 15" in capsys.readouterr().out
    (cpu,) = results.load(small / "a.json").backends
    assert cpu.status == "different" and cpu.speed is None and not cpu.scores


def test_kept_code_is_for_the_same_work_alone_and_the_oldest_goes(small, monkeypatch):
    monkeypatch.setattr(kept_code, "root", lambda: small / "kept")
    made = small / "made"
    (made / "mlx").mkdir(parents=True)
    (made / "mlx" / "kernel.so").write_bytes(b"code")
    recipe, machine = backends.load("cpu").recipe_path, fingerprint(probe(), ["cpu"])
    first = kept_code.place("cpu", recipe, SMALL, machine)
    others = [
        kept_code.place("cpu", recipe, replace(SMALL, context=128), machine),
        kept_code.place("cpu", recipe, SMALL, replace(machine, software={"torch": "1.0"})),
        kept_code.place("mlx", backends.load("mlx").recipe_path, SMALL, machine),
    ]
    assert len({first, *others}) == 4 and kept_code.place("cpu", recipe, SMALL, replace(machine, code="")) == first
    kept_code.keep(first, made, 1.9, "2026-01-01")  # compiled sooner than copied
    assert kept_code.find(first) is None
    kept_code.keep(first, made, 30.0, "2026-01-01")
    kept_code.keep(first, made, 31.0, "2026-01-02")
    found = kept_code.find(first)
    assert found is not None and (found.seconds, found.day) == (31.0, "2026-01-02")
    assert (found.code / "mlx" / "kernel.so").read_bytes() == b"code"
    (first / kept_code.FACTS).write_text("{")
    assert kept_code.find(first) is None
    for number in range(kept_code.MOST + 1):
        kept_code.keep(kept_code.root() / f"cpu-{number}", made, 30.0, "2026-01-03")
        os.utime(kept_code.root() / f"cpu-{number}" / kept_code.FACTS, (number, number))
    kept_code.keep(others[0], made, 30.0, "2026-01-03")
    assert len(list(kept_code.root().iterdir())) == kept_code.MOST and kept_code.find(others[0]) is not None


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--backend", "tpu"], "there is no backend 'tpu'"),
        (["--backend", "cuda"], "the backend cuda cannot run here"),
        (["--profile", "huge"], "there is no bench profile 'huge'"),
        (["--recipe", "cpu=none.py"], "there is no file none.py"),
        (["--recipe", "cpu"], "is not BACKEND=FILE"),
        (["--upstream", "nowhere"], "does not exist"),
        (["--out", "port.py/a.json"], "cannot be written"),
        (["--seeds", "99"], "99 seeds were asked for"),
    ],
)
def test_what_cannot_be_benched_is_told_before_anything_runs(argv, says, small, capsys):
    (small / "port.py").write_text("")
    assert run(*argv) in (1, 2)
    assert says in capsys.readouterr().err
    assert not list(small.glob("*.json"))


def test_a_result_that_cannot_be_written_is_printed(tmp_path, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no full device")
    (tmp_path / "a.json.part").symlink_to("/dev/full")
    made = result(backend("cpu", 0.1))
    assert not bench.keep_or_tell(Screen(), made, tmp_path / "a.json")
    said = capsys.readouterr()
    assert "no space is left on the disk" in said.err
    assert results.parse(json.loads(said.out), "stdout") == made


def test_a_busy_machine_a_taking_host_an_unsteady_speed_and_a_battery_are_noted():
    hardware = replace(probe(), threads=4, power=Power(plugged=False))
    said = list(bench.notes(hardware, 1.5, 0.07, [("mlx", 0.12)]))
    assert (
        "1.5 of 4 processors" in said[0] and "took 7%" in said[1] and "mlx to 12%" in said[2] and "battery" in said[3]
    )
    assert not list(bench.notes(replace(hardware, power=Power()), 0.1, 0.001, [("mlx", 0.02), ("up", float("inf"))]))


def test_an_experiment_is_left_to_the_referee_to_judge():
    others = Bystanders()
    with others.experiment():
        pass
    others.saw(1e6, 1.25)  # a training beside which the rest of the bench is short
    assert others.others() == pytest.approx(1.25, rel=1e-3) and 0.0 <= others.stolen() <= 1.0


@pytest.mark.parametrize(
    ("cards", "names", "together"),
    [
        (1, ("cuda", "cpu"), True),
        (1, ("cuda", "rtx"), False),
        (1, ("cuda", "upstream"), False),
        (0, ("cpu", "mlx", "upstream"), True),
    ],
)
def test_two_on_one_card_are_never_alive_together(cards, names, together):
    hardware = replace(probe(), gpus=(Gpu(0, "NVIDIA GeForce RTX 3060", "GPU-0", 12 * 2**30),) * cards, chip="")
    found = [running.Contender(name, Path("train.py")) for name in names]
    assert running.together(found, hardware) is together


# --- sides -------------------------------------------------------------------------------------


def listen(code: str, tmp_path: Path, limit: float = 30.0):
    told = []
    return sides.listen([sys.executable, "-c", code], os.environ, tmp_path, told.append, limit), told


START = (
    "import json, os, sys, time\nsay = lambda **e: print(json.dumps(e), flush=True)\nsay(event='ready', device='d')\n"
)


def test_a_side_is_heard_through_what_libraries_print(tmp_path):
    code = START + "print('Warning: {'); say(event='step', step=1, of=2); print(7); say(event='answer', x=1)"
    answer, told = listen(code, tmp_path)
    assert answer == {"device": "d", "x": 1} and [t["kind"] for t in told] == ["ready", "step", "answer"]


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL after step 3 of 9"),
        ("raise ValueError('in /tmp/somewhere/train.py')", "status 1 after step 3 of 9: ValueError: in train.py"),
        ("sys.exit(0)", "ended with status 0 after step 3 of 9"),
        ("time.sleep(60)", "ended after 2 s after step 3 of 9"),
    ],
)
def test_a_side_that_ends_without_an_answer_is_told_by_how(code, says, tmp_path):
    with pytest.raises(sides.SideFailed, match=says):
        listen(START + "say(event='step', step=3, of=9)\n" + code, tmp_path, limit=2.0)


TURNS = START + (
    "say(event='opened')\nfor line in sys.stdin:\n    n = json.loads(line)['steps']\n    assert n < 9, 'too many'\n"
    "    say(event='turn', seconds=n / 10)\n"
)


def test_a_side_waits_between_its_turns_and_ends_when_it_is_closed(tmp_path):
    side = sides.Side([sys.executable, "-c", TURNS], os.environ, tmp_path, lambda event: None)
    try:
        assert side.hear("opened", 30.0) == {} and side.facts == {"device": "d"}
        assert [side.turn(n, 30.0)["seconds"] for n in (2, 5)] == [0.2, 0.5]
        with pytest.raises(sides.SideFailed, match="status 1 after `turn`: AssertionError: too many"):
            side.turn(9, 30.0)
        with pytest.raises(sides.SideFailed, match="status 1 after `turn`"):  # nobody is there any more
            side.turn(2, 30.0)
    finally:
        side.close()


def test_what_a_side_has_started_ends_with_it(tmp_path):
    import psutil

    code = (
        START + "import subprocess\nc = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])\n"
        "say(event='answer', pid=c.pid)"
    )
    answer, _ = listen(code, tmp_path)
    with pytest.raises(psutil.NoSuchProcess):
        process = psutil.Process(answer["pid"])
        process.wait(5.0)
        if process.status() == psutil.STATUS_ZOMBIE:  # ended; nobody has taken note
            raise psutil.NoSuchProcess(answer["pid"])


def test_upstream_sees_nothing_of_ours(tmp_path):
    """Its own definitions look for our packages, from the process in which they run."""
    pytest.importorskip("torch")
    names = ("core", "backends", "benchmarks", "console", "cli")
    lines = [f"def {name}(*a): pass" for name in upstream.NEEDED if name.startswith("get_")]
    lines += [f"{name} = 1" for name in upstream.NEEDED if name.isupper() and name != "GPT"]
    lines += [
        "import importlib.util",
        "class GPT: pass",
        "class GPTConfig:",
        "    def __init__(self, *given):",
        f"        raise RuntimeError('sees ' + str([n for n in {names!r} if importlib.util.find_spec(n)]))",
    ]
    (tmp_path / "train.py").write_text("\n".join(lines))
    weights = tmp_path / "w.npz"
    import numpy as np

    np.savez(weights, x=np.ones(1))
    order = Order("turns", "upstream", "upstream", str(tmp_path), str(tmp_path), 0.0, constants=SMALL.constants(),
                  vocab_size=97, context=64, weights=str(weights), batches="")  # fmt: skip
    side = upstream.start(order, tmp_path / "caches", lambda event: None)
    try:
        with pytest.raises(sides.SideFailed, match=r"RuntimeError: sees \[\]"):
            side.hear("opened")
    finally:
        side.close()


def test_a_folder_that_is_no_clone_of_upstream_is_told(tmp_path):
    (tmp_path / "train.py").write_text("class GPT: pass\n")
    with pytest.raises(UserError, match="does not define GPTConfig"):
        upstream.definitions(tmp_path)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Error in /srv/data/x/train.py, line 3", "Error in train.py, line 3"),
        (r"C:\Users\ann\lab\train.py failed", "train.py failed"),
        ("9.1k tokens/s, 3/4 done", "9.1k tokens/s, 3/4 done"),
    ],
)
def test_messages_lose_their_folders(text, wanted):
    assert anonymous(text) == wanted


# --- what a turn times --------------------------------------------------------------------------


def test_a_pass_over_memory_needs_no_new_memory():
    """What it would time otherwise is how the kernel finds pages."""
    mx = pytest.importorskip("mlx.core")
    size = 2**26
    one = side._mlx_pass(size, "cpu")
    one()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(3):
        one()
    assert mx.get_peak_memory() - before < size // 2


@settings(deadline=None)
@given(st.integers(1, 64))
def test_a_turn_takes_as_many_steps_as_it_is_told_and_a_hiccup_is_none(asked):
    steps = running.whole_groups(asked)
    taken = []
    side.timed(taken.append, steps)
    assert sum(taken) == steps <= asked and len(taken) <= side.GROUPS and len(set(taken)) == 1


# --- energy ------------------------------------------------------------------------------------


def zone(folder: Path, name: str, at: int, full: int = 2**32) -> Path:
    made = folder / name
    made.mkdir()
    for file, value in (("name", f"package-{name[-1]}"), ("max_energy_range_uj", full), ("energy_uj", at)):
        (made / file).write_text(f"{value}\n")
    return made


def test_rapl_counts_all_packages_and_runs_over(tmp_path):
    first, second = zone(tmp_path, "intel-rapl:0", 1_000_000), zone(tmp_path, "intel-rapl:1", 900, full=1000)
    zone(tmp_path, "intel-rapl:0:0", 5)  # a part of the first
    counter, _ = energy.rapl(tmp_path)
    assert counter is not None and counter.source.startswith("RAPL: package-0, package-1")
    before = counter.joules()
    (first / "energy_uj").write_text("4000000")
    (second / "energy_uj").write_text("100")
    assert counter.joules() - before == pytest.approx(3.0 + 200e-6)


def test_a_machine_that_tells_no_energy_says_why(tmp_path):
    assert energy.rapl(tmp_path) == (None, "not told: this machine has no RAPL counter")
    (zone(tmp_path, "intel-rapl:0", 1) / "energy_uj").unlink()
    assert energy.rapl(tmp_path) == (None, "not told: the RAPL counters are for root only")


def test_a_counter_that_stands_still_is_no_measurement(tmp_path):
    zone(tmp_path, "intel-rapl:0", 1_000_000)
    meter = energy.Meter("cpu", tmp_path)
    meter.start()
    found = meter.stop()
    if sys.platform == "linux":
        assert found["joules"] is None and "did not move" in found["source"]


def test_powermetrics_is_read():
    text = "CPU Power: 812 mW\nGPU Power: 31 mW\nCombined Power (CPU + GPU + ANE): 1000 mW\n\n"
    assert energy.combined_watts(text + text.replace("1000", "3000")) == pytest.approx(2.0)
    assert energy.combined_watts("sudo: a password is required") is None


def test_sides_compile_under_the_keys_of_the_referees_children(tmp_path):
    """Who compiled under others would compile for nobody else, and a scored experiment anew."""
    given = sides.cache_folders(tmp_path)
    assert compile_caches.environment(tmp_path).items() <= given.items()
    assert {"TMPDIR", "CUDA_CACHE_PATH"} <= given.keys() and all((tmp_path / name).is_dir() for name in sides.COMPILED)
    (tmp_path / "xdg" / "attention-1.json").touch()
    kept = sides.compiled(tmp_path, tmp_path / "kept")
    assert kept is not None and [p.name for p in kept.iterdir()] == ["xdg"]
