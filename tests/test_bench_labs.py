"""`bench labs`: what several labs kept, aligned by what they changed; sent as files; run under other settings."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from browser import BROWSER, assert_readable, look
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from nights import NIGHT, confirmed, kept, night, small
from scripted import Limits, Loop, Scripted, make_lab

from benchmarks import lab_page, lab_table, transfer
from benchmarks.lab_facts import Change, LabFacts, changes, dumps, load, of_lab
from cli import cli
from core.contract import Exhausted, Proposal, View
from core.data import Dataset
from core.lab import Lab
from core.outcome import Outcome
from core.settings import Settings

FIRST = {"DEPTH": 4, "MATRIX_LR": 0.04, "WARMUP_RATIO": 0.0}
RATE = "\n\ndef rate(progress):\n    return 1.0{}\n"


def source(score: float, rate: str = "", **values: float) -> bytes:
    lines = [f"{name} = {value!r}" for name, value in {**FIRST, **values}.items()]
    return "\n".join([f"SCORE = {score}", *lines, RATE.format(rate)]).encode()


class Listed:
    """A researcher that proposes these, one after the other."""

    name = "listed"

    def __init__(self, ideas: Sequence[bytes]) -> None:
        self.ideas = ideas

    def propose(self, view: View) -> Proposal:
        if len(view.past) > len(self.ideas):
            raise Exhausted("the list")
        return Proposal(self.ideas[len(view.past) - 1], f"idea {len(view.past)}")


def researched(path: Path, settings: Settings, ideas: Sequence[bytes], first: bytes | None = None) -> Lab:
    lab = make_lab(path, settings, first or source(2.0))
    Loop(lab, Listed(ideas), Scripted(), lambda event: None).run(Limits(experiments=1 + len(ideas)))
    return lab


@pytest.fixture(scope="module")
def labs(tmp_path_factory: pytest.TempPathFactory, settings: Settings) -> tuple[Lab, Lab]:
    """Tests only read them. One kept a higher rate, more depth and another function; the other kept a lower rate, and
    tried depth in vain."""
    up = [source(1.9, MATRIX_LR=0.06), source(1.95, MATRIX_LR=0.06, WARMUP_RATIO=0.1),
          source(1.8, MATRIX_LR=0.06, DEPTH=5),
          source(1.7, " - progress", MATRIX_LR=0.06, DEPTH=5)]  # fmt: skip
    down = [source(2.1, DEPTH=5), source(1.9, MATRIX_LR=0.02)]
    folder = tmp_path_factory.mktemp("labs")
    return researched(folder / "alpha", settings, up), researched(folder / "beta", settings, down)


@pytest.fixture(scope="module")
def facts(labs: tuple[Lab, Lab]) -> list[LabFacts]:
    return [of_lab(lab, "kjv-v512", machine) for lab, machine in zip(labs, ("a Mac", "a PC"), strict=True)]


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "labs", *argv])
    return int(ended.value.code or 0)


# --- what was changed ----------------------------------------------------------------------------


def test_changes_are_told_by_name_and_layout_is_none() -> None:
    before = "A = 1\nB = 2.0  # search: 1..3\n\n\ndef f(x):\n    return x\n\n\nclass C:\n    y = 1\n"
    after = '"""Words."""\nA = 1\nB = 2.5\n\n\ndef f(x):\n    """More."""\n    return x\n\n\nclass C:\n    y = 2\n'
    after += "\nimport os\n"
    found = changes(before, after)
    assert found == [Change("B", "2.0", "2.5"), Change("class C"), Change("the rest of the file")]
    assert changes(before, before.replace("  # search: 1..3", "")) == []
    assert changes(before, "def f(:") == [Change("the whole file")]


@hypothesis_settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["DEPTH", "MATRIX_LR", "WARMUP_RATIO"]), st.integers(1, 9)))
def test_every_constant_that_moved_is_told_and_no_other(values: dict[str, int]) -> None:
    found = changes(source(1.0).decode(), source(1.0, **values).decode())
    assert {c.what for c in found} == {n for n, v in values.items() if repr(v) != repr(FIRST[n])}


# --- alignment -----------------------------------------------------------------------------------


def test_labs_are_aligned_by_what_they_changed(facts: list[LabFacts]) -> None:
    lines = {line.what: line for line in lab_table.align(facts)}
    assert lines.keys() == {"MATRIX_LR", "DEPTH", "SCORE", "def rate"}  # SCORE is the script's, and changes each time
    rate = lines["MATRIX_LR"]
    assert rate.verdict == "kept by all, in opposite directions"
    assert rate.cells[0].text() == "0.04 -> 0.06 (#2, -0.1000)" and rate.cells[1].direction == "down"
    assert lines["DEPTH"].verdict == "kept by one, tried in vain elsewhere"
    assert lines["DEPTH"].cells[1].text() == "4, tried once in vain"
    assert lines["def rate"].verdict == "kept by one, not tried elsewhere"
    assert "WARMUP_RATIO" not in lines  # nobody kept it


def test_an_undone_keep_is_no_keep(tmp_path: Path, settings: Settings) -> None:
    lab = researched(tmp_path / "lab", settings, [source(1.9, DEPTH=5), source(1.8, " - progress", DEPTH=5)])
    lab.undo(3)
    found = of_lab(lab, "kjv", "a Mac")
    assert [t.number for t in found.kept] == [2] and found.tried[-1].status == "undone"
    assert found.best_bpb == pytest.approx(1.9) and " - progress" not in found.best_source


def test_other_data_are_told_and_scores_not_compared(facts: list[LabFacts]) -> None:
    other = replace(facts[1], settings={**facts[1].settings, "data_sha256": "f" * 64, "budget": 5.0})
    said = " ".join(lab_table.sentences([facts[0], other]))
    assert "alpha and beta were measured with other data, another budget: their val_bpb are not compared" in said
    assert "not compared" not in " ".join(lab_table.sentences(facts))


# --- the command ---------------------------------------------------------------------------------


def test_two_labs_in_a_terminal_as_json_and_as_a_page(
    labs: tuple[Lab, Lab], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given_ = [str(lab.path) for lab in labs]
    assert run(*given_, "--page", str(tmp_path / "out")) == 0
    text = capsys.readouterr().out
    assert "MATRIX_LR" in text and "0.04 -> 0.06" in text and "opposite directions" in text
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"index.html", "labs.md", "kept.png"}
    assert run(*given_, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert [lab["kept"] for lab in document["labs"]] == [[2, 4, 5], [3]]
    (depth,) = [c for c in document["changes"] if c["what"] == "DEPTH"]
    assert depth["labs"]["beta"] == {"start": "4", "end": "4", "kept": [], "gain": None, "in_vain": 1}
    assert run(*given_, "--markdown") == 0
    assert "| MATRIX_LR | 0.04 -&#62; 0.06 (#2, -0.1000) |" in capsys.readouterr().out


def test_a_lab_travels_as_a_file_without_paths(
    labs: tuple[Lab, Lab], facts: list[LabFacts], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "alpha.json"
    assert run(str(labs[0].path), "--export", str(file)) == 0
    found = load(file)
    assert found.tried == facts[0].tried and found.best_source == facts[0].best_source
    assert found.locked() == labs[0].settings
    assert str(labs[0].path.parent) not in file.read_text()
    capsys.readouterr()
    assert run(str(file), str(labs[0].path)) == 0  # one tag twice, as from two machines
    assert "alpha-2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text[:-40], "is damaged"),
        (lambda text: "{}", "is no exported lab"),
        (lambda text: text.replace('"schema": 1', '"schema": 7'), "is of schema 7"),
        (lambda text: text.replace('"tried": [', '"tried": [3, '), "is damaged"),
        (lambda text: text.replace('"budget"', '"bodget"'), "is damaged"),
    ],
)
def test_a_file_that_is_none_is_told_in_one_line(change, says, facts, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "sent.json"
    file.write_text(change(dumps(facts[0])))
    assert run(str(file), str(file)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line


def test_what_cannot_be_compared_is_told(
    labs: tuple[Lab, Lab], facts: list[LabFacts], tmp_path: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(labs[0].path)) == 1
    assert "one lab was given; name two or more" in capsys.readouterr().err
    assert run(str(labs[0].path), str(labs[1].path), "--transfer", "--home", "gamma") == 1
    assert "no lab here is called 'gamma'; given are: alpha, beta" in capsys.readouterr().err
    away = replace(facts[0], settings={**facts[0].settings, "backend": "cuda", "device": "cuda:0"})
    for name in ("one", "two"):
        (tmp_path / f"{name}.json").write_text(dumps(replace(away, tag=name)))
    assert run(str(tmp_path / "one.json"), str(tmp_path / "two.json"), "--transfer") == 1
    assert "none of 2 labs can be run here" in capsys.readouterr().err
    empty = [researched(tmp_path / name, settings, []) for name in ("empty", "idle")]
    assert run(*(str(lab.path) for lab in empty)) == 0
    out = capsys.readouterr().out
    assert "no lab has kept anything yet" in out and "none of 0 candidates is kept" in out


def test_no_place_for_the_page(labs: tuple[Lab, Lab], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run(*(str(lab.path) for lab in labs), "--page", str(tmp_path / "file" / "out")) == 1
    assert "the page cannot be written" in capsys.readouterr().err


# --- transfer ------------------------------------------------------------------------------------


def test_constants_travel_between_backends_and_the_rest_is_told(facts: list[LabFacts]) -> None:
    mac = replace(facts[0], settings={**facts[0].settings, "backend": "mlx"})
    own, guest = transfer.guests(facts[1], [mac])
    assert own.source.decode() == facts[1].best_source
    text = guest.source.decode()
    assert "MATRIX_LR = 0.06" in text and "DEPTH = 5" in text and "- progress" not in text
    assert "left behind: def rate" in guest.how
    assert transfer.guests(facts[1], [facts[0]])[1].source.decode() == facts[0].best_source


@pytest.mark.slow
def test_a_best_is_run_under_the_other_settings_and_no_lab_changes(
    tmp_path: Path, settings: Settings, dataset: Dataset, tiny_recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real referee, sandbox and audit; a recipe that learns far too slowly is told as worse."""
    brief = replace(settings, budget=1.0)
    slow = tiny_recipe.replace("LR = 0.02 ", "LR = 0.0002 ") + "\n\nSCORE = 2.0\n"
    home = make_lab(tmp_path / "home", brief, (tiny_recipe + "\n\nSCORE = 2.0\n").encode())
    guest = make_lab(tmp_path / "guest", brief, slow.encode())
    for lab in (home, guest):
        Loop(lab, Listed([]), Scripted(), lambda event: None).run(Limits(experiments=1))
    before = [(lab.ledger.experiments(), sorted(p.name for p in lab.path.rglob("*"))) for lab in (home, guest)]
    argv = [str(home.path), str(guest.path), "--transfer", "--home", "home", "--seeds", "1", "--json"]
    assert run(*argv, "--page", str(tmp_path / "out")) == 0
    own, other = json.loads(capsys.readouterr().out)["transfer"]
    assert [own["guest"], other["guest"]] == ["home", "guest"]
    assert all(r["outcomes"][0]["audited"] and r["outcomes"][0]["status"] == "scored" for r in (own, other))
    assert other["val_bpb"][0] > own["val_bpb"][0] + 0.1
    assert "worse than what was found here" in (tmp_path / "out" / "labs.md").read_text()
    assert (tmp_path / "out" / "transfer-home.png").exists()
    after = [(lab.ledger.experiments(), sorted(p.name for p in lab.path.rglob("*"))) for lab in (home, guest)]
    assert after == before


