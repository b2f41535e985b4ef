"""What the screens, the picture and the page say about rows of a ledger."""

from __future__ import annotations

import ast
import base64
import io
import json
import math
import os
import signal
import sys
from dataclasses import replace
from datetime import date, datetime, timezone
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from console import awake, chart, output, page, picture, places, tables, words
from console.display import SPINNER, Ticker, expected, finish_line
from console.findings import Findings, Record, findings
from console.picture import change
from console.rows import Row, Scale, tally
from core.errors import UserError
from core.ledger import Sample, Spent
from core.live import Event

SCALE = Scale("kjv-v4096", 256, 60.0, "cpu", "a test machine")
OUTCOME = {
    "timings": {"total": 71.2, "training": 60.0}, "curve": [[t, t, t * 64, 9 * 0.95**t] for t in range(1, 60)],
    "steps": 300, "tokens": 1_228_800, "params": 3_400_000, "mfu": 0.41, "peak_memory": 2**30, "passes": 1.2,
    "training_seconds": 60.0, "audited": True,
}  # fmt: skip


def a_row(number: int, status: str = "discard", score: float | None = 1.8, before: float | None = 1.8, **more) -> Row:  # type: ignore[no-untyped-def]
    fields = {"description": f"idea {number}", "researcher": "search", "finished": "2026-11-24T03:12:00+00:00", **more}
    return Row(number, status, None if status in ("crash", "timeout", "invalid") else score, before, **fields)


def night() -> list[Row]:
    return [
        a_row(1, "keep", 1.85, None, description="baseline", outcome=OUTCOME, commit="a" * 40),
        a_row(2, "discard", 1.86, 1.85, reason="1.860000 is 0.010000 worse than the best, 1.850000"),
        a_row(3, "crash", reason="out of memory at 9.6 of 10.0 GiB", outcome={"log_tail": "Traceback\nMemoryError"}),
        a_row(4, "keep", 1.82, 1.85, description="MATRIX_LR 0.04 -> 0.055 <script>alert(1)</script>", outcome=OUTCOME),
        a_row(5, "invalid", description="[red]shift[/red] the targets", reason="the audit differs by 4.2 nats"),
        a_row(6, "discard", 3.9, 1.82),
        a_row(7, "running", None, None),
    ]


def found(rows: list[Row], best: int | None, diffs: dict[int, str] | None = None) -> Findings:
    """What a report says of rows whose runs are not on the record one by one."""
    samples: dict[int, list[Sample]] = {r.number: [] for r in rows}
    source = b"A = 1\n"
    return findings(
        Record("nov24", rows, best, SCALE, samples, [], Spent(), 42, 1e-3, "simple", lambda number: source, diffs or {})
    )


# --- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("60", 60),
        ("60s", 60),
        ("5m", 300),
        ("8h", 28800),
        ("1.5h", 5400),
        ("1h30m", 5400),
        (" 2 min ", 120),
        (".5", 0.5),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert words.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-5", "5x", "1h30", "five", "5m!", "1e9", "nan", "inf", "5:00", "0x10"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match=r"1h30m"):
        words.parse_duration(text)


@given(st.floats(0, 1e9, allow_nan=False))
def test_figures_are_short(value: float) -> None:
    for text in (words.duration(value), words.size(value), words.count(value)):
        assert 0 < len(text) <= 16


@given(st.lists(st.floats(-1e6, 1e6), max_size=300), st.integers(1, 80))
def test_sparklines_fit(values: list[float], width: int) -> None:
    line = words.sparkline(values, width)
    assert len(line) == min(width, len(values))
    assert words.sparkline(values, width, ascii_only=True).isascii()


def test_moments_are_local_and_short() -> None:
    now = datetime(2026, 11, 24, 12, 0, tzinfo=timezone.utc)
    assert words.clock(datetime(2026, 11, 24, 7, 5, tzinfo=timezone.utc), now) == "07:05"
    assert words.clock(datetime(2026, 11, 25, 7, 5, tzinfo=timezone.utc), now) == "tomorrow 07:05"
    assert words.clock(datetime(2026, 12, 3, 7, 5, tzinfo=timezone.utc), now) == "Dec 3 07:05"


