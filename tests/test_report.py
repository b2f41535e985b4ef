"""The morning report: every figure is the ledger's, the page is laid out on any screen, bad nights are told plainly."""

from __future__ import annotations

import json
import math
import re
import shutil
import sqlite3
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from nights import FIRST, NIGHT, Clock, Story, World, confirmed, edit, kept, left_out, night, small, tell
from scripted import Limits, Loop, Scripted, make_lab, recipe
from several import Disturbed, Machine, ends
from traced import Figures, Truth, expected, look_up

from cli import cli
from console import again, places, tables
from console.findings import findings, read
from console.looking import best_verb, show_verb
from console.markdown import markdown
from console.output import Screen
from console.page import page
from console.picture import title
from console.report import report_verb, write
from console.running import _kept as ending
from console.style import STYLE
from core.confirming import pair
from core.errors import LabError
from core.lab import Lab

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FAMILY = {
    "MATRIX_LR": "learning rates", "EMBEDDING_LR": "learning rates", "DEPTH": "model size", "HEAD_DIM": "attention",
    "WEIGHT_DECAY": "regularisation", "WARMUP_RATIO": "schedule", "TOTAL_BATCH_SIZE": "batch", "block": "code: block",
    "norm": "code: norm",
}  # fmt: skip


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patched:
        yield patched


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return small(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def full(tmp_path_factory, settings, patch):
    """A night of which everything was measured again, and the best without each kept change but one."""
    lab, loop, _ = night(tmp_path_factory.mktemp("labs") / "nov24", settings, patch)
    confirmed(lab, loop, kept(lab), pair(kept(lab)))
    left_out(lab, loop, kept(lab)[2:])
    return lab


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, settings, patch):
    """One of which nothing was."""
    return night(tmp_path_factory.mktemp("labs") / "nov25", settings, patch, NIGHT[:12])[0]


def shown(lab: Lab) -> str:
    return page(findings(read(lab)), "24 November")


