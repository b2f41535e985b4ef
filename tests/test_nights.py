"""The claims of docs/verdict.md on few simulated nights; `python -m benchmarks.nights` plays thousands."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.nights import interval, main, summary
from benchmarks.simulated import SD, Clairvoyant, Simple, Statistical, World, _Played, nights
from core.verdict import Rule

RULE = Rule(min_effect=0.0)


def row(world, strategy, many, seed=1):
    return summary(world, "", nights(world, strategy, np.random.SeedSequence(seed).spawn(many)))


def test_pure_noise_keeps_next_to_nothing_where_the_naive_rule_keeps_every_night():
    world = World("noise")
    assert row(world, Statistical(RULE), 12).anything <= 0.1  # 5 % at most over many nights
    naive = row(world, Simple(), 100)
    assert naive.anything > 0.9 and naive.claimed_error > 2


def test_gains_of_two_sds_are_found_and_few_keeps_are_false():
    world = World("mixed", better=0.2, gain=2.0, worse=0.75)
    found = row(world, Statistical(RULE), 10)
    assert found.power > 0.8 and found.false_share < 0.08
    assert 2 < found.time_ratio < 3.2
    assert row(world, Simple(), 15).false_share > 0.2
    assert abs(found.confirmed_error) < 4 * found.confirmed_error_se


def test_pairs_save_runs_where_seeds_correlate():
    world = World("alone", better=0.2, gain=1.0, worse=0.75, candidates=60)
    paired = World("paired", better=0.2, gain=1.0, worse=0.75, candidates=60, correlation=0.9)
    alone, together = row(world, Statistical(RULE), 24), row(paired, Statistical(RULE), 24)
    assert together.power > alone.power
    assert together.time_per_gain < alone.time_per_gain


def test_a_jump_of_the_machine_is_seen_and_makes_no_gain():
    found = row(World("jump", step=-5.0), Statistical(RULE), 6)  # everything after it looks better
    assert found.epochs >= 0.6
    assert found.keeps < 1


def test_after_a_move_the_candidate_begins_again_as_in_the_loop():
    played = _Played(World("moved"), np.random.default_rng(1), RULE, anchored=True)
    for seed in range(12):
        played.machine.run(played.baseline, seed)
    _, candidate = played.machine.draw(played.baseline)
    candidate.group = played._new_group()
    early = played.machine.run(candidate, 0)
    played.baseline.level += 10 * SD
    played._control(candidate, 12)
    assert played.result.epochs == 1
    assert candidate.runs == [] and [run.seed for run in played.baseline.runs] == [12]
    played._judge(candidate)
    assert candidate.runs[0].seed == 0 and early not in candidate.runs


def test_a_chain_of_simplifications_loses_less_where_the_last_keep_is_remembered():
    world = World("shorter", loses=(0.25,), shorter=40, worth=0.1)
    held, alone = row(world, Statistical(RULE), 8), row(world, Statistical(RULE, anchored=False), 8)
    assert 0 > held.true_gain > -1 > alone.true_gain
    assert 1 <= held.simplified_worse == held.simplified < alone.simplified


def test_the_interval_of_a_share_is_wilson_s():
    assert interval(8, 200) == pytest.approx((0.02041, 0.07693), abs=1e-4)
    assert interval(0, 10)[0] == 0.0 and interval(10, 10)[1] == 1.0


def test_a_stopped_run_counts_its_share():
    world = World("hopeless", worse=1.0, spread=1e6, caught=1.0, share=0.25, candidates=20)
    found = row(world, Statistical(RULE), 2)
    assert found.time == pytest.approx(RULE.baseline_runs + 20 * 0.25, abs=1)


def test_the_command_prints_a_table_and_json():
    arguments = ["--nights", "2", "--candidates", "5", "--jobs", "1", "--only", "noise only, machine creeps"]
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 0 and "three seeds" in shown.output
    told = CliRunner().invoke(main, [*arguments, "--json"])
    rows = json.loads(told.stdout)
    assert [r["rule"] for r in rows] == ["statistical", "naive", "three seeds"]
    exactly = CliRunner().invoke(main, [*arguments[:-2], "--world", "noise only", "--json"])
    assert {r["world"] for r in json.loads(exactly.stdout)} == {"noise only"}
    for option in ("--only", "--world"):
        refused = CliRunner().invoke(main, [option, "no such world"])
        assert refused.exit_code == 2 and "no world has" in refused.output


def test_no_rule_can_need_less_than_the_clairvoyant():
    world = World("mixed", better=0.2, gain=2.0, worse=0.75)
    bound = row(world, Clairvoyant(keep=0.85, drop=0.15), 100)
    assert bound.power > 0.88 and bound.false_share < 0.06
    found = row(world, Statistical(RULE), 6)
    assert bound.time_per_gain < found.time_per_gain
    careless = row(world, Clairvoyant(keep=0.5, drop=0.15), 100)
    assert careless.false_share > bound.false_share and careless.time_per_gain < bound.time_per_gain