def test_tags() -> None:
    assert places.default_tag(date(2026, 11, 4)) == "nov4"
    for bad in ("", "a b", "../x", "x.lock", "-x", "a..b", "x" * 99):
        with pytest.raises(UserError, match="cannot name a lab"):
            places.check_tag(bad)


def test_a_taken_tag_gets_a_number(tmp_path: Path) -> None:
    (tmp_path / "nov24").mkdir()
    (tmp_path / "nov24-2").mkdir()
    assert places.free_tag("nov24", tmp_path) == "nov24-3"


def test_finish() -> None:
    assert expected(60, [9, 11, 300], 15) == 71
    assert finish_line(30.0, 7, None) == "about 7 experiments (30 s each), done in about 3 min 30 s"
    assert "about 2 experiments" in finish_line(30.0, 7, 61.0)
    assert "an hour" in finish_line(30.0, None, None)


# --- rows and tables -----------------------------------------------------------------------------


def test_a_failure_has_no_number_and_no_delta() -> None:
    crash = night()[2]
    assert crash.val_bpb is None and crash.delta is None and crash.failed and crash.decided
    assert "no score" in tables.summary_line(crash, 1.85)
    assert "out of memory" in tables.summary_line(crash, 1.85)


def test_tally_counts_decided_ones_and_names_the_gain() -> None:
    total = tally(night(), 4)
    assert (total.experiments, total.kept, total.discarded, total.failed) == (6, 1, 2, 2)
    assert total.gain == pytest.approx(0.03)
    assert tables.tally_line(total).endswith("best 1.8200 (#4), 0.0300 below the baseline")


def test_an_undone_keep_is_no_keep() -> None:
    rows = [night()[0], replace(night()[3], undone=True)]
    assert tally(rows, 1).kept == 0
    assert rows[1].shown_status == "keep, undone"
    assert picture.staircase(rows) == ([1, 4], [1.85, 1.85])


