"""Keep or discard, and when a measurement counts as disturbed."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.noise import Noise, Run
from core.verdict import Night, Rule, decide, decide_simple, taint

scores = st.floats(min_value=1e-6, max_value=100.0)
many = st.lists(scores, min_size=1, max_size=8)


def test_the_first_that_finishes_is_the_baseline():
    assert decide_simple([], [1.9], 0.001).status == "keep"
    assert "baseline" in decide_simple([], [1.9], 0.001).reason


@pytest.mark.parametrize(
    ("best", "new", "status", "figure"),
    [
        (1.5, 1.4, "keep", "0.100000 better"),
        (1.5, 1.4995, "discard", "only 0.000500 better"),
        (1.5, 1.5, "discard", "equals"),
        (1.5, 1.6, "discard", "0.100000 worse"),
    ],
)
def test_reasons_have_the_figures(best, new, status, figure):
    said = decide_simple([best], [new], 0.001)
    assert said.status == status
    assert figure in said.reason


def test_exactly_the_minimum_difference_is_not_enough():
    assert decide_simple([1.5], [1.25], 0.25).status == "discard"  # both are exact in binary


@given(many, many, st.floats(min_value=0, max_value=1))
def test_kept_only_if_better_by_more_than_the_difference(best, new, delta):
    gain = math.fsum(best) / len(best) - math.fsum(new) / len(new)
    assert (decide_simple(best, new, delta).status == "keep") == (gain > delta)


@given(many, many, st.floats(min_value=0, max_value=1))
def test_the_order_of_samples_does_not_matter(best, new, delta):
    assert decide_simple(best, new, delta) == decide_simple(best[::-1], new[::-1], delta)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_what_is_no_score_is_refused(bad):
    with pytest.raises(ValueError, match="not a score"):
        decide_simple([1.5], [bad], 0.001)
    with pytest.raises(ValueError, match="not a score"):
        decide_simple([bad], [1.5], 0.001)
    with pytest.raises(ValueError, match="needs a score"):
        decide_simple([1.5], [], 0.001)


def test_work_beside_a_training_taints_it():
    assert taint({"others_cores": 1.2, "our_cores": 1.9}).startswith("other processes kept 1.2")
    own = taint({"others_cores": 1.2, "our_cores": 1.9, "loop_cores": 0.9})
    assert "1.2 cores busy (0.9 of them the researcher and the loop) beside" in own
    assert taint({"others_cores": 0.1, "our_cores": 1.9}) == ""
    assert taint({"others_cores": 2.0, "our_cores": 30.0}) == ""
    assert taint({}) == ""


@pytest.mark.parametrize(
    ("others", "cores", "crowded"),
    [(1.0, 16, False), (10.0, 16, False), (14.5, 16, True), (1.0, 2, True), (1.0, 0, True)],
)
def test_work_on_cores_that_a_card_s_training_leaves_idle_taints_nothing(others, cores, crowded):
    health = {"others_cores": others, "our_cores": 1.1, "cores": cores}
    assert bool(taint({**health, "card": {"looks": 60, "tainted": ""}})) == crowded
    assert taint(health), "on the processor itself it does"


# --- the statistical verdict -----------------------------------------------------------------------------------------

RULE = Rule(min_effect=0.001)
QUIET = Noise(0.01, 20)
BEST = [Run(seed, 2.0 + off, seed) for seed, off in enumerate([0.004, -0.004, 0.002, -0.002, 0.0])]


def candidate(*scores: float) -> list[Run]:
    return [Run(seed, score, 5 + seed) for seed, score in enumerate(scores)]


def said(scores, best=BEST, noise=QUIET, night=None, rule=RULE, smaller_by=0):
    return decide(best, candidate(*scores), noise, night or Night(), rule, smaller_by)


def test_the_first_recipe_is_the_baseline_and_no_test():
    step = decide([], candidate(2.0), Noise(0, 0), Night(), RULE)
    assert (step.status, step.seed) == ("keep", None) and "baseline" in step.reason
    assert Night.from_records([step.record, {}]) == Night()


def test_a_clear_loser_stops_after_one_run():
    step = said([2.03])
    assert step.status == "discard" and step.seed is None
    assert "0.030000" in step.reason and "worse than the best, 2.000000 (1 run against 5)" in step.reason
    assert step.record["tested"] == {"passed": False, "promising": False, "found": False, "effect": pytest.approx(-3.0)}


def test_one_run_never_keeps_and_the_next_is_paired_with_a_run_of_the_best():
    step = said([1.5])
    assert (step.status, step.seed) == ("more", 1)
    assert said([1.5, 1.5]).status == "control"
    assert said([1.5, 1.5], best=[*BEST, Run(5, 2.0, 7)]).status == "keep"


def decided(score, smaller_by=0, noise=QUIET, anchor=(), night=None):
    """(the last step, what was asked for, the candidate's runs, the best's) of a candidate that always scores this."""
    asked, runs, best = [], candidate(score), list(BEST)
    while (step := decide(best, runs, noise, night or Night(), RULE, smaller_by, anchor)).seed is not None:
        asked.append(step.status)
        order = 6 + len(asked)
        if step.status == "more":
            runs.append(Run(step.seed, score, order))
        else:
            best.append(Run(step.seed, 2.0, order))
    return step, asked, runs, best


def test_a_close_call_runs_until_it_is_told_from_noise():
    """Two sds better: first runs of its own, then the best's too, in the end a keep with the figures."""
    step, asked, runs, best = decided(1.98)
    assert step.status == "keep" and "more than noise" in step.reason
    assert {"more"} <= set(asked) <= {"more", "control"} and 2 <= len(runs) <= 8
    assert len({run.seed for run in runs}) == len(runs) and len({run.seed for run in best}) == len(best)
    low, high = step.record["interval"]
    assert 0 < low < 0.02 < high
    assert step.record["z"] >= step.record["needed_z"]
    assert json.loads(json.dumps(step.record)) == step.record


