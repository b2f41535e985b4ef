"""Which lab a command means: by name, by place, mistyped or new; what there is; and how commands are told."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from scripted import make_lab
from typed import Verb, quick_lab, typed_in

from cli import cli
from console import output, places
from console.verbs import VERBS
from core import locks
from core.lab import Lab
from core.settings import Settings


@pytest.fixture
def verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Verb:
    """A verb as it is typed in a folder with a home of its own, where experiments follow a script."""
    return typed_in(tmp_path, monkeypatch)


@pytest.fixture
def quick(tmp_path: Path, settings: Settings) -> Lab:
    """./labs/quick, with a baseline of 2.0 and a keep of 1.5."""
    return quick_lab(tmp_path, settings)


# --- new, mistyped, misplaced ------------------------------------------------------------------------


def test_inside_a_lab_its_own_name_and_those_beside_it_are_known(
    verb: Verb, quick: Lab, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_lab(quick.path.parent / "stat", settings)
    monkeypatch.chdir(quick.path)
    assert json.loads(verb("status", "quick", "--json").output)["lab"]["path"] == str(quick.path)
    assert json.loads(verb("status", "stat", "--json").output)["lab"]["tag"] == "stat"
    made = verb("run", "quick", "--experiments", "1", "--researcher", "scripted:Night")
    assert "labs" not in {p.name for p in quick.path.iterdir()} and "1 experiment is done" in made.output


@pytest.mark.parametrize("verb_", ["run", "init"])
def test_no_lab_is_made_inside_of_another(verb: Verb, quick: Lab, monkeypatch: pytest.MonkeyPatch, verb_: str) -> None:
    monkeypatch.chdir(quick.path)
    for given in (["night"], ["--tag", "night"], ["some/where/night"], [str(quick.path / "night")]):
        said = failed(verb(verb_, *given, status=1))
        assert f"inside of another one, here {quick.path}" in said and f"cd {quick.path.parent}" in said
    assert {p.name for p in quick.path.iterdir()} & {"labs", "night", "some"} == set()


def failed(done: Result) -> str:
    return f"{done.exception}" + done.output


def test_a_mistyped_name_makes_no_lab(verb: Verb, quick: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ("quikc", "labs/quikc", "quic"):
        said = failed(verb("run", given, status=1))
        assert "did you mean quick?" in said and "`autoresearch run labs/quick`" in said
        assert "autoresearch init labs/qui" in said
    assert [p.name for p in quick.path.parent.iterdir()] == ["quick"]
    said = failed(verb("log", "quikc", status=1))
    assert "there is no lab quikc" in said and "did you mean quick?" in said and "autoresearch labs" in said


@pytest.mark.parametrize(
    ("name", "there", "meant"),
    [
        ("nov25", "nov24", None),  # another night
        ("nov24-2", "nov24", None),
        ("demo-3", "demo-2", None),
        ("quick-wide", "quick", None),
        ("novels", "quick", None),
        ("qiuck", "quick", "quick"),
        ("nvo24", "nov24", "nov24"),
    ],
)
def test_what_is_taken_for_mistyped(tmp_path: Path, name: str, there: str, meant: str | None) -> None:
    (tmp_path / there).mkdir()
    (tmp_path / there / ".autoresearch.json").write_text("{}")
    assert places.mistyped(tmp_path / name) == meant


def test_a_new_lab_is_told_before_it_is_made(verb: Verb, quick: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is beside it, as it may be that one of these was meant."""
    order: list[str] = []
    say = output.Screen.say
    monkeypatch.setattr(output.Screen, "say", lambda self, text="", style=None: order.append(text) or say(self, text))
    monkeypatch.setattr("console.making.ready_data", lambda *_: pytest.fail(order[-1]))
    with pytest.raises(pytest.fail.Exception):
        CliRunner().invoke(cli, ["run", "novels", "--backend", "cpu"], catch_exceptions=False)
    assert order[0] == "makes a new lab novels: labs/novels; beside it: quick"