class FakeStream(io.TextIOWrapper):
    """A terminal that is none."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)

    def text(self) -> str:
        raw = self.buffer.getvalue()  # type: ignore[attr-defined]
        return raw.decode(self.encoding)


@pytest.mark.parametrize("columns", [40, 80, 120, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_the_log_fits_every_terminal(monkeypatch: pytest.MonkeyPatch, columns: int, encoding: str) -> None:
    stream = FakeStream(encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", str(columns))
    screen = output.Screen()
    rows = [*night(), a_row(8, description="ünïcödé → " + "long " * 40)]
    screen.show(tables.log_table(rows, SCALE, screen))
    text = stream.text()
    assert max(map(len, text.splitlines())) <= columns
    assert "kjv-v4096" in text and "discard" in text
    assert encoding == "utf-8" or "ï" not in text or encoding == "latin-1"


def test_markup_in_a_description_is_only_text(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = FakeStream("utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    screen = output.Screen()
    screen.show(tables.log_table(night(), SCALE, screen))
    assert "[red]shift[/red]" in stream.text()


def test_a_pipe_sees_whole_descriptions(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = FakeStream("utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.delenv("COLUMNS", raising=False)
    screen = output.Screen()
    screen.show(tables.log_table([a_row(1, description="x" * 120)], SCALE, screen))
    assert "x" * 120 in stream.text()


def test_the_card_tells_all(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = FakeStream("ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    text = "\n".join(tables.card(night()[3], SCALE, output.Screen()))
    for words_ in (
        "1.8200",
        "-0.0300 against 1.8500",
        "kjv-v4096",
        "256 tokens of context",
        "300",
        "41.0 %",
        "nats/token",
    ):
        assert words_ in text
    assert text.isascii()
    assert "MemoryError" in "\n".join(tables.card(night()[2], SCALE, output.Screen()))


def test_every_sign_that_is_written_has_a_spelling_in_ascii() -> None:
    """A code page of Windows shows what it lacks as "?", and '?0.0262' is no change of a score."""
    drawn = {*words._BARS, *SPINNER, "\ufeff", "\ufffd"}  # drawn otherwise there, never written, and the "?" itself
    root = Path(output.__file__).parents[1]
    files = [
        p for part in ("console", "core", "researchers", "backends", "benchmarks") for p in root.glob(f"{part}/**/*.py")
    ]
    signs = {c for file in files for text in literals(file) for c in text if not c.isascii()} - drawn
    assert "−" in signs
    assert {c for c in signs if not output.plain(c, FakeStream("cp1252")).isascii()} == set()


def literals(file: Path) -> list[str]:
    """String constants, docstrings among them left out."""
    tree = ast.parse(file.read_text("utf-8"))
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in said]
    return [node.value for node in constants if isinstance(node.value, str)]


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    screen = output.Screen(True)
    screen.say("for people")
    screen.document({"a": math.nan, "b": [math.inf, 1.5], "c": Path("x")})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": "x"}


def test_plain_progress_is_rare(capsys: pytest.CaptureFixture[str]) -> None:
    screen = output.Screen()
    with Ticker(screen, heartbeat=1e9) as ticker:
        ticker.begin("#3", "idea")
        for step in range(100):
            ticker.feed(
                Event("progress", {"step": step, "loss": 4.5, "remaining": 12.0, "tokens_per_second": 10_200.0})
            )
        assert ticker.line() == "#3  step 99, loss 4.500, 10.2k tokens/s, 12 s left  idea"
        ticker.say("#3 done")
    assert capsys.readouterr().out == "#3 done\n"


def test_what_computed_an_experiment_is_among_its_facts() -> None:
    """A night on the slow way of plain PyTorch can be seen by `show` and on the page."""
    described = {
        "depth": 4, "kernels": "torch: triton failed when tried: RuntimeError: no C compiler",
        "mlp": "torch: 0.2 ms",
        "attention over 256": "triton: 0.3 ms, the fastest of 3", "attention over 2048": "", "attention_span": "x",
    }  # fmt: skip
    row = a_row(1, "keep", 1.85, None, outcome={**OUTCOME, "describe": described})
    told = dict(page.facts(row))
    assert told["kernels"] == described["kernels"] and told["attention over 256"] == described["attention over 256"]
    assert told["mlp"] == described["mlp"]
    assert not {"attention over 2048", "attention_span", "depth"} & set(told)
    screen = output.Screen()
    assert any("triton failed when tried" in line for line in tables.card(row, SCALE, screen))
    assert "kernels" not in dict(page.facts(a_row(2, outcome=OUTCOME)))


def test_a_score_in_smaller_batches_is_told_as_one() -> None:
    less = {"scored_rows": 7, "scored_rows_reason": "CUDA out of memory"}
    for described, said in (({"scored_rows": 16}, None), (less, "in batches of 7 rows, as memory ended with more")):
        row = a_row(1, "keep", 1.85, None, outcome={**OUTCOME, "describe": described})
        assert dict(page.facts(row)).get("scored") == said


# --- picture and page ----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [night(), night()[:1], night()[2:3], [a_row(1, "crash"), a_row(2, "running", None)]])
def test_the_picture_is_drawn_from_any_night(tmp_path: Path, rows: list[Row]) -> None:
    path = picture.draw(rows, SCALE, picture.title("nov24 $x$ <b>", rows), tmp_path / "night.png")
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")) == (1600, 800)


def test_the_picture_shows_what_was_stopped_early(tmp_path: Path) -> None:
    def floor(middle: str) -> np.ndarray:
        """The lowest part of the plot, (rows, columns, RGBA), where marks without a score stand."""
        rows = [a_row(1, "keep", 1.9, None), a_row(2, middle, None), a_row(3, "keep", 1.8, 1.9)]
        return imread(picture.draw(rows, SCALE, "night", tmp_path / f"{middle}.png"))[660:715, 200:1560]

    assert (floor("running") == 1).all(axis=2).mean() > 0.9  # nothing but the grid
    assert (floor("discard") != floor("running")).any()


@given(
    st.lists(st.one_of(st.none(), st.floats(0.5, 20)), min_size=1, max_size=40),
)
def test_the_window_holds_the_staircase(scores: list[float | None]) -> None:
    rows: list[Row] = []
    best: float | None = None
    for number, score in enumerate(scores, 1):
        kept = score is not None and (best is None or score < best - 1e-3)
        rows.append(a_row(number, "crash" if score is None else "keep" if kept else "discard", score, best))
        best = score if kept else best
    low, high = picture.window(rows)
    assert low < high
    _, stairs = picture.staircase(rows)
    assert all(low <= value <= high for value in stairs)
    assert stairs == sorted(stairs, reverse=True)
    svg = chart.charts(found(rows, None))
    assert "nan" not in svg and "inf" not in svg


class Checker(HTMLParser):
    """Tags in balance, and nothing that is fetched from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.outside += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith("#")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.outside += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith("#")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def a_page() -> str:
    diffs = {4: "--- a/train.py\n+++ b/train.py\n-MATRIX_LR = 0.04\n+MATRIX_LR = 0.055 # <b>\n"}
    return page.page(found(night(), 4, diffs), "24 November 2026, 07:15")


