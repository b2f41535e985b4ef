"""What whole steps must move and compute (benchmarks/traffic.py): rules by hand, and a small step on a blank H100."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch

from benchmarks import blank_card, launches, memory, traffic
from benchmarks.blank_card import CARDS
from benchmarks.gpu import Order
from core.errors import UserError

RATES = traffic.Rates(bandwidth=1e12, products=1e14, attention_forward=5e13, attention_backward=4e13, launch=1e-6)


def row(**given):
    return {
        "name": "k",
        "phase": "forward",
        "kind": "products",
        "times": 1,
        "bytes": 0,
        "flops": 0,
        "shape": "",
    } | given


# --- rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "window"), [(1, 0), (7, 0), (7, 3), (7, 6), (7, 7), (64, 16)])
def test_pairs_are_those_within_the_window(length, window):
    seen = sum(0 <= i - j <= window for i in range(length) for j in range(length))
    assert launches.pairs(length, window) == seen


def test_bytes_are_of_each_element_once():
    x = torch.zeros(4, 6)
    assert launches.size(x) == 96 and launches.size(x[:, :2]) == 32
    assert launches.size(torch.zeros(6).expand(4, 6)) == 24 and launches.size(torch.zeros(0, 6)) == 0
    assert launches.moved([x, x, x.half()], [torch.zeros(5)]) == 96 + 48 + 20
    assert launches.moved([x], [x]) == 2 * 96  # in place


def test_a_launch_takes_the_longer_of_bytes_and_flops():
    assert traffic.seconds(row(bytes=10**9), RATES) == pytest.approx(1e-3 + 1e-6)
    assert traffic.seconds(row(bytes=10**9, flops=10**12), RATES) == pytest.approx(1e-2 + 1e-6)
    assert traffic.seconds(row(kind="attention backward", flops=10**12, times=3), RATES) == pytest.approx(2.5e-2 + 3e-6)


def test_a_kernel_of_which_nothing_is_known_is_an_error():
    with pytest.raises(LookupError, match=r"muon\._new is not known; say in WRITTEN"):
        launches.of_kernel("muon._new", {})


def test_what_was_not_accounted_for_ends_the_command(monkeypatch):
    last = {"missing": {"launches": 2, "products": 0}, "counted": {"launches": 9, "products": 4}}
    monkeypatch.setattr(traffic, "told", lambda *args: [row(), last])
    with pytest.raises(UserError, match=r"ours: not accounted for are \{'launches': 2, 'products': 0\} of"):
        traffic.launched("ours", Order())


def test_the_goal_is_told_with_the_rate_that_attention_needs():
    """10 ms of attention at the published rate, 80 beside it, against 115: 100 ms are left, and 20 of them for it."""
    attention = row(kind="attention forward", flops=round(0.010 * traffic.Rates().attention_forward), times=0)
    rest = row(flops=round(0.080 * traffic.Rates().products), times=0)
    upstream = row(flops=round(0.115 * traffic.Rates().products), times=0)
    rates = {"ours": traffic.Rates(), "upstream": traffic.Rates()}
    said = list(traffic.compared({"ours": [attention, rest], "upstream": [upstream]}, rates, known=0.125))
    assert said[0].startswith("upstream / ours: 1.278, both calculated")
    assert "125.0 ms; calculated are 115.0, 0.920 of it" in said[1]
    assert "100.0 ms, upstream / ours 1.250" in said[2]
    assert said[3].endswith("1.15 is missed below 0.50 of its rate")


# --- a small step on a blank H100 -----------------------------------------------------------------

SMALL = replace(Order(), rows=8, context=256, depth=2, heads=2, vocab=512, tokens=2**12)


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """All launches of ours at SMALL, of two micro-steps, and the last line."""
    if why := blank_card.obstacle():
        pytest.skip(f"no blank card here: {why}")
    module = ["-m", "benchmarks.traffic_side", "ours", json.dumps(asdict(SMALL))]
    done = blank_card.python(CARDS["h100"], module, tmp_path_factory.mktemp("blank"), timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    *rows, last = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return rows, last


@pytest.mark.slow
def test_all_that_the_card_counted_is_accounted_for(step):
    rows, last = step
    assert not any(last["missing"].values())
    assert sum(r["times"] for r in rows) == sum(last["counted"].values()) > 200
    assert {r["phase"] for r in rows} == set(traffic.PHASES)


@pytest.mark.slow
def test_the_flops_are_those_of_the_model(step):
    """6 for each weight of a matrix and token; in attention 2 products forward and 5 backward for each pair."""
    rows, _ = step
    layers, dim, tokens = SMALL.depth, SMALL.dim, SMALL.tokens
    weights = layers * 12 * dim * dim + SMALL.vocab * dim + SMALL.heads * 32  # the last layer has a gate
    trained = [r for r in rows if r["phase"] != "optimizer"]
    assert sum(r["flops"] for r in trained if "products" in r["kind"]) == 6 * weights * tokens
    seen = sum(launches.pairs(SMALL.context, window) for window in (SMALL.context // 2, SMALL.context))
    one = 2 * dim * seen * tokens // SMALL.context
    assert sum(r["flops"] for r in rows if r["kind"] == "attention forward") == 2 * one
    assert sum(r["flops"] for r in rows if r["kind"] == "attention backward") == 5 * one


@pytest.mark.slow
def test_bytes_are_what_the_kernels_touch(step):
    rows, _ = step
    N, C, V = SMALL.rows * SMALL.context, SMALL.dim, SMALL.vocab
    by_name = {r["name"]: r for r in rows}
    assert by_name["embedded_norm._forward"]["bytes"] == 4 * V * C + 8 * N + 2 * N * C
    again = 2 * (N * C + 4 * C * C + 2 * N * 4 * C) + 4 * N  # backward: dout, w2, y and r are read, r dh is written
    assert by_name["linear_relu2._by_tma"]["bytes"] == again
    assert by_name["muon._momentum"]["bytes"] >= 4 * 4 * SMALL.heads * 32  # gradient and momentum, read and written
    adam = [r for r in rows if r["name"] == "aten::_fused_adamw_"]
    heads = max(adam, key=lambda r: r["bytes"])
    assert heads["bytes"] >= 7 * 4 * V * C  # the weights and both moments are read and written, the gradient is read
    casts = {r["bytes"] for r in rows if r["name"].startswith("triton_poi_fused__to_copy_unbind")}  # of one in a stack
    assert casts == {size * (4 + 2) for size in (C * C, 4 * C * C, SMALL.heads * 32)}  # c_proj, both of the MLP, a gate


@pytest.mark.slow
def test_the_table_adds_up(step):
    rows, _ = step
    groups = traffic.grouped(rows)
    assert sum(traffic.summed(g, RATES).bytes for g in groups.values()) == traffic.summed(rows, RATES).bytes
    *lines, last = traffic.table({"ours": rows}, {"ours": RATES})
    assert len(lines) == 1 + len(groups) and last.startswith("all") and f"{sum(r['times'] for r in rows):,}" in last
    assert len(list(traffic.longest(rows, RATES, 5))) == 5


def test_both_commands_share_the_shapes_that_upstream_publishes():
    assert traffic.published is memory.published and memory.published().tokens == 2**19