# --- LAB and --lab -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(VERBS) - {"doctor", "prepare", "bench", "labs", "kernels"}))
def test_every_verb_takes_both_and_explains_them(verb: Verb, name: str) -> None:
    said = " ".join(verb(name, "--help").output.split())
    assert "[LAB]" in said and "--lab LAB" in said
    assert ("The new lab's folder or name" if name == "init" else "A lab's folder or name") in said


@pytest.mark.parametrize(
    "words", [["log"], ["status"], ["best"], ["show", "2"], ["diff", "2"], ["wait", "2"], ["confirm", "2", "--cost"],
              ["confirm", "--cost"], ["undo", "2"]],
)  # fmt: skip
def test_both_mean_the_same(
    verb: Verb, quick: Lab, settings: Settings, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_lab(quick.path.parent / "last-used", settings)
    said = {json.loads(verb(*words, *where, "--json").output)["lab"]["tag"]
            for where in ([["quick"], ["--lab", "labs/quick"]] if words != ["undo", "2"] else [["quick"]])}  # fmt: skip
    assert said == {"quick"}
    told = "not the number" if words == ["confirm", "--cost"] else "give one of them"
    assert told in failed(verb(*words, "quick", "--lab", "quick", status=2))


def test_a_number_that_cannot_be_one_is_told(verb: Verb, quick: Lab) -> None:
    for words in (["confirm", "0"], ["confirm", "nov24", "quick"], ["show", "quick"]):
        assert "number" in failed(verb(*words, status=2)) or "integer" in failed(verb(*words, status=2))


# --- what there is -----------------------------------------------------------------------------------


def test_labs_lists_every_lab_and_touches_none(
    verb: Verb, quick: Lab, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_lab(tmp_path / "labs" / "stat", replace(settings, verdict="statistical"))
    gone = make_lab(tmp_path / "labs" / "gone", settings)
    gone.ledger.close()
    shutil.rmtree(gone.path)
    Lab.open(tmp_path / "labs" / "stat")  # the last used

    def listed() -> dict[str, Any]:
        found = json.loads(verb("labs", "--json").output)["labs"]
        return {lab["tag"]: lab for lab in found if lab["path"].startswith(str(tmp_path))}

    found = listed()
    assert set(found) == {"quick", "stat", "gone"}
    assert found["quick"]["best"] == {"number": 2, "val_bpb": 1.5} and found["quick"]["running"] is False
    assert found["quick"]["total"]["experiments"] == 2 and found["quick"]["backend"] == "cpu"
    assert found["stat"]["best"] is None and found["stat"]["scale"]["budget_seconds"] == 2.0
    assert "there is no lab at" in found["gone"]["problem"] and found["gone"]["running"] is None
    text = verb("labs").output
    assert "quick  labs/quick\n  2 experiments: baseline, 1 kept" in text and "stat  labs/stat\n  no experiment" in text
    assert "\n  backend cpu; val_bpb on kjv-v512, 64 tokens of context, 2 s of training\n" in text
    assert json.loads(verb("status", "--json").output)["lab"]["tag"] == "stat", "looking at them is no use of one"
    with locks.hold(quick.record / "run.lock", "lab quick", ""):
        assert listed()["quick"]["running"] is True and "quick  labs/quick  (running)\n" in verb("labs").output


def test_without_any_lab_labs_says_how_to_make_one(verb: Verb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "empty"))
    assert "autoresearch run --demo" in verb("labs").output
    assert json.loads(verb("labs", "--json").output) == {"labs": []}


# --- how commands are told ---------------------------------------------------------------------------


def test_hints_name_the_lab(verb: Verb, quick: Lab, settings: Settings) -> None:
    """`run` without LAB leaves a demo's lab alone, and would make another one."""
    demo = make_lab(quick.path.parent / "demo", replace(settings, profile="demo"))
    assert "autoresearch run labs/demo" in verb("status", "demo").output
    for words in (["best", "demo"], ["pause", "demo"]):
        assert "autoresearch run labs/demo" in failed(verb(*words, status=1))
    assert demo.tag == "demo"