def outcome(bpb: float) -> Outcome:
    return Outcome(status="scored", val_bpb=bpb)


def test_a_difference_within_the_seeds_is_noise() -> None:
    own = transfer.Run("a", "a", "", [outcome(1.50), outcome(1.52)])
    assert "within the noise (0.0200)" in transfer.compare(own, transfer.Run("a", "b", "", [outcome(1.525)]), 0.001)
    better = transfer.Run("a", "b", "", [outcome(1.40), outcome(1.41)])
    assert transfer.compare(own, better, 0.001) == "-0.1050: it transfers, and is better here"
    failed = transfer.Run("a", "b", "", [Outcome(status="crash", reason="out of memory")])
    assert transfer.compare(own, failed, 0.001) == "no score to compare" and failed.text() == "crash: out of memory"


# --- the page ------------------------------------------------------------------------------------


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
@pytest.mark.parametrize("width", [375, 1280])
def test_the_page_in_a_browser(width: int, facts: list[LabFacts], tmp_path: Path) -> None:
    lines = lab_table.align(facts)
    runs = [transfer.Run("alpha", who, "the whole recipe", [outcome(b), outcome(b + 0.01)])
            for who, b in (("alpha", 1.5), ("beta", 1.6))]  # fmt: skip
    page = lab_page.html(facts, lines, runs)
    assert_readable(look(page, width, tmp_path), figures=2)


