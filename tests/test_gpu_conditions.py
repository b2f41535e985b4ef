"""`benchmarks.gpu`: what one section leaves to the next, sides that take turns, and how the card ran meanwhile."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from core.gpuwatch import Look

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from benchmarks import (  # noqa: E402 - after the skips
    blank_card,
    card_state,
    gpu,
    gpu_correctness,
    gpu_profile,
    gpu_run,
    gpu_sections,
    gpu_sides,
)
from benchmarks.gpu import LIMITS, SMOKE, Order  # noqa: E402
from kernels.attention_peers import PEERS  # noqa: E402

on_a_blank_card = pytest.mark.skipif(bool(blank_card.obstacle()), reason=blank_card.obstacle())


def asked(monkeypatch, tmp_path, rows):
    """The orders that the sections get where these, by name, print such rows."""
    orders = {}

    def section(name, order, limit, caches):
        orders[name] = order
        yield from ({"section": name, **row} for row in rows.get(name, []))

    monkeypatch.setattr(gpu, "run_section", section)
    gpu.measure(Order(), ["facts", "attention", "mlp", "step", "run"], tmp_path)
    return orders


# --- what a section leaves to the next ------------------------------------------------------------


def test_the_steps_come_before_what_is_only_of_parts():
    """A machine may be taken away before all is measured."""
    order = list(LIMITS)
    for part in ("head", "muon", "fp8"):
        assert all(
            order.index(whole) < order.index(part) for whole in ("correctness", "step", "upstream", "run", "rtx")
        )


@pytest.mark.parametrize(
    ("attention", "mlp", "taken"),
    [
        (None, None, ["auto", "auto"]),
        (1, None, ["triton", "auto"]),
        (0, 0, ["triton", "torch"]),
        (2, 1, ["auto", "auto"]),
    ],
)
def test_what_hung_when_it_was_timed_is_not_timed_again_by_the_recipe(monkeypatch, tmp_path, attention, mlp, taken):
    """How many choices a section made before it was cut, if it was."""
    rows = {"facts": [{"failed": "exit status 1"}]}
    for name, chosen in (("attention", attention), ("mlp", mlp)):
        if chosen is not None:
            rows[name] = [*([{"chosen": "the fastest"}] * chosen), {"failed": "not done within 65 s"}]
    orders = asked(monkeypatch, tmp_path, rows)
    assert orders["attention"].told == {} and orders["step"].told == orders["run"].told
    module = gpu_sections.recipe(replace(SMOKE, told=orders["step"].told))
    assert taken == [module.ATTENTION, module.MLP]


def test_the_run_takes_what_the_steps_took(monkeypatch, tmp_path):
    (tmp_path / "xdg").mkdir()
    (tmp_path / "xdg" / "attention-1.json").touch()
    seen = []
    monkeypatch.setattr("core.referee.execute", seen.append)
    facts = type("Facts", (), {"path": tmp_path, "sha256": "", "vocab_size": 257, "bos_id": 256})
    for told in ({}, {"ATTENTION": "triton"}):
        order = replace(SMOKE, device="cuda:0", caches=str(tmp_path), told=told)
        gpu_run.experiment(order, facts, tmp_path)
    assert [b'\nATTENTION = "triton"' in request.source for request in seen] == [False, True]


def test_where_segments_that_grow_are_refused_all_later_sections_do_without(monkeypatch, tmp_path):
    """Else each of them would end at its first tensor."""
    real, settings = torch.ones, []

    def ones(*given, **more):
        if not settings:
            raise RuntimeError("CUDA driver error: operation not supported")
        return real(1)

    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", settings.append)
    (row,) = gpu_sections.segments()
    assert settings == ["expandable_segments:False"] and "operation not supported" in row["reason"]
    assert list(gpu_sections.segments()) == [], "nothing to tell where they are given"
    orders = asked(monkeypatch, tmp_path, {"facts": [row]})
    monkeypatch.undo()
    printer = tmp_path / "python"
    code = "import json, os; print(json.dumps({'is': os.environ['PYTORCH_ALLOC_CONF']}))"
    printer.write_text(f"#!{sys.executable}\n{code}\n")
    printer.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(printer))
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    told = [next(gpu.run_section(name, orders[name], 60))["is"] for name in ("facts", "step")]
    assert told == ["expandable_segments:True", "expandable_segments:False"]


def test_a_section_that_has_told_all_leaves_at_once(monkeypatch, tmp_path):
    """Whatever takes its time at Python's end: beside other work it made a section that was done run out of time."""
    (tmp_path / "sitecustomize.py").write_text("import atexit, time\natexit.register(time.sleep, 500)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (row,) = gpu.run_section("facts", SMOKE, 100)
    assert row["torch"] == torch.__version__


def test_a_check_after_which_the_card_serves_no_more_leaves_the_rest_to_another_process(monkeypatch, tmp_path):
    """As an illegal access does: all that follows in that process fails, whatever it is."""
    served = [True]

    def breaks(name, *_):
        served[0] = False
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def fine(name, *_):
        return {"kernel": name, "passed": True}

    found = [
        ("a", partial(fine, "a"), None),
        ("b", partial(breaks, "b"), torch.float16),
        ("c", partial(fine, "c"), None),
    ]
    monkeypatch.setattr(gpu_correctness, "checks", lambda order: iter(found))
    monkeypatch.setattr(gpu_correctness, "alive", lambda: served[0])

    def section(name, order, limit, caches):
        served[0] = True
        given.append((order.skip, limit))
        yield from ({"section": name, **row} for row in gpu_correctness.correctness(order))

    given = []
    monkeypatch.setattr(gpu, "run_section", section)
    assert gpu.measure(SMOKE, ["correctness"], tmp_path) == 1
    assert [skip for skip, _ in given] == [0, 2] and given[1][1] <= given[0][1]
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["kernel"] for row in rows] == ["a", "b", "c"]
    assert rows[1]["checks done"] == 2 and "illegal memory access" in rows[1]["failed"] and rows[2]["passed"]
    monkeypatch.undo()
    assert gpu_correctness.alive()