def test_without_a_known_noise_the_best_is_run_first():
    step = said([1.9], best=BEST[:1], noise=Noise(0.0, 0.0))
    assert (step.status, step.seed) == ("control", 1) and "not known" in step.reason


def test_what_is_real_but_not_worth_keeping_is_discarded():
    noise = Noise(1e-5, 20)
    steps = said([1.9995, 1.9995, 1.9995], noise=noise, best=[Run(s, 2.0, s) for s in (0, 1, 2, 3, 9)])
    assert steps.status == "discard"
    assert not steps.record["tested"]["found"]


def test_equal_scores_without_any_noise_are_a_discard():
    same = [Run(s, 2.0, s) for s in range(5)]
    assert said([2.0], best=same, noise=Noise(0.0, 4.0)).status == "discard"
    assert said([1.9, 1.9], best=[*same, Run(5, 2.0, 7)], noise=Noise(0.0, 4.0)).status == "keep"


def test_nothing_is_kept_against_a_best_that_was_last_run_long_ago():
    late = [Run(seed, 1.9, 100 + seed) for seed in range(4)]
    step = decide(BEST, late, QUIET, Night(), RULE)
    assert step.status == "control" and "has not been run since" in step.reason
    again = decide([*BEST, Run(step.seed, 2.0, 104)], late, QUIET, Night(), RULE)
    assert again.status == "keep"


def test_runs_end_at_the_caps():
    rule = replace(RULE, cap=4, control_cap=6)
    best = [*BEST, Run(5, 2.0, 50)]
    step = decide(best, candidate(1.993, 1.993, 1.993, 1.993), QUIET, Night(), rule)
    assert step.status == "discard" and "no more runs are allowed" in step.reason


def test_as_good_and_smaller_is_a_simplification_and_worse_is_not():
    assert decided(2.0)[0].status == "discard"
    step, asked, _, _ = decided(2.0, smaller_by=40)
    assert step.status == "simplify" and "40 tokens less" in step.reason and len(asked) < 25
    assert step.record["simplified"]["found"] and not step.record["tested"]["found"]
    assert decided(2.0, smaller_by=4)[0].status == "discard"
    step, *_ = decided(2.008, smaller_by=40)
    assert step.status == "discard" and "cannot be ruled out" in step.reason


def test_what_is_shorter_and_a_little_better_is_kept_as_what_is_shorter_and_equal_is():
    """A real gain below what is worth keeping: 1.75 sds of 2.5."""
    noise = Noise(0.0004, 20)
    assert "real, but less than" in decided(1.9993, noise=noise)[0].reason
    for score in (2.0, 1.9997, 1.9993):
        step, *_ = decided(score, smaller_by=40, noise=noise)
        assert step.status == "simplify", step.reason
        assert step.record["simplified"]["found"] and not step.record["tested"]["found"]
    assert decided(1.998, smaller_by=40, noise=noise)[0].status == "keep"


def test_simplifications_together_may_lose_no_more_than_one():
    """The best of now has lost a little already: what equals it is worse than the last keep."""
    better = [replace(run, bpb=run.bpb - 0.006, order=run.order - 10) for run in BEST]
    step, *_ = decided(2.0, smaller_by=40, anchor=better)
    assert (
        step.status == "discard"
        and "0.006000 worse than what simplifications began from, over its 5 runs" in step.reason
    )
    assert (
        decided(2.0, smaller_by=40, anchor=[replace(run, order=run.order - 10) for run in BEST])[0].status == "simplify"
    )
    assert decided(1.98, smaller_by=40, anchor=better)[0].status == "keep", "a gain is one over the best of now"


