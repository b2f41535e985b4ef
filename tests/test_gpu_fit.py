"""`benchmarks.gpu` on small cards, and what upstream's side is measured with; on a CPU, with what a card would say."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from benchmarks import (  # noqa: E402 - after the skips
    blank_card,
    gpu,
    gpu_correctness,
    gpu_fit,
    gpu_sections,
    upstream_attention,
)
from benchmarks.gpu import SMOKE, Order  # noqa: E402

BESIDE = Order(upstream="clone")
on_a_blank_card = pytest.mark.skipif(bool(blank_card.obstacle()), reason=f"no blank card: {blank_card.obstacle()}")


def no_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


# --- what fits --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gib", "alone", "beside"),  # GiB that are free -> rows at once without upstream, and beside it
    [(78, 128, 128), (38.6, 128, 64), (23.2, 64, 32), (11.2, 32, 16), (7.2, 32, 16), (5, 16, 8), (1, 1, 1)],
)
def test_rows_at_once_fit_into_what_is_free(gib, alone, beside):
    order = Order()
    for upstream, rows in (("", alone), ("clone", beside)):
        row = gpu_fit.fit(replace(order, upstream=upstream), int(gib * 2**30))
        assert row["rows_at_once"] == rows and row["of"] == order.rows == 128
        assert order.tokens % (rows * order.context) == 0, "parts of a step are whole"
        fits = row["needed_mib"] <= row["free_mib"]
        assert fits or rows == 1
        assert ("fitted" in row) is (rows < 128)


def test_what_is_published_is_what_is_measured_where_it_fits():
    """An H100's figures stay those of upstream's shapes."""
    assert (Order().rows, Order().context, Order().tokens) == (128, 2048, 2**19)
    assert gpu_fit.fit(Order(upstream="clone"), 78 * 2**30)["rows_at_once"] == 128


def test_sections_behind_the_facts_have_the_rows_that_fit(tmp_path, monkeypatch):
    asked = {}

    def section(name, order, limit, caches):
        asked[name] = order
        yield {"section": name} | ({"rows_at_once": 8} if name == "facts" else {})

    monkeypatch.setattr(gpu, "run_section", section)
    assert gpu.measure(Order(), ["facts", "step", "upstream"], tmp_path) == 0
    assert {name: (order.rows, order.tokens) for name, order in asked.items()} == {
        "facts": (128, 2**19), "step": (8, 2**19), "upstream": (8, 2**19),
    }  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text())["order"]["rows"] == 8


@pytest.mark.parametrize(("more", "names"), [([], ["facts", "head"]), (["--smoke"], ["head"])])
def test_what_fits_is_asked_whatever_is_wished_for(tmp_path, monkeypatch, more, names):
    given = []
    monkeypatch.setattr(gpu, "measure", lambda order, names, out: given.append(names) or 0)
    monkeypatch.setattr(gpu, "without_card", lambda: "")
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--only", "head", *more])
    assert given == [names]


@on_a_blank_card
@pytest.mark.parametrize(("card", "rows"), [("4060", 16), ("h100", 128)])
def test_the_facts_of_a_card_say_what_fits(card, rows, tmp_path):
    section = ["-m", "benchmarks.gpu_sections", "facts", json.dumps(asdict(BESIDE))]
    done = blank_card.python(blank_card.CARDS[card], section, tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    *_, fits = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert fits["rows_at_once"] == rows and fits["free_mib"] * 2**20 < blank_card.CARDS[card].bytes


# --- out of memory ----------------------------------------------------------------------------


def losses():
    return [row for row in gpu_correctness.correctness(SMOKE) if row["kernel"] == "softcapped_loss"]


@pytest.fixture
def others_left_out(monkeypatch):
    for name in ("attention", "mlp", "residual_norm", "project", "feed", "last_norm", "symmetric", "muon"):
        monkeypatch.setattr(gpu_correctness, name, lambda name, *_, **__: {"kernel": name})


def test_a_reference_that_does_not_fit_is_no_failure_of_the_kernel(monkeypatch, others_left_out):
    monkeypatch.setattr("kernels.softcapped_loss.softcapped_loss", lambda x, head, *_: x.sum() + head.sum())
    monkeypatch.setattr("kernels.softcapped_loss.reference", no_memory)
    for row in losses():
        assert row["not measured"].startswith("out of memory") and "passed" not in row and "failed" not in row


REFERENCE = """
import json, torch
from benchmarks.gpu_correctness import *
from benchmarks.leaving import leave
check = partial(CHECK, "it", Order(rows=ROWS), torch.bfloat16)
print(json.dumps(attempt("it", check, torch.bfloat16)))
leave()
"""
GATED, MADE_AGAIN = "partial(project, gated=True)", "partial(feed, by='triton', keep_hidden=False)"


@on_a_blank_card
@pytest.mark.parametrize(
    ("check", "rows", "fits"),
    [("softcapped_loss", 128, False), ("softcapped_loss", 16, True), (GATED, 512, False), (GATED, 16, True),
     (MADE_AGAIN, 512, False), (MADE_AGAIN, 16, True)],
)  # fmt: skip
def test_eight_gigabytes_hold_the_reference_of_the_rows_that_fit(check, rows, fits, tmp_path):
    """By PyTorch's own allocator, on a card that computes nothing: what it can compare is all wrong."""
    source = REFERENCE.replace("CHECK", check).replace("ROWS", str(rows))
    done = blank_card.python(blank_card.CARDS["4060"], ["-c", source], tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads(done.stdout.splitlines()[-1])
    assert ("not measured" in row) is not fits and ("error" in row) is fits and "failed" not in row


def test_a_kernel_that_does_not_fit_fails(monkeypatch, others_left_out):
    monkeypatch.setattr("kernels.softcapped_loss.softcapped_loss", no_memory)
    for row in losses():
        assert "out of memory" in row["failed"] and row["passed"] is False


def test_a_reference_that_breaks_otherwise_is_told_as_failed(monkeypatch, others_left_out):
    def breaks(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("kernels.softcapped_loss.softcapped_loss", lambda x, head, *_: x.sum() + head.sum())
    monkeypatch.setattr("kernels.softcapped_loss.reference", breaks)
    assert all(row["passed"] is False for row in losses())


def test_a_peer_that_does_not_fit_leaves_ours():
    double = [(torch.ones(3, 2),)]
    ours, peer = gpu_sections.against(SMOKE, lambda x: 2 * x, no_memory, double, 1)
    assert ours["side"] == "ours" and ours["ms"] > 0
    assert peer["side"] == "torch.compile" and "out of memory" in peer["not measured"] and "passed" not in peer


def test_ours_that_does_not_fit_fails_and_leaves_the_peer(monkeypatch):
    ours, peer = gpu_sections.sides(("ours", no_memory), ("torch.compile", lambda: {"ms": 1.0}))
    assert ours["passed"] is False and "out of memory" in ours["failed"]
    assert peer == {"side": "torch.compile", "ms": 1.0}


def test_an_upstream_that_does_not_fit_is_not_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_sections, "upstream_step", lambda order, attention: no_memory)
    (row,) = gpu_sections.upstream(SMOKE)
    assert "out of memory" in row["not measured"] and "passed" not in row
    monkeypatch.setattr(gpu, "run_section", lambda name, *_: iter([{"section": name, **row}]))
    assert gpu.measure(SMOKE, ["upstream"], tmp_path) == 0, "no failure"


def test_attentions_that_do_not_fit_leave_ours(monkeypatch):
    def choose(case, forced=None):
        return SimpleNamespace(name=forced, run=None) if forced else no_memory()

    monkeypatch.setattr("kernels.attention_choice.choose", choose)
    monkeypatch.setattr("kernels.attention_choice.milliseconds", lambda run, case: 2.0)
    rows = list(gpu_sections.attention(SMOKE))
    assert [row.get("ms") for row in rows] == [2.0, None, None] * 3
    assert all("out of memory" in row["not measured"] and "passed" not in row for row in rows[1::3])
    monkeypatch.setattr("kernels.attention_choice.milliseconds", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        list(gpu_sections.attention(SMOKE))


# --- upstream's attention ---------------------------------------------------------------------


@pytest.fixture
def on_a_card(monkeypatch):
    """Case -> milliseconds, as a card would tell: cuDNN is the fastest where it can, then FlashAttention 3."""
    times = {"fa3": 2.0, "cudnn": 1.0, "flash": 3.0, "flex": 4.0}
    made = {name: (lambda case, name=name: lambda q, k, v: (name, case.window)) for name in times}
    monkeypatch.setattr(upstream_attention, "CANDIDATES", made)
    monkeypatch.setattr(upstream_attention, "no_flash3", lambda case: "")
    windowless = {"cudnn": "knows no windows", "flash": "knows no windows"}
    monkeypatch.setattr(
        upstream_attention,
        "available",
        lambda case: dict.fromkeys(times, "") | ({} if case.whole else windowless),
    )
    monkeypatch.setattr(upstream_attention, "milliseconds", lambda run, case: times[run(*[None] * 6)[0]])
    return times


def stands(name="window"):
    found = upstream_attention.standing(Order(device="cuda:0"))
    q = torch.empty(1, 2048, 1, 1)
    return found, [found.call(q, q, q, True, (window, 0)) for window in (1024, 2048, -1)]


def test_upstream_gets_the_fastest_for_each_window(on_a_card):
    found, called = stands()
    assert found.name == "fa3 over 1024, cudnn over 2048"
    assert called == [("fa3", 1024), ("cudnn", 2048), ("cudnn", 2048)]
    told = [(row["window"], row["attention"]) for row in found.rows if "attention_ms" in row]
    assert told == [(1024, "fa3"), (1024, "flex"), *((2048, name) for name in on_a_card)]
    on_a_card["fa3"] = 0.5
    found, called = stands()
    assert found.name == "fa3" and {name for name, _ in called} == {"fa3"}


def test_an_attention_that_fails_is_told_and_passed_by(on_a_card, monkeypatch):
    monkeypatch.setitem(upstream_attention.CANDIDATES, "cudnn", no_memory)
    monkeypatch.setattr(upstream_attention, "no_flash3", lambda case: "not installed")
    found, _ = stands()
    assert found.name == "flex over 1024, flash over 2048"
    why = {
        row["attention"]: row["not measured"] for row in found.rows if "not measured" in row and row["window"] > 1024
    }
    assert why["fa3"] == "not installed" and "out of memory" in why["cudnn"]


def test_a_window_that_was_not_made_is_refused(on_a_card):
    found, _ = stands()
    q = torch.empty(1, 2048, 1, 1)
    with pytest.raises(ValueError, match="window of 512"):
        found.call(q, q, q, True, (512, 0))


@pytest.mark.parametrize(
    ("capability", "said"), [(75, "not sm_75"), (90, "not installed"), (89, "not installed"), (120, "not sm_120")]
)
def test_flash_attention_3_is_tried_where_it_is_built_for(capability, said, monkeypatch):
    monkeypatch.setattr(upstream_attention.importlib.util, "find_spec", lambda name: None)
    assert said in upstream_attention.no_flash3(SimpleNamespace(capability=capability))


def test_every_row_of_upstreams_steps_names_its_attention(monkeypatch):
    begun = []
    monkeypatch.setattr(gpu_sections, "upstream_step", lambda *_: SimpleNamespace(again=begun.append))
    monkeypatch.setattr(gpu_sections, "steps", lambda order, one, *most: iter([{"steps": 10, "ms": 1.0}]))
    first, alike = gpu_sections.upstream(SMOKE)
    assert first["attention"] == alike["attention"] == "SDPA with a dense mask"
    assert gpu.CONSTANTS not in first and alike[gpu.CONSTANTS] == gpu.ALIKE and begun == [1e-5]


# --- ratios -----------------------------------------------------------------------------------


def told(section, steps, ms, **more):
    return {"section": section, "steps": steps, "ms": ms, "loss": 5.0, **more}


def test_upstreams_attention_is_named_beside_the_ratio_of_steps():
    rows = [told("step", 10, 2.0), told("upstream", 10, 3.0, attention="flex")]
    first, *_ = found = gpu.ratios(rows)
    assert first == {"section": "upstream", "steps": 10, "step_ratio": 1.5, "upstream_attention": "flex"}
    head, _, line, *_ = gpu.table(found).splitlines()[1:]
    assert "| upstream_attention |" in head and "| 1.5 | flex |" in line


def test_sides_too_slow_for_one_count_are_compared_by_their_last():
    rows = [told("step", 12, 2.0, peak_gib=2.0), told("upstream", 7, 3.0, peak_gib=4.0)]
    assert gpu.ratios(rows) == [
        {"section": "upstream", "steps": 7, "our_steps": 12, "step_ratio": 1.5},
        {"section": "upstream", "steps": 7, "our_steps": 12, "memory_ratio": 0.5},
    ]
    assert gpu.ratios([told("step", 12, 2.0), told("upstream", 1, 90.0)]) == [], "one step only compiles"
