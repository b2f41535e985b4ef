"""What the tests of the statistical loop share: a researcher, machines whose scores have noise, and short questions."""

from __future__ import annotations

import random
from collections import Counter

from scripted import Loop, Scripted, recipe

from core.contract import Proposal
from core.probing import as_record
from core.verdict import Rule, first_runs

SD = 0.004  # bpb, between seeds
BUSY = {"others_cores": 1.5, "our_cores": 1.0}
SEEDS = list(range(42, 42 + first_runs(Rule())))  # of a baseline, as the settings begin with 42


class Ideas:
    """A researcher without state: idea k has the k-th score, counted from 1."""

    name = "ideas"

    def __init__(self, *scores: float) -> None:
        self.scores = scores

    def propose(self, view):
        number = len(view.past)
        score = self.scores[(number - 1) % len(self.scores)]
        return Proposal(recipe(score, mark=f"idea {number}"), f"idea {number}")


class Machine(Scripted):
    """Its scores are worse by `slower` from the moment that this is set; `health` is what the next runs say."""

    slower = 0.0

    def __init__(self, **given):
        super().__init__(**{"noise": SD, **given})
        self.audits = Counter()

    def score(self, request, plain):
        return round(super().score(request, plain) + self.slower, 6)

    def execute(self, request, on_event, stop):
        outcome = super().execute(request, on_event, stop)
        self.audits[outcome.audited] += 1
        return outcome


class Disturbed(Machine):
    """The runs of those whose description holds `whose` are disturbed, the first `times` of them."""

    def __init__(self, number, times, health=BUSY):
        super().__init__()
        self.whose, self.left, self.sick = f"-{number}", times, health

    def execute(self, request, on_event, stop):
        outcome = super().execute(request, on_event, stop)
        if request.experiment.endswith(self.whose) and self.left:
            self.left -= 1
            outcome.health = dict(self.sick)
        return outcome


class Looking(Machine):
    """Looks at its runs, as the referee does: a probe shows the score, half a bit higher and a little off."""

    def execute(self, request, on_event, stop):
        outcome = super().execute(request, on_event, stop)
        for index, share in enumerate(request.probe.shares if outcome.val_bpb else ()):
            probe = outcome.val_bpb + 0.5 + random.Random(f"{outcome.val_bpb}{share}").gauss(0.0, 0.002)
            outcome.probes.append([share, share * 2.0, probe])
            found = request.probe.judge(index, probe)
            if found and found.hopeless:
                outcome.stopped_early = as_record(found, probe, (1 - share) * 2.0)
                outcome.status, outcome.reason, outcome.val_bpb = "hopeless", found.sentence(), None
                break
        return outcome


def loop_of(lab, executor=None, researcher=None, on_event=lambda event: None, **given) -> Loop:
    return Loop(lab, researcher, executor or Machine(), on_event, **given)


def ends(lab, executor, score, what="idea") -> object:
    """Judge one candidate with this score."""
    mark = f"{what} {len(lab.ledger.experiments())}"
    return loop_of(lab, executor).judge(recipe(score, mark=mark), mark)


def runs(lab, number, purpose=None):
    return [(s.seed, s.tainted) for s in lab.ledger.samples(number, purpose)]


def events(lab, kind):
    return [e.text for e in lab.ledger.events() if e.kind == kind]