@pytest.mark.parametrize(("ends", "said"), [("os.abort()", "exit status -6"), ("time.sleep(60)", "no row for 3 s")])
def test_a_check_that_ends_its_process_or_hangs_takes_no_other_with_it(monkeypatch, tmp_path, ends, said):
    """As a compiler that crashes, or a kernel that never ends; here the second of four."""
    code = f"""import json, os, sys, time
for i in range(json.loads(sys.argv[-1])["skip"], 4):
    if i == 1:
        {ends}
    print(json.dumps({{"kernel": i}}), flush=True)"""
    python, printer = sys.executable, tmp_path / "python"
    printer.write_text(f"#!{python}\n{code}\n")
    printer.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(printer))
    monkeypatch.setattr(gpu, "PATIENCE", 3.0)
    monkeypatch.setattr(gpu, "POLL", 0.1)
    assert gpu.measure(SMOKE, ["correctness"], tmp_path / "out") == 1
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row.get("kernel", row.get("failed")) for row in rows] == [0, said, 2, 3]
    printer.write_text(f"#!{python}\nraise ImportError('torch')\n")  # no check at all: it is not tried for ever
    gpu.measure(SMOKE, ["correctness", "head"], tmp_path / "none")
    rows = json.loads((tmp_path / "none" / "results.json").read_text())["rows"]
    assert [row["section"] for row in rows] == ["correctness"] * (1 + gpu.RESUMES) + ["head"]


@pytest.mark.parametrize("at_hand", [[], ["cudnn"], ["fa3", "cudnn"]])
def test_every_attention_that_a_layer_can_have_within_is_checked_in_one(monkeypatch, at_hand):
    why = dict.fromkeys(PEERS, "no") | dict.fromkeys(["flash", "flex", *at_hand], "")
    monkeypatch.setattr("kernels.attention_choice.available", lambda case: why)
    names = [name for name, _, _ in gpu_correctness.checks(SMOKE) if name.startswith("attend, ")]
    assert names == 2 * ["attend, value embeddings", "attend, attention of torch", *(f"attend, {n}" for n in at_hand)]


# --- sides ----------------------------------------------------------------------------------------


def test_sides_take_turns(monkeypatch):
    """The second round begins with the peer; the ratio is of both, each of which is told."""
    monkeypatch.setattr(gpu_sides, "ROUNDS", 2)
    times, order = {"ours": [2.0, 4.0], "other": [9.0], "peer": [3.0, 9.0]}, []

    def side(name):
        return name, lambda: order.append(name) or {"ms": times[name][order.count(name) - 1], "mib": 8.0}

    *rows, ratio = gpu_sides.sides(side("ours"), side("peer"), [side("other")])
    assert order == ["ours", "other", "peer", "peer", "ours"] and [row["ms"] for row in rows] == [2.0, 9.0, 3.0]
    assert ratio == {"side": "ratio", "speed": 2.0, "rounds": "1.500, 2.250", "memory": 1.0}


# --- how the card ran -----------------------------------------------------------------------------