def text_of(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", html.partition("</style>")[2]).split())


def truth_of(lab: Lab) -> Truth:
    return Truth(lab.record / "ledger.sqlite", lab.settings.min_delta, lab.settings.budget, lab.settings.seed)


# --- every figure ----------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["full", "fresh"])
def test_every_figure_on_the_page_is_the_ledgers(which, request):
    lab = request.getfixturevalue(which)
    figures, truth = Figures(shown(lab)), truth_of(lab)
    table = expected(truth)
    traced = [f for f in figures.found if not f[0].startswith("theme.")]  # these have a test of their own
    assert len(traced) > 100
    for key, value, _ in traced:
        wanted = look_up(table, key)
        assert value == pytest.approx(wanted, abs=1e-9) if isinstance(value, float) else value == wanted, key
    assert figures.stray == []


def test_what_is_shown_is_the_exact_value_rounded(full):
    for key, value, text in Figures(shown(full)).found:
        if re.fullmatch(r"[−+]?\d+\.\d{4}", text):
            assert float(text.replace("−", "-")) == pytest.approx(value, abs=5.01e-5), key
        elif isinstance(value, int) and value < 1000:
            assert text == str(value), key


def test_themes_count_what_was_changed(full):
    """By the edits that made the night, whose themes are known here."""
    truth = truth_of(full)
    wanted: dict[str, list[sqlite3.Row]] = {}
    for (_, values), row in zip(NIGHT, list(truth.rows.values())[1:], strict=True):
        themes = {FAMILY[name] for name in values}
        code = any(t.startswith("code") for t in themes)
        name = themes.pop() if len(themes) == 1 else "code in several places" if code else "several things at once"
        wanted.setdefault(name, []).append(row)
    found = findings(read(full)).themes
    assert {t.name: [r.number for r in t.rows] for t in found} == {
        name: [r["number"] for r in rows] for name, rows in wanted.items()
    }
    figures = {key: value for key, value, _ in Figures(shown(full)).found}
    for i, theme in enumerate(found):
        rows = wanted[theme.name]
        assert figures[f"theme.{i}.tried"] == len(rows)
        assert figures[f"theme.{i}.kept"] == sum(r["status"] == "keep" for r in rows)
        assert figures[f"theme.{i}.failed"] == sum(r["status"] in ("crash", "timeout") for r in rows)
        changes = [r["val_bpb"] - r["best_before"] for r in rows if r["val_bpb"]]
        assert figures.get(f"theme.{i}.best") == (pytest.approx(min(changes)) if changes else None)


def test_the_text_has_the_same_figures_as_the_page(full, fresh):
    for lab in (full, fresh):
        found = findings(read(lab))
        numbers = re.compile(r"[−+]?\d+\.\d{4}")
        html = set(numbers.findall(text_of(page(found, "now"))))
        text = set(numbers.findall(markdown(found, "now")))
        assert text and text <= html


def test_the_gain_on_fresh_seeds_is_without_the_winners_curse(full):
    """The made-up world knows what the winner really gives."""

    found = findings(read(full)).gain
    world = World.__new__(World)
    true = [world.true(full.source(r.number)) for r in (found.baseline, found.winner)]
    real = true[0] - true[1]
    assert found.validation.low < real < found.validation.high
    assert found.recorded > real
    held_out = [world.true(full.source(r.number), 0.8) for r in (found.baseline, found.winner)]
    assert found.holdout.low < held_out[0] - held_out[1] < found.holdout.high


def test_what_is_unconfirmed_says_so_and_what_it_costs(fresh):
    text = text_of(shown(fresh))
    assert "That is not confirmed yet." in text
    assert "not confirmed" in markdown(findings(read(fresh)), "now")
    minutes = re.search(r"On fresh seeds it is known after about (\d+) min", text)
    assert minutes and int(minutes[1]) == pytest.approx(8 * 319.7 / 60, abs=1)
    assert "has an interval" in text  # no figure pretends to have one


# --- layout ----------------------------------------------------------------------------------------

PROBE = """<script>
const said = [], seen = e => e.offsetParent !== null || e instanceof SVGElement
for (const e of document.querySelectorAll('body *')) {
  const r = e.getBoundingClientRect(), own = [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())
  if (!seen(e) || !own || e.closest('pre') || e.closest('details:not([open]) > div') || !r.width) continue
  if (r.right > innerWidth + 1 || r.left < -1) said.push('cut ' + e.tagName + ' ' + e.textContent.slice(0, 30))
}
const shown = [...document.querySelectorAll('.tile, .entry > *, td, h2, p, .key span, .lead')].filter(e => {
  const r = e.getBoundingClientRect(); return r.width > 0 && r.height > 0 && !e.closest('details:not([open]) > div') })
for (let i = 0; i < shown.length; i++) for (let j = i + 1; j < Math.min(shown.length, i + 40); j++) {
  if (shown[i].contains(shown[j]) || shown[j].contains(shown[i])) continue
  const a = shown[i].getBoundingClientRect(), b = shown[j].getBoundingClientRect()
  const x = Math.min(a.right, b.right) - Math.max(a.left, b.left)
  const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top)
  const both = [i, j].map(k => shown[k].textContent.slice(0, 20))
  if (x > 2 && y > 2) said.push('overlap ' + both.join(' / '))
}
for (const h of document.querySelectorAll('h2')) {
  const next = h.nextElementSibling
  if (!next || next.tagName == 'H2' || next.getBoundingClientRect().height < 15) said.push('empty ' + h.textContent)
}
const chart = [...document.querySelectorAll('.broad svg, .narrow svg')].filter(e => e.getBoundingClientRect().height)
if (chart.length != 1 || chart[0].getBoundingClientRect().height < 180) said.push('no chart')
const scale = chart[0].getBoundingClientRect().width / chart[0].viewBox.baseVal.width
for (const t of chart[0].querySelectorAll('text'))
  if (parseFloat(getComputedStyle(t).fontSize) * scale < 8) said.push('small ' + t.textContent)
document.title = JSON.stringify([document.documentElement.scrollWidth - innerWidth, [...new Set(said)].slice(0, 20)])
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium here: the page is checked as text only")
@pytest.mark.parametrize("width", [390, 800, 1280])
@pytest.mark.parametrize("which", ["full", "fresh"])
def test_nothing_is_cut_overlapping_or_empty_in_a_browser(which, width, request, tmp_path):
    (tmp_path / "page.html").write_text(shown(request.getfixturevalue(which)).replace("</html>", PROBE + "</html>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    done = subprocess.run(
        [str(BROWSER), *flags, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom",
         f"file://{tmp_path / 'page.html'}"], capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    title = done.stdout.partition("<title>")[2].partition("</title>")[0]
    beyond, said = json.loads(title.replace("&amp;", "&").replace("&lt;", "<"))
    assert beyond <= 0 and said == []


def test_text_can_be_read_in_light_and_dark():
    """WCAG's contrast of 4.5 for every colour that text has, on both grounds."""
    light, dark = (dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in STYLE.split("@media (prefers")[:2])
    for colours in (light, {**light, **dark}):
        for text in ("ink", "soft", "keep", "best", "fail", "plus", "minus"):
            for ground in ("ground", "panel"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)


def contrast(a: str, b: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


# --- bad nights ------------------------------------------------------------------------------------


def sane(lab: Lab) -> tuple[str, str]:
    """(text of the page, Markdown) of a lab; no figure is nonsense."""
    found = findings(read(lab))
    html, text = page(found, "now"), markdown(found, "now")
    for said in (text_of(html), text):
        assert not re.search(r"\b(nan|inf|None)\b", said)
    for key, value, _ in Figures(html).found:
        assert not isinstance(value, float) or math.isfinite(value), key
        assert not key.startswith("time.") or value >= 0, key
    return text_of(html), text


def test_a_lab_with_only_crashes(tmp_path, settings, monkeypatch):

    world = World(Clock(monkeypatch))
    lab = make_lab(tmp_path / "bad", settings, edit(FIRST, DEPTH=12).encode())
    loop = Loop(lab, Story(), world, lambda event: None)
    for _ in range(2):
        with pytest.raises(LabError):
            loop.run(Limits(experiments=3))
        loop = Loop(lab, Story(), world, lambda event: None)
    for said in sane(lab):
        assert "No experiment has a score: all" in said
    html = text_of(shown(lab))
    assert "out of memory at 9.6 of 10.0 GiB" in html and "nothing to draw" in html
    assert write(findings(read(lab)), tmp_path / "out")[1].stat().st_size > 10_000


def test_one_experiment(tmp_path, settings, monkeypatch):
    lab, _, _ = night(tmp_path / "one", settings, monkeypatch, [])
    for said in sane(lab):
        assert "Only the baseline was measured" in said


def test_nothing_kept(tmp_path, settings, monkeypatch):
    lab, _, _ = night(tmp_path / "none", settings, monkeypatch, [tell(WARMUP_RATIO=0.1), tell(TOTAL_BATCH_SIZE=2048)])
    for said in sane(lab):
        assert "Nothing was kept over the baseline" in said


def test_a_lab_without_any_experiment_yet(tmp_path, settings):

    lab = make_lab(tmp_path / "empty", settings, FIRST.encode())
    for said in sane(lab):
        assert "Nothing was measured yet" in said


def test_an_older_ledger_is_reported_as_far_as_it_goes(tmp_path, settings, monkeypatch):
    """Schema 2: no outcome of each run, no purpose, no verdict."""
    lab, _, _ = night(tmp_path / "old", settings, monkeypatch, NIGHT[:8])
    before = findings(read(lab))
    lab.ledger.close()
    with sqlite3.connect(lab.record / "ledger.sqlite") as db:
        for column in ("purpose", "outcome", "holdout_bpb", "epoch"):
            db.execute(f"ALTER TABLE samples DROP COLUMN {column}")
        db.execute("ALTER TABLE experiments DROP COLUMN verdict")
        db.executescript("DROP TABLE ablation_runs; DROP TABLE ablations")
        db.execute("UPDATE meta SET value = '2' WHERE key = 'schema'")
    again = Lab.open(lab.path)
    sane(again)
    found = findings(read(again))
    assert found.time.training == pytest.approx(before.time.training) and found.total.gain == before.total.gain
    assert [k.state for k in found.kept] == ["unconfirmed"] * len(found.kept)


def test_a_machine_that_slept_is_told(tmp_path, settings, monkeypatch):

    world = World(Clock(monkeypatch))
    world.slept[3] = 3 * 3600.0
    lab = make_lab(tmp_path / "slept", settings, FIRST.encode())
    Loop(lab, Story(*NIGHT[:5]), world, lambda event: None).run(Limits(experiments=6))
    html, text = sane(lab)
    assert "While #4 was measured, the time of day went 3 h further than its runs took" in html
    assert "At #4 the time of day ran ahead" in text
    use = findings(read(lab)).time
    assert use.busy < 6 * 330 and use.away == pytest.approx(3 * 3600, abs=10)


def test_experiments_of_several_runs_are_no_odd_clocks(tmp_path, settings, monkeypatch):
    lab, _, _ = night(tmp_path / "several", settings, monkeypatch, NIGHT[:4], verdict="statistical")
    assert len(lab.ledger.samples(1)) > 1
    found = findings(read(lab))
    assert found.time.oddities == () and found.time.wall is not None
    recorded = [s.outcome["timings"]["total"] for s in lab.ledger.all_samples()]
    assert found.time.busy == pytest.approx(sum(recorded))
    assert found.spread.runs >= 5  # the baseline's own
    sane(lab)


def test_a_clock_that_was_set_back_gives_no_nonsense(tmp_path, settings, monkeypatch):
    lab, loop, world = night(tmp_path / "back", settings, monkeypatch, NIGHT[:3])
    world.clock.forward(-7200.0)
    loop.researcher.edits = NIGHT[:6]

    Loop(lab, loop.researcher, world, lambda event: None).run(Limits(experiments=3))
    html, _ = sane(lab)
    assert "the clock was set back" in html and "From the first start to the last end" not in html
    assert findings(read(lab)).time.wall is None


def test_a_disturbed_experiment_is_wasted_time_and_its_reason_is_told(tmp_path, settings, monkeypatch):
    world = World(Clock(monkeypatch))
    world.healths[0] = {"others_cores": 1.9, "our_cores": 2.0}
    lab = make_lab(tmp_path / "game", settings, FIRST.encode())
    Loop(lab, Story(), world, lambda event: None).run(Limits(experiments=1))
    found = findings(read(lab))
    assert (found.machine.tainted, found.machine.experiments, found.machine.again) == (1, 1, 0)
    assert found.time.wasted["tainted"] == pytest.approx(319.7)
    for said in sane(lab):
        assert "other processes kept 1.9 cores busy beside our 2.0" in said


def test_the_cards_and_processors_that_were_measured_on_are_told(tmp_path, settings, monkeypatch):
    """By name and driver, each once: "cuda:0" says nothing a week later."""
    lab, _, _ = night(tmp_path / "cards", settings, monkeypatch, NIGHT[:3])
    with sqlite3.connect(lab.record / "ledger.sqlite") as db:
        card = {"card": "A <b> card", "driver": "580.65", "torch": "2.14.1"}
        for number, versions in (
            (1, card),
            (2, card),
            (3, card | {"card": "Another card"}),
            (4, {"processor": "AMD EPYC, 2 cores", "os": "Linux 6"}),
        ):
            db.execute("UPDATE samples SET versions = ? WHERE number = ?", (json.dumps(versions), number))
    cards = [f"{card}, driver 580.65, torch 2.14.1" for card in ("A <b> card", "Another card")]
    assert findings(read(lab)).machine.devices == [*cards, "AMD EPYC, 2 cores, Linux 6"]
    html, text = sane(lab)
    assert "A &lt;b&gt; card, driver 580.65" in html and "Measured on Another card, driver 580.65" in text
    assert "Measured on AMD EPYC, 2 cores, Linux 6." in text


def test_runs_that_were_dropped_are_told_with_the_reason(tmp_path, settings, monkeypatch):
    """Beside a game nothing is on the record, whatever the rule."""
    world = World(Clock(monkeypatch))
    world.healths[0] = {"card": {"tainted": "other programs kept the card 80% busy"}, "our_cores": 2.0}
    lab = make_lab(tmp_path / "game", settings, FIRST.encode())
    Loop(lab, Story(), world, lambda event: None).run(Limits(experiments=1))
    found = findings(read(lab)).machine
    assert (found.runs, found.tainted, found.again) == (1, 0, 1)
    html, text = sane(lab)
    assert "Runs that were watched: 1 ; disturbed: 0 . Dropped, and repeated: 1 ." in html
    assert "1 run watched; disturbed: 0. Dropped, and repeated: 1." in text
    for said in (html, text):
        assert "other programs kept the card 80% busy" in said


def test_a_gain_between_disturbed_runs_is_told_as_one_wherever_it_stands(tmp_path, settings, capsys):
    """Under the simple rule a disturbed run decides all the same."""
    lab = make_lab(tmp_path / "busy", settings, recipe(2.0))
    world = Scripted(health={"others_cores": 1.5, "our_cores": 0.5})
    loop = Loop(lab, None, world, lambda event: None)
    loop.judge_pending(1)
    loop.judge(recipe(1.9, mark="quiet meanwhile"), "quiet meanwhile")
    assert not lab.ledger.get(2).tainted, "as busy as the last time"
    world.changes["health"] = {"others_cores": 1.9, "our_cores": 0.1}
    loop.judge(recipe(1.8, mark="better"), "better")
    assert [e.tainted for e in lab.ledger.experiments()] == [True, False, True]
    report_verb(Screen(), str(lab.path), None)
    said = capsys.readouterr().out
    assert "0.2000 below the baseline, but both runs were disturbed" in said
    assert "#3 came out −0.2000 against the baseline when it was kept, but both runs were disturbed." in said
    assert "better, disturbed" in said and "quiet meanwhile, disturbed" not in said
    found = findings(read(lab))
    html, text = page(found, "now"), markdown(found, "now")
    assert "when it was kept, but both runs were disturbed. That is not confirmed yet." in html
    assert html.count("the run of #1 was disturbed") == 1 and html.count("the run of #3 was disturbed") == 1
    assert "| −0.1000 (the run of #3 was disturbed) |" in text
    assert title("busy", found.rows).endswith("2.0000 to 1.8000 (disturbed)")
    for number, why in (
        (1, "1.5 cores busy beside our 0.5"),
        (3, "1.9 cores busy, and 1.5 in this lab's steady state"),
    ):
        show_verb(Screen(), str(lab.path), number)
        said = capsys.readouterr().out
        assert why in said and f"#{number}  keep, tainted" in said
    best_verb(Screen(), str(lab.path), source=False)
    assert "1.9 cores busy, and 1.5 in this lab's steady state" in capsys.readouterr().out


def test_why_a_run_of_several_was_disturbed_is_shown(tmp_path, settings, capsys):
    lab = make_lab(tmp_path / "several", replace(settings, verdict="statistical"), recipe(2.0))
    Loop(lab, None, Machine(), lambda event: None).judge_pending(1)
    ends(lab, Disturbed(2, 1), 2.1)
    show_verb(Screen(), str(lab.path), 2)
    said = capsys.readouterr().out
    assert "(seed 42, disturbed)" in said and "seed 42 was disturbed: other processes kept 1.5 cores busy" in said


# --- what was gained, and what was missed ----------------------------------------------------------


def test_a_gain_across_a_drift_is_that_of_each_step(tmp_path, settings, monkeypatch, capsys):
    """The machine gets worse by 0.010, and then a change that gives 0.0031 is kept."""
    lab, loop, world = night(tmp_path / "drift", settings, monkeypatch, [tell(DEPTH=5)], sd=0.0)
    world.shift = 0.010
    lab.ledger.begin_epoch("the best has moved by +0.0100 bpb", 2)
    loop.measure(2, 50, "control", "how good is it now?")
    e = loop.judge(edit(lab.best_source().decode(), MATRIX_LR=0.055).encode(), "a better rate")
    real = world.true(lab.source(1)) - world.true(lab.source(e.number))
    assert e.status == "keep" and 0.006 < real < 0.008 and e.val_bpb > lab.ledger.get(1).val_bpb
    found = findings(read(lab))
    assert found.gain.recorded == pytest.approx(real) == found.total.gain
    assert found.total.to_json()["gain"] == pytest.approx(real)
    for said in sane(lab):
        assert re.search(rf"#3 came out −{real:.4f} against the baseline", said)
    assert tables.tally_line(found.total).endswith(f"(#3), {real:.4f} below the baseline")
    assert title("drift", found.rows).endswith(f"2 kept, {real:.4f} below the baseline")
    ending(Screen(), places.look(lab), list(found.rows))
    assert f"val_bpb {e.val_bpb:.4f}, {real:.4f} below the baseline on words" in capsys.readouterr().out


def test_without_a_drift_the_gain_is_the_difference_of_the_two_scores(full):
    found = findings(read(full))
    first, last = found.gain.baseline.val_bpb, found.gain.winner.val_bpb
    assert found.gain.recorded == pytest.approx(first - last, abs=1e-12)
    assert title("full", found.rows).endswith(f"kept, {first:.4f} to {last:.4f}")


def test_a_night_that_kept_only_simplifications_is_judged_as_one(tmp_path, settings, monkeypatch):
    world = World(Clock(monkeypatch), sd=0.0008)
    lab = make_lab(tmp_path / "short", replace(settings, verdict="statistical"), FIRST.encode())
    loop = Loop(lab, Story(), world, lambda event: None)
    loop.run(Limits(experiments=1))
    short = FIRST.partition("\n\ndef norm")[0]
    e = loop.judge(f"{short}\n# 0\n".encode(), "no norm, 0")
    assert e.status == "simplify", e.reason
    confirmed(lab, loop, kept(lab), pair(kept(lab)), seeds=32)
    found = findings(read(lab))
    assert found.gain.simpler and (found.gain.state, found.kept[0].state) == ("replicated", "replicated")
    html, text = sane(lab)
    assert "The simplification holds:" in html and "The simplification holds:" in text
    assert 'class="answer good"' in shown(lab)


def test_a_discard_that_was_measured_again_is_told_everywhere(tmp_path, settings, monkeypatch):
    """One that was unlucky, one that came close, and one that nobody has measured again."""
    lab, loop, world = night(tmp_path / "missed", settings, monkeypatch, [], sd=0.0003)
    world.shift = 0.01
    loop.judge(edit(FIRST, MATRIX_LR=0.055).encode(), "a better rate on a bad moment")
    world.shift = 0.0
    loop.judge(edit(FIRST, HEAD_DIM=32).encode(), "hardly worse")
    loop.judge(edit(FIRST, DEPTH=3).encode(), "clearly worse")
    assert kept(lab) == [1]
    monkeypatch.setattr("core.executor.LocalExecutor", lambda: world)
    for number in ("2", "3"):
        said = CliRunner().invoke(cli, ["confirm", number, "--lab", str(lab.path)], catch_exceptions=False).output
    assert f"#3 {again.line(again.again(lab, 3))}" in said
    html, text = sane(lab)
    for said in (html, text):
        assert said.index("Discard #2") < said.index("Near miss #3")
        assert "better after all" in said and "no gain worth keeping" in said
        assert "#4" not in said.partition("What to try next")[2].partition("Where the time")[0]
    assert "Discard #2, a better rate on a bad moment, +0.00" in text
    figures, table = Figures(shown(lab)), expected(truth_of(lab))
    near = [(key, value) for key, value, _ in figures.found if key.startswith("near.")]
    assert len(near) == 10 and figures.stray == []
    for key, value in near:
        wanted = look_up(table, key)
        assert value == (pytest.approx(wanted, abs=1e-9) if isinstance(value, float) else wanted), key
    shown_2 = CliRunner().invoke(cli, ["show", "2", "--lab", str(lab.path)], catch_exceptions=False).output
    assert re.search(r"  against #1, on fresh seeds: .0\.0029 .*4 and 4 runs: better after all", shown_2)
    as_json = CliRunner().invoke(cli, ["show", "2", "--lab", str(lab.path), "--json"], catch_exceptions=False).output
    said = json.loads(as_json)["again"]
    assert (said["against"], said["state"]) == (1, "replicated") and said["high"] < 0
    nothing = CliRunner().invoke(cli, ["show", "4", "--lab", str(lab.path)], catch_exceptions=False).output
    assert "on fresh seeds" not in nothing and again.again(lab, 1) is None


# --- what the statistical rule leaves on the record ------------------------------------------------


def in_the_ledger(lab: Lab, query: str, *values: object) -> None:
    with sqlite3.connect(lab.record / "ledger.sqlite") as db:
        db.execute(query, values)


def test_what_each_rule_would_have_kept(tmp_path, settings, monkeypatch):
    lab, _, _ = night(tmp_path / "rules", settings, monkeypatch, NIGHT[:8])
    judged = [e for e in lab.ledger.experiments()[1:] if e.val_bpb]
    for e, simple in zip(judged, ("keep", "discard", "keep", "keep", "discard", "discard"), strict=False):
        said = json.dumps({"rule": "statistical", "simple": simple})
        in_the_ledger(lab, "UPDATE experiments SET verdict = ? WHERE number = ?", said, e.number)
    asked = [e for e in lab.ledger.experiments() if e.verdict.get("rule") == "statistical"]
    found = findings(read(lab)).rules
    assert found.simple == 3 and found.statistical == sum(e.status == "keep" for e in asked)
    assert found.both == sum(e.status == "keep" and e.verdict["simple"] == "keep" for e in asked)
    html, text = sane(lab)
    assert f"it kept {found.statistical} ; simple (upstream's: keep what comes out lower) would have kept 3 ;" in html
    assert f"which kept {found.statistical}; simple would have kept 3; both {found.both}." in text
    for said in (html, text):
        assert "first run of each, and compares it with the last that it would have kept itself;" in said
        assert f"{found.earlier} that an earlier version judged, with the first run of the lab's best." in said
    assert found.earlier == len(asked) > 3


def test_hopeless_runs_that_were_stopped_are_told_with_what_that_saved(tmp_path, settings, monkeypatch):
    lab, _, _ = night(tmp_path / "early", settings, monkeypatch, NIGHT[:4])
    before = findings(read(lab)).time
    discard = next(e for e in lab.ledger.experiments() if e.status == "discard")
    early = {"stopped_early": {"share": 0.4, "reason": "behind", "saved_seconds": 180.0}, "status": "hopeless",
             "timings": {"total": 130.0, "training": 120.0}, "training_seconds": 120.0}  # fmt: skip
    in_the_ledger(
        lab, "UPDATE experiments SET val_bpb = NULL, outcome = ? WHERE number = ?", json.dumps(early), discard.number
    )
    in_the_ledger(lab, "DELETE FROM samples WHERE number = ?", discard.number)
    use = findings(read(lab)).time
    assert (use.stopped_early, use.saved) == (1, 180.0)
    assert use.training == pytest.approx(before.training - 180)
    html, text = sane(lab)
    assert "hopeless runs were stopped early: 3 min saved" in html and "stopped early: no score" in html
    assert "1 hopeless run stopped early: 3 min saved" in text


def test_after_a_drift_the_same_best_has_another_level(tmp_path, settings, monkeypatch):
    lab, loop, world = night(tmp_path / "drift", settings, monkeypatch, NIGHT[:6], sd=0.0003)
    best, last = kept(lab)[-1], lab.ledger.experiments()[-1].number
    for seed in (50, 51):
        loop.measure(best, seed, "control", "is the machine as it was?")
    world.shift = 0.01
    lab.ledger.begin_epoch("the best has moved by +0.0100 bpb", best)
    for seed in (52, 53):
        loop.measure(best, seed, "control", "how good is it now?")
    loop.judge(edit(lab.best_source().decode(), WARMUP_RATIO=0.03).encode(), "later")
    levels = findings(read(lab)).levels
    assert [(level.first, level.number) for level in levels[-2:]] == [(best, best), (last + 1, best)]
    assert levels[-1].estimate.mean - levels[-2].estimate.mean == pytest.approx(0.01, abs=0.001)
    html, text = sane(lab)
    assert "the best has moved by +0.0100 bpb" in html and "the best has moved by +0.0100 bpb" in text
    assert 'class="drift"' in shown(lab)
    assert "Measuring again took, of the above: the best again" in html


def test_how_far_two_runs_of_one_seed_lie_apart_is_told_where_it_is_known(tmp_path, settings, monkeypatch):
    lab, loop, _ = night(tmp_path / "again", settings, monkeypatch, NIGHT[:2])
    confirmed(lab, loop, kept(lab))
    assert not any("one seed" in said for said in sane(lab))
    seeds = {s.seed: s.val_bpb for s in lab.ledger.samples(1, "confirm")}
    apart = []
    for seed in list(seeds)[:2]:
        apart.append(loop.measure(1, seed, "confirm", "does it score the same?").val_bpb - seeds[seed])
    sd = f"{math.sqrt(sum(d**2 / 2 for d in apart) / 2):.4f}"
    html, text = sane(lab)
    assert f"Runs of one recipe on one seed lie {sd} apart ( 2 repeated)" in html
    assert f"- Noise between two runs of one seed: {sd} (2 repeats)." in text


# --- the verb --------------------------------------------------------------------------------------


def test_the_verb_writes_three_files_and_trains_nothing(full, tmp_path, monkeypatch):
    monkeypatch.setattr("core.referee.execute", None)
    before = (full.record / "ledger.sqlite").read_bytes()
    done = CliRunner().invoke(cli, ["report", str(full.path), "--out", str(tmp_path), "--json"], standalone_mode=False)
    said = json.loads(done.output)
    assert Path(said["html"]).read_text().startswith("<!doctype html>")
    assert Path(said["png"]).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert Path(said["markdown"]).read_text().startswith("# nov24")
    assert (full.record / "ledger.sqlite").read_bytes() == before
    spoken = CliRunner().invoke(cli, ["report", str(full.path), "--out", str(tmp_path)], standalone_mode=False).output
    assert "The gain holds: −" in spoken and "on fresh seeds, 4 and 4 runs" in spoken


def test_the_page_is_self_contained_and_quotes_safely(full):
    html = shown(full)
    assert "<b>per</b>" not in html and "&lt;b&gt;per&lt;/b&gt;" in html
    assert not re.search(r"<script|url\(|src=|href=\"(?!#)", html)
    for r in findings(read(full)).rows:
        assert f'id="e{r.number}"' in html
