"""The rule on recorded learning curves: few good runs are stopped. Figures: docs/early_stopping.md."""

from __future__ import annotations

import json

from benchmarks.early_stopping import RESULTS, Tally, labs, replay_median, replay_rule
from core.probing import SHARES


def test_recorded_runs_that_end_better_are_hardly_ever_stopped() -> None:
    found = labs(json.loads(RESULTS.read_text("utf-8"))["runs"])
    rule, median = Tally(), Tally()
    for best, others in found:
        replay_rule(best, others, SHARES, rule, seed=0)
        replay_median(best, others, SHARES, median, seed=0)
    assert len(found) >= 3 and rule.judged > 100
    assert rule.stopped > 0 and rule.saved > 0
    assert rule.good_stopped / rule.good < 0.02
    assert median.good_stopped / median.good > 0.2, "there is something to be careful about"
