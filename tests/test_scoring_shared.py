"""A scorer or an auditor that others push off a device, or whose device is lost: what was trained is judged again, and
the same is asked again.

The device is a processor here, whose memory "ends" in real children as long as nobody has waited for it; who else has
it is presented. On (blank) cards it is shown by test_blank_night.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
from edits import check_clean

from core import sandbox
from core.outcome import Request
from core.referee import AGAIN, execute

GAME = "the card is 90% busy with other programs"
LOGITS = "    def logits(self, tokens):\n"
LOADED = "    def load_weights(self, weights):\n"


class Others:
    """They have taken the device, and leave it to who waits `times` times. `leaves`: whether they do in time."""

    def __init__(self, monkeypatch, workdir, why=GAME, times=1, leaves=True, gone=""):
        self.why, self.left, self.leaves, self.gone = why, times, leaves, gone
        self.waited, self.told, self.logs, self._workdir = 0.0, [], [], workdir
        given = sandbox.environment
        environment = lambda *places: given(*places) | ({} if self.left > 0 else {"ROOM": "1"})  # noqa: E731
        monkeypatch.setattr(sandbox, "environment", environment)

    def taken(self, took):
        assert took > 0
        return self.why

    def wait(self, why, needed=0):
        self.told.append(why)
        self.logs.append({role: self.log(role) for role in ("scorer", "auditor")})
        self.left, self.waited = self.left - 1, self.waited + 1000.0
        return self.leaves

    def lost(self, said=""):
        return self.gone

    def wait_for_answer(self, why):
        return self.wait(why)

    def log(self, role):
        """What a child of this role was asked, as its recipe printed it."""
        file = self._workdir / f"{role}.log"
        lines = file.read_text().splitlines() if file.exists() else []
        return [line for line in lines if line.lstrip("-").isdigit()]


def needing(tiny_recipe, condition, fails="torch.empty(2**50)"):
    """The recipe whose memory ends under this condition while there is no room, and that prints what it is asked."""
    head = (
        "        self.calls = getattr(self, 'calls', 0) + 1\n"
        "        if tokens.shape[1] == self.spec.sequence_len:\n"
        "            print(hash(tokens.numpy().tobytes()), flush=True)\n"
        f"        if not os.environ.get('ROOM') and hasattr(self, 'scores') and {condition}:\n"
        f"            {fails}\n"
    )
    source = tiny_recipe.replace("import numpy as np\n", "import os\n\nimport numpy as np\n")
    # An auditor is asked before it has the weights, a scorer is not.
    loaded = LOADED + "        self.scores = not hasattr(self, 'calls')\n"
    return source.replace(LOGITS, LOGITS + head).replace(LOADED, loaded)


WHERE = {
    "scorer, before it sees text": ("scorer", "self.scores"),
    "scorer, when it has seen text": ("scorer", "self.scores and self.calls > 3"),
    "auditor, with the weights": ("auditor", "not self.scores and self.calls > 40"),
}


@pytest.fixture
def judge(dataset, settings, tiny_recipe, tmp_path, monkeypatch):
    """An experiment of a recipe whose memory ends so, beside others: outcome, phases, others."""

    def run(condition, fails="torch.empty(2**50)", **others):
        small = replace(settings, budget=1.0, logits_bytes=2 * 64 * 512 * 4, eval_tokens=64 * 64, audit_points=64)
        beside, phases = Others(monkeypatch, tmp_path / "work", **others), []
        request = Request(
            needing(tiny_recipe, condition, fails).encode(), small, dataset, 42, "1", tmp_path / "work", lint=False,
            audit="always",
        )  # fmt: skip
        tell = lambda event: phases.append(event.data["phase"]) if event.kind == "phase" else None  # noqa: E731
        outcome = execute(request, tell, None, beside)
        check_clean(tmp_path / "work")
        return outcome, phases, beside

    return run


@pytest.mark.parametrize("where", WHERE)
def test_it_is_judged_again_and_not_trained_again(judge, where):
    role, condition = WHERE[where]
    outcome, phases, others = judge(condition)
    assert outcome.status == "scored" and outcome.audited, outcome.reason
    assert phases.count("train") == 1 and outcome.weights.exists()
    assert len(others.told) == 1 and GAME in others.told[0] and "allocate" in others.told[0]
    assert outcome.health["judged_again"] == [f"{role}: {others.told[0]}"] and not outcome.health.get("tainted")
    assert outcome.timings["total"] < 1000, "what was waited is none of the experiment's time"
    before, after = others.logs[0][role], others.log(role)
    assert outcome.describe["scored_rows"] == 2 and "scored_rows_reason" not in outcome.describe
    if where != "scorer, before it sees text":
        assert 2 <= len(before) < len(after) and after[: len(before)] == before, "the very same is asked again"


@pytest.mark.parametrize("where", WHERE)
def test_where_nobody_has_the_device_it_ends(judge, where):
    role, condition = WHERE[where]
    outcome, phases, others = judge(condition, why="")
    assert outcome.status == "crash" and "allocate" in outcome.reason and not others.told
    assert phases.count("audit") == (role == "auditor") and outcome.val_bpb is None


def test_others_that_stay_end_it_as_it_would_have_ended_alone(judge):
    outcome, _, others = judge("self.scores", leaves=False)
    assert (outcome.status, outcome.out_of_memory, len(others.told)) == ("crash", True, 1)


def test_a_recipe_that_fails_each_time_is_not_asked_for_ever(judge):
    outcome, phases, others = judge("self.scores and self.calls > 3", times=99)
    assert outcome.status == "crash" and len(others.told) == AGAIN and phases.count("score") == 1 + AGAIN


LOST = "the card does not answer any more (GPU is lost)"
CRASH = "raise RuntimeError('CUDA error: unknown error')"


@pytest.mark.parametrize("where", list(WHERE)[1:])
def test_what_was_trained_waits_for_a_device_that_is_lost(judge, where):
    role, condition = WHERE[where]
    outcome, phases, others = judge(condition, CRASH, why="", gone=LOST)
    assert outcome.status == "scored" and outcome.audited, outcome.reason
    assert phases.count("train") == 1 and len(others.told) == 1
    (again,) = outcome.health["judged_again"]
    assert again == f"{role}: {others.told[0]}" and "unknown error" in again and again.endswith(f", while {LOST}")
    before, after = others.logs[0][role], others.log(role)
    assert 2 <= len(before) < len(after) and after[: len(before)] == before, "the very same is asked again"


def test_a_crash_beside_a_game_or_of_a_device_that_stays_lost_is_a_crash(judge):
    """What a recipe says of its device is not believed: the driver has to."""
    condition = "self.scores and self.calls > 3"
    outcome, _, others = judge(condition, CRASH, why=GAME)
    assert outcome.status == "crash" and not others.told
    outcome, phases, others = judge(condition, CRASH, why="", gone=LOST, leaves=False)
    assert outcome.status == "crash" and len(others.told) == 1 and phases.count("train") == 1