def test_after_a_simplification_the_last_keep_is_still_known_to_have_been_lucky():
    lucky = Night(luck=0.006, lucky=frozenset(run.order - 10 for run in BEST))
    better = [replace(run, bpb=run.bpb - 0.006, order=run.order - 10) for run in BEST]
    step, *_ = decided(2.0, smaller_by=40, anchor=better, night=lucky)
    assert step.status == "simplify", "the last keep was better by its luck alone"
    after = lucky.after(step.record)
    assert (after.luck, after.lucky) == (lucky.luck, lucky.lucky)
    assert after.luck_of(better) == 0.006 and after.luck_of([*better, *BEST]) == 0.003 and after.luck_of([]) == 0


def test_a_keep_makes_the_next_test_easier_and_its_luck_is_taken_from_the_next_control():
    kept = said([1.97, 1.97, 1.97], best=[*BEST, Run(5, 2.0, 8)])
    assert kept.status == "keep" and kept.record["kept"]["orders"] == [5, 6, 7]
    night = Night.from_records([{}, kept.record])
    assert night.tested[0].found and night.luck > 0
    fair = night.fair(candidate(1.97, 1.97, 1.97))
    assert all(run.bpb == pytest.approx(1.97 + night.luck) for run in fair)
    assert night.fair(BEST) == BEST
    assert said([1.99, 1.99], night=night).record["level"] > said([1.99, 1.99]).record["level"]


def test_from_two_keeps_on_the_predecessor_tells_of_the_next_best_too():
    """With gains of 2 sds (noise of 0.01) so far, something kept over 2.0 is expected at 2.0 less most of 0.02."""
    twice = {"tested": {"passed": True, "promising": True, "found": True, "effect": 2.0}}
    best = [*BEST, Run(5, 2.0, 8)]
    first = said([1.97, 1.97, 1.97], best=best, night=Night.from_records([twice])).record["kept"]
    assert first["prior"] is None
    night = Night.from_records([twice] * 2)
    kept = said([1.97, 1.97, 1.97], best=best, night=night).record
    mean = math.fsum(run.bpb for run in best) / len(best)
    assert kept["kept"]["prior"]["bpb"] == pytest.approx(mean - 0.02 * RULE.shrink)
    assert kept["kept"]["prior"]["runs"] == pytest.approx(1 / (1 / 6 + RULE.spread**2)), "they have spread by nothing"
    night = night.after(kept)
    new = [Run(9 + k, 1.95, 20 + k) for k in range(2)]
    own = candidate(1.97, 1.97, 1.97)
    told, alone = (decide(own, new, QUIET, n, RULE).record for n in (night, replace(night, prior=None)))
    assert told["error"] < alone["error"] and told["gain"] > alone["gain"], "the best was foreseen at 1.983"
    assert decide(own[-1:], new, QUIET, night, RULE).record["error"] > alone["error"], "the machine has moved since"
    apart = [{**twice, "tested": {**twice["tested"], "effect": effect}} for effect in (1.0, 2.0, 4.5)]
    wide = said([1.97, 1.97, 1.97], best=best, night=Night.from_records(apart)).record["kept"]["prior"]
    jackpot = said([1.9, 1.9, 1.9], best=best, night=Night.from_records([twice] * 3)).record["kept"]["prior"]
    assert jackpot["runs"] < 0.05, "a gain of 10 sds is like none of 2"
    assert wide["runs"] < 0.5 < kept["kept"]["prior"]["runs"], "gains that differ tell less of the next one"


def test_the_record_says_what_the_simple_rule_would_have_said():
    assert said([1.999]).record["simple"] == "keep"  # the best's first run was 2.004
    assert said([2.0035]).record["simple"] == "keep", "upstream asks for no least gain"
    assert said([2.0045]).record["simple"] == "discard"


def test_upstream_s_rule_goes_by_what_it_would_have_kept_itself():
    lucky = said([1.995]).record
    assert lucky["simple"] == "keep" and lucky["first"] == 1.995
    later = Night.from_records([{"simple": "keep", "first": 2.004}, lucky, said([2.1]).record])
    assert later.upstream == 1.995
    assert said([1.9955], night=later).record["simple"] == "discard", "though it is below the first run of our best"
    assert said([1.99], night=later).record["simple"] == "keep"


@given(st.lists(st.floats(1.95, 2.05), min_size=1, max_size=5), st.randoms())
@settings(max_examples=50, deadline=None)
def test_the_same_runs_in_any_order_give_the_same_step(scores, dice):
    expected = said(scores)
    runs, best = candidate(*scores), list(BEST)
    dice.shuffle(runs)
    dice.shuffle(best)
    assert decide(best, runs, QUIET, Night(), RULE) == expected


@given(st.lists(st.floats(1.9, 2.1), min_size=1, max_size=4), st.floats(0.0, 0.05))
@settings(max_examples=50, deadline=None)
def test_better_scores_never_turn_a_keep_into_a_discard(scores, by):
    rank = {"discard": 0, "more": 1, "control": 1, "keep": 2}  # a control may stand before a keep
    assert rank[said([s - by for s in scores]).status] >= rank[said(scores).status]