def test_the_page_is_whole_and_self_contained() -> None:
    checker = Checker()
    checker.feed(a_page().removeprefix("<!doctype html>"))
    assert checker.open == [] and checker.outside == []
    for words_ in ("MATRIX_LR 0.04 -> 0.055 <script>alert(1)</script>", "1.8200", "256 tokens of context", "crash"):
        assert words_ in checker.text
    assert "<script" not in a_page() and "url(" not in a_page()


def test_every_mark_links_to_its_line() -> None:
    text = a_page()
    for r in night():
        if r.decided:
            assert f'href="#e{r.number}"' in text and f'id="e{r.number}"' in text


# --- awake -------------------------------------------------------------------------------


def test_holding_sleep_off_says_what_happens() -> None:
    with awake.awake() as says:
        assert says.startswith(("sleep is held off", "sleep is not held off"))
    assert "caffeinate" in awake.command("darwin")[1]
    argv, says = awake.command("win32")
    assert argv and argv[0] == sys.executable and "SetThreadExecutionState" in says


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="a shell script stands in for PowerShell")
@pytest.mark.parametrize(("answer", "held"), [("echo held; cat", True), ("exit 1", False), ("echo no; cat", False)])
def test_under_wsl_windows_is_asked_and_has_to_answer(
    answer: str, held: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = tmp_path / "powershell.exe"
    shell.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n{answer}\n')
    shell.chmod(0o755)
    monkeypatch.setattr(awake, "under_wsl", lambda: True)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with awake.awake() as says:
        assert (says == "Windows is asked to stay awake") == held
        assert held or "powercfg /change standby-timeout-ac 0" in says
    asked = (tmp_path / "asked").read_text().split()
    assert asked[:3] == ["-NoProfile", "-NonInteractive", "-EncodedCommand"]
    assert "SetThreadExecutionState(2147483649)" in base64.b64decode(asked[3]).decode("utf-16-le")
    monkeypatch.setattr(awake.shutil, "which", lambda name: None)
    with awake.awake() as says:
        assert says.startswith("sleep is not held off: Windows cannot be asked from here; in Windows: powercfg")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="a shell script stands in for the helper")
def test_a_helper_that_is_refused_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "inhibit"
    script.write_text("#!/bin/sh\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(awake, "command", lambda: ([str(script)], "sleep is held off"))
    with awake.awake() as says:
        assert says == f"sleep is not held off: {script} ended with status 3"


def test_a_label_of_the_picture_says_what_was_changed() -> None:
    """Not why the search tried it; what others wrote stays whole."""
    assert change("DEPTH 3 -> 2, WIDTH 64 -> 96: 2 not tried yet") == "DEPTH 3 -> 2, WIDTH 64 -> 96"
    assert change("Adam: a second moment per row") == "Adam: a second moment per row"
    assert change("LR 0.02 -> 0.03") == "LR 0.02 -> 0.03" and change("baseline") == "baseline"