def test_a_row_tells_clock_and_heat_of_the_steps(monkeypatch):
    """From the second step on: the first compiles, and an idle card lowers its clock."""
    told = []
    monkeypatch.setattr(card_state, "watch", lambda device: told.append(device) or (lambda: {"clock_mhz": "1 to 2"}))

    def one(tokens, progress):
        return torch.tensor(1.0)

    *_, last, card = gpu_sections.steps(replace(SMOKE, steps=3), one)
    assert told == ["cpu"] and last["steps"] == 3 and card == {"clock_mhz": "1 to 2"}
    (only,) = gpu_sections.steps(replace(SMOKE, steps=1), one)
    assert told == ["cpu"] and only["steps"] == 1


def test_what_is_told_of_a_card(monkeypatch):
    assert card_state.watch("cpu")() == {}
    looks = [
        Look(clock=1980, temperature=60, power_limit=700.0, others_busy=0.0),
        Look(clock=1410, temperature=71, power_limit=700.0, others_busy=0.5, slowed=True),
    ]
    monkeypatch.setattr("core.nvml.Nvml.look", lambda *_: looks[0] if len(looks) == 1 else looks.pop())
    monkeypatch.setattr(card_state, "EVERY", 0.01)
    tell = card_state.watch("cuda:0")
    while len(looks) > 1:
        time.sleep(0.01)
    row = tell()
    assert (row["card"], row["temperature_c"], row["power_limit_w"]) == ("cuda:0", 71, 700.0)
    assert row["clock_mhz"].startswith("1410 to ") and row["slowed"] > 0 and row["others_busy"] > 0
    monkeypatch.setattr("core.nvml.Nvml.look", lambda *_: Look(error="Driver/library version mismatch"))
    assert card_state.watch("cuda:0")() == {"card": "cuda:0", "not measured": "Driver/library version mismatch"}
    monkeypatch.setitem(sys.modules, "core.nvml", None)
    assert "is not installed" in card_state.watch("cuda:0")()["not measured"]


@on_a_blank_card
@pytest.mark.slow
def test_it_is_asked_of_nvml(tmp_path):
    code = "import json\nfrom benchmarks import card_state\nprint(json.dumps(card_state.watch('cuda:0')()))"
    done = blank_card.python(blank_card.CARDS["h100"], ["-c", code], tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["looks"] == 1 and "not measured" not in row


# --- where the time goes --------------------------------------------------------------------------


def test_the_kernels_of_a_step_are_told_those_that_take_most_first(monkeypatch):
    """Of what PyTorch's profiler hands over, which names its fields: here of operators on a CPU, as no kernel runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        torch.ones(8, 8) @ torch.ones(8, 8)
    averages = {event.key: event for event in found.key_averages()}
    assert next(gpu_profile.told(averages.values()))["not measured"] == "the profiler saw no kernel"
    times = {"aten::mm": 6000.0, "aten::ones": 2000.0, "aten::fill_": 0.0}  # microseconds
    for name, time_ in times.items():
        averages[name].self_device_time_total = time_
    monkeypatch.setattr(gpu_profile, "SHOWN", 1)
    whole, first = gpu_profile.told(averages.values())
    assert whole == {"kernel": "all", "ms_a_step": 4.0, "calls_a_step": 1.5}
    assert first == {"kernel": "aten::mm", "ms_a_step": 3.0, "calls_a_step": 0.5, "share": 0.75}


def test_a_step_without_a_card_has_no_kernels_and_a_profiler_that_fails_takes_no_row_with_it():
    def breaks():
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES\nmore")

    assert list(gpu_profile.kernels("cpu", breaks)) == []
    assert list(gpu_profile.kernels("cuda:0", breaks)) == [
        {"kernel": "all", "not measured": "RuntimeError: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"}
    ]


@pytest.mark.parametrize("side", ["step", "upstream"])
def test_each_side_is_profiled_behind_its_last_row(monkeypatch, side):
    monkeypatch.setattr(
        gpu_sections, "steps", lambda order, one, *most: iter([] if most else [{"ms": 1.0, "steps": 3}])
    )
    monkeypatch.setattr(gpu_sections, "upstream_step", lambda *_: SimpleNamespace(again=lambda epsilon: None))
    monkeypatch.setattr(gpu_profile, "kernels", lambda device, one: iter([{"kernel": "all", "ms_a_step": 0.9}]))
    rows = list(gpu_sections.SECTIONS[side](SMOKE))
    assert rows[0]["ms"] == 1.0 and rows[-1] == {"kernel": "all", "ms_a_step": 0.9}