# --- what a gain is worth -------------------------------------------------------------------------


def test_a_gain_is_told_as_it_came_out_on_fresh_seeds_or_as_not_confirmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lab, loop, _ = night(tmp_path / "nov24", small(tmp_path), monkeypatch, NIGHT[:12])
    assert "not confirmed" in next(lab_table.sentences([of_lab(lab, "words", "a PC")]))
    first, last = kept(lab)[0], kept(lab)[-1]
    confirmed(lab, loop, [first, last])
    found = of_lab(lab, "words", "a PC")
    assert found.again is not None and found.again.runs_before == found.again.runs_after == 4
    assert found.again.low is not None and found.again.low < found.again.gain < found.again.high
    said = next(lab_table.sentences([found]))
    assert f"measured again {-found.again.gain:+.4f} (95 %: {-found.again.high:+.4f} to " in said
    (tmp_path / "sent.json").write_text(dumps(found))
    assert load(tmp_path / "sent.json").again == found.again
    assert run(str(lab.path), str(tmp_path / "sent.json"), "--json") == 0
    assert [one["again"]["gain"] for one in json.loads(capsys.readouterr().out)["labs"]] == [found.again.gain] * 2


def test_a_file_of_before_that_was_told_is_read(facts: list[LabFacts], tmp_path: Path) -> None:
    older = json.loads(dumps(facts[0]))
    del older["again"], older["disturbed"]
    (tmp_path / "older.json").write_text(json.dumps(older))
    assert load(tmp_path / "older.json").tried == facts[0].tried


def test_who_was_disturbed_and_what_was_taken_back_is_told(tmp_path: Path, settings: Settings) -> None:
    lab = researched(tmp_path / "lab", settings, [source(1.9, DEPTH=5)])
    assert of_lab(lab, "kjv", "a Mac").disturbed == []
    with sqlite3.connect(lab.record / "ledger.sqlite") as db:
        db.execute("UPDATE experiments SET tainted = 1 WHERE number = 2")
    told = list(lab_table.sentences([of_lab(lab, "kjv", "a Mac")]))
    assert told[1] == "lab: #2 ran while other programs used the device, so these figures may say little"
    lab.undo(2)
    (told_,) = lab_table.sentences([of_lab(lab, "kjv", "a Mac")])
    assert told_.startswith("lab: none of 1 candidate is kept (#2 taken back); its baseline has 2.0000, on kjv")
