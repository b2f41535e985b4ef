"""Nights on cards that are not there, by the console's own commands: fitting, training, scoring, auditing, the card
watched and shared. Recipes run eagerly here; what torch.compile makes of them is for test_blank_card.py."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from blank_sharing import Shared

from benchmarks import blank_card
from benchmarks.blank_card import CARDS, GIB
from core.lab import Lab

HERE = Path(__file__).resolve().parent
VOCAB = 512
TIMEOUT = 400.0

if why := blank_card.obstacle():
    pytest.skip(f"no blank card here: {why}", allow_module_level=True)
pytestmark = pytest.mark.slow


class Desk:
    """A machine with one blank card, a home and a working directory of its own."""

    def __init__(self, card, folder):
        self.folder, shared = folder, folder / "shared" / "card"
        for place in (shared.parent, folder / "work"):
            place.mkdir(parents=True)
        self.card = Shared(shared, CARDS[card])
        self.env = blank_card.environment(CARDS[card]) | {
            "AUTORESEARCH_HOME": str(folder / "home"),
            "BLANK_CARD_SHARED": str(shared),
            "BLANK_CARD_VALUE": repr(math.log(VOCAB)),
            "TORCHDYNAMO_DISABLE": "1",
            "NO_COLOR": "1",
        }

    def start(self, *arguments, **env):
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        command = [sys.executable, str(HERE / "blank_console.py"), *arguments]
        return subprocess.Popen(command, cwd=self.folder / "work", env=self.env | env, text=True, **pipes)

    def __call__(self, *arguments, status=0):
        process = self.start(*arguments)
        said, _ = process.communicate(timeout=TIMEOUT)
        assert process.returncode == status, said
        return said

    def is_free(self):
        return self.card.free() == self.card.bytes

    def look(self):
        """What the driver says of the card."""
        code = "from core.nvml import Nvml; print(vars(Nvml().look('cuda:0', ())))"
        done = subprocess.run([sys.executable, "-c", code], env=self.env, capture_output=True, text=True, check=True)
        return eval(done.stdout)


def heard(process, words):
    """The lines that a process says up to the one with these words."""
    said = []
    for line in process.stdout:
        said.append(line)
        if words in line:
            return said
    raise AssertionError(f"{words!r} was never said:\n{''.join(said)}")


def night(desk, *options):
    """A lab named night, and what was said while it was made and run."""
    text = ("--text", str(HERE.parent / "docs"), "--vocab", str(VOCAB), "--tag", "night")
    return desk("run", *text, "--budget", "2", "--verdict", "simple", *options)


def experiments(desk):
    rows = json.loads(desk("log", "labs/night", "--json"))["experiments"]
    return [json.loads(desk("show", str(row["number"]), "--lab", "labs/night", "--json"))["experiment"] for row in rows]


@pytest.fixture(scope="module")
def h100(tmp_path_factory):
    desk = Desk("h100", tmp_path_factory.mktemp("h100"))
    return desk, night(desk, "--backend", "cuda", "--experiments", "2")


def test_a_night_on_a_data_centre_card_is_scored_audited_and_goes_on(h100):
    desk, said = h100
    assert "backend cuda: " in said and "NVIDIA H100 80GB HBM3, 79 GiB, sm_90" in said
    assert "fitting: timing the recipe on this machine; it is compiled first" in said
    first, second = experiments(desk)
    for found in (first, second):
        outcome, card = found["outcome"], found["outcome"]["health"]["card"]
        assert outcome["status"] == "scored" and outcome["steps"] > 3 and not found["tainted"]
        assert outcome["versions"]["card"] == "NVIDIA H100 80GB HBM3" and "data sheet" in outcome["describe"]["peak"]
        assert 0 < outcome["peak_memory"] < GIB and card["others_busy"] == 0.0 and card["others_bytes"] == [0, 0, 0]
    assert first["status"] == "keep" and first["outcome"]["audited"] and first["outcome"]["audit"]["points"] > 100
    assert desk.look()["used"] == 0  # nothing of ours is left on it


def test_what_follows_a_night_works_with_a_card(h100):
    desk, _ = h100
    assert "12 tokens in" in desk("sample", "labs/night", "--prompt", "The", "--tokens", "12")
    desk("report", "labs/night")
    assert "Measured on NVIDIA H100 80GB HBM3, driver 580" in (desk.folder / "work/labs/night/report.md").read_text()
    assert "peak_vram_mb" in desk("train", "labs/night", "--budget", "2", "--out", "model")


def test_a_night_that_is_killed_leaves_the_card_free_and_goes_on_though_the_card_is_lost_for_a_moment(h100):
    desk, _ = h100
    running = desk.start("run", "labs/night", "--experiments", "1", "--json")
    heard(running, '"phase": "train"')
    assert not desk.is_free()
    running.send_signal(signal.SIGKILL)
    running.wait()
    until = time.monotonic() + 30
    while not desk.is_free() and time.monotonic() < until:
        time.sleep(0.2)
    assert desk.is_free() and desk.look()["used"] == 0
    running = desk.start("run", "labs/night", "--experiments", "1", "--json")
    assert any("was cut off and will be repeated" in line for line in heard(running, '"phase": "train"'))
    with desk.card.befallen("lost"):
        heard(running, "NVIDIA H100 80GB HBM3 does not answer any more (GPU is lost): tried again in 1 s")
    rest = running.communicate(timeout=TIMEOUT)[0]
    assert running.returncode == 0, rest
    assert experiments(desk)[-1]["outcome"]["status"] == "scored"


def test_a_busy_card_is_waited_for(h100):
    desk, _ = h100
    with desk.card.used(GIB, 90):
        running = desk.start("run", "labs/night", "--experiments", "1")
        heard(running, "busy with other programs: waits until it is free")
    rest = running.communicate(timeout=TIMEOUT)[0]
    assert running.returncode == 0, rest
    assert not experiments(desk)[-1]["tainted"]


def gated(desk, number):
    """One more run of an experiment, which stops before its score and its audit until these files are taken away."""
    (gates := desk.folder / f"gates-{number}").mkdir()
    for phase in ("score", "audit"):
        (gates / phase).touch()
    arguments = ("confirm", str(number), "--lab", "labs/night", "--seeds", "1", "--no-holdout", "--json")
    return gates, desk.start(*arguments, BLANK_CONSOLE_GATES=str(gates))


def test_a_card_that_is_taken_when_the_training_is_done_costs_no_training(h100, monkeypatch):
    """What was trained waits for it: not trained again, and as good as any other."""
    desk, _ = h100
    gates, running = gated(desk, 1)
    said = []
    for phase in ("score", "audit"):
        said += heard(running, f'"phase": "{phase}"')
        with desk.card.used(desk.card.free() - GIB):
            (gates / phase).unlink()
            said += heard(running, "the training is done and kept, its score waits until the card is free")
    rest = running.communicate(timeout=TIMEOUT)[0]
    assert running.returncode == 0, rest
    assert sum('"phase": "train"' in line for line in [*said, *rest.splitlines()]) == 1
    monkeypatch.setenv("AUTORESEARCH_HOME", desk.env["AUTORESEARCH_HOME"])
    sample = Lab.open(desk.folder / "work/labs/night").ledger.samples(1, "confirm")[-1]
    again = sample.outcome["health"]["judged_again"]
    assert [why.partition(": ")[0] for why in again] == ["scorer", "auditor"]
    assert all("of 79.2 GiB free" in why for why in again) and not sample.tainted and sample.outcome["audited"]


def test_a_card_that_is_lost_when_the_training_is_done_costs_no_training(h100, monkeypatch):
    """What was trained waits until the driver answers again, before the scorer as before the auditor."""
    desk, _ = h100
    gates, running = gated(desk, 2)
    said = []
    waits = (
        "does not answer any more (GPU is lost): the training is done and kept, its score waits until the card answers"
    )
    for phase in ("score", "audit"):
        said += heard(running, f'"phase": "{phase}"')
        with desk.card.befallen("lost"):
            (gates / phase).unlink()
            said += heard(running, waits)
    rest = running.communicate(timeout=TIMEOUT)[0]
    assert running.returncode == 0, rest
    told = [*said, *rest.splitlines()]
    assert sum('"phase": "train"' in line for line in told) == 1 and not any("tried again in" in line for line in told)
    monkeypatch.setenv("AUTORESEARCH_HOME", desk.env["AUTORESEARCH_HOME"])
    sample = Lab.open(desk.folder / "work/labs/night").ledger.samples(2, "confirm")[-1]
    again = sample.outcome["health"]["judged_again"]
    assert [why.partition(": ")[0] for why in again] == ["scorer", "auditor"]
    assert all("H100 80GB HBM3 does not answer any more" in why for why in again)
    assert not sample.tainted and sample.outcome["audited"]


@pytest.mark.parametrize(("card", "dtype"), [("4060", "bfloat16"), ("2080ti", "float16")])
def test_a_night_on_a_card_of_gamers(card, dtype, tmp_path):
    desk = Desk(card, tmp_path / "desk")
    said = night(desk, "--backend", "rtx", "--experiments", "1")
    assert f"compute in {dtype}" in said
    (found,) = experiments(desk)
    assert found["outcome"]["status"] == "scored" and found["outcome"]["describe"]["dtype"] == dtype
    assert found["outcome"]["versions"]["card"] == CARDS[card].name
