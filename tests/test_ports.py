"""`benchmarks.ports`: the RTX recipe against the usual path of ports, on a card that is not there."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from benchmarks import blank_card, launches, ports, traffic  # noqa: E402 - after the skips
from benchmarks.gpu_rtx import Shape  # noqa: E402
from core.errors import UserError  # noqa: E402
from core.paths import project_root  # noqa: E402

# --- rules ----------------------------------------------------------------------------------------


def launch(**given):
    return {
        "name": "k",
        "phase": "forward",
        "kind": "products",
        "times": 0,
        "bytes": 0,
        "flops": 0,
        "shape": "",
    } | given


def test_speed_and_memory_are_told_of_each_side_beside_the_ports():
    at = ports.Rates(1e12, 1e13, 1e13, 1e13)
    sides = {
        "nothing": ([launch(flops=10**11)], {"allocated": 600.0}),  # 10 ms
        "ports": ([launch(flops=10**11), launch(bytes=15 * 10**9)], {"allocated": 1000.0}),  # and 15
    }
    head, ours, theirs, goals = ports.table(sides, at)
    assert ours.split() == ["nothing", "600", "0.600", "0", "0.0", "0.10", "10.0", "2.50x"]
    assert theirs.split() == ["ports", "1,000", "1.000", "0", "15.0", "0.10", "25.0", "1.00x"]
    assert goals == "the goals are 2x the speed and 0.6 of the memory" and "of ports" in head
    assert ports.as_json(sides, at)["ports"]["seconds"] == pytest.approx(0.025)


def test_rates_are_shares_of_what_is_known_of_the_card():
    at = ports.rates("4090", 0.5, 0.7)
    assert at.bandwidth == pytest.approx(0.7 * 1008e9)
    assert at.products == at.attention_forward == at.attention_backward == pytest.approx(0.5 * 512 * 128 * 2520e6)
    with pytest.raises(UserError, match="nothing is known of the speed of NVIDIA H100"):
        ports.rates("h100", 0.5, 0.7)


def test_a_launch_that_nobody_told_of_ends_the_command(monkeypatch, capsys):
    last = {"missing": {"launches": 1}, "counted": {"launches": 9}}
    monkeypatch.setattr(traffic, "told", lambda *given: [launch(), last])
    with pytest.raises(SystemExit) as ended:
        ports.main([])
    assert "nothing: not accounted for are {'launches': 1} of {'launches': 9}" in str(ended.value.code)


def test_a_mask_spares_no_pair_and_causality_does():
    q, k, forward = (
        torch.zeros(2, 3, 8, 4),
        torch.zeros(2, 3, 12, 4),
        torch.ops.aten._scaled_dot_product_efficient_attention,
    )
    flops = launches.efficient_flops
    assert flops(forward.default, (q, k, k, None, True), 2) == 2 * 2 * 4 * 2 * 3 * 8 * 12
    assert flops(forward.default, (q, q, q, None, True, 0.0, True), 2) == 2 * 2 * 4 * 2 * 3 * (8 * 9 // 2)
    backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default
    assert flops(backward, (q, q, k, k, None), 5) == 2 * 5 * 4 * 2 * 3 * 8 * 12


def test_the_mix_is_the_first_that_is_within_the_goal(monkeypatch):
    """As few layers as that takes, by the memory model first and then by what the allocator says."""
    shape = Shape()
    held = {"nothing": 3555.0, "hidden": 2593.0, "layer": 1417.0}
    first, *others = ports.enough(shape, held, 3241.0)
    assert [first, *others] == [f"nothing+{more}" for more in range(3, 8)]
    for goal, names in ((3600.0, []), (2700.0, ["nothing+7"]), (2600.0, []), (2000.0, ["hidden+4"]), (1000.0, [])):
        assert list(ports.enough(shape, held, goal))[:1] == names
    asked = []

    def side(name, shape, card, clone=""):
        asked.append(name)
        known = {**held, "ports": 9000.0, "clone": 5401.0, "nothing+3": 3300.0, "nothing+4": 3200.0}
        return [], {"allocated": known[name]}

    monkeypatch.setattr(ports, "side", side)
    found = ports.measured(shape, "4060", "somewhere")
    assert list(found) == ["nothing", "nothing+4", "hidden", "layer", "ports", "clone"]
    assert asked[-2:] == ["nothing+3", "nothing+4"]
    assert ports.constants_of("hidden+2") == {"RECOMPUTE": "hidden", "RECOMPUTE_MORE": 2}
    assert ports.constants_of("layer") == {"RECOMPUTE": "layer", "RECOMPUTE_MORE": 0}


# --- small steps on a blank RTX 4060 --------------------------------------------------------------

SMALL = replace(Shape(), depth=2, context=256, vocab=512, tokens=8 * 256, rows=4)


@pytest.mark.slow
def test_memory_and_flops_are_those_of_the_model_and_of_what_is_made_again():
    """In products 6 for each weight and token; on the ports' side 8 in layers, whose forward is made twice but for its
    last product, which no backward asks for; of ours the MLP's first is, or a whole layer as theirs. In attention ours
    has the window's pairs, theirs all of them."""
    if why := blank_card.obstacle():
        pytest.skip(f"no blank card here: {why}")
    sides = {name: ports.side(name, SMALL, "4060") for name in ("nothing", "nothing+1", "hidden", "layer", "ports")}
    held = {name: last["allocated"] for name, (_, last) in sides.items()}
    assert 0 < held["hidden"] < held["nothing+1"] < held["nothing"]
    assert all(not any(last["missing"].values()) for _, last in sides.values())
    shares = {name: f"{held[name] / held['ports']:.3f}" for name in sides}
    told = list(ports.table(sides, ports.rates("4060", 0.5, 0.7)))
    assert [line.split()[2] for line in told[1:-1]] == [*shares.values()]
    dim, tokens, depth = SMALL.depth * SMALL.ratio, SMALL.tokens, SMALL.depth
    gates = 2 * 32  # of the last layer: heads by channels
    layers, head = depth * 12 * dim * dim + gates, SMALL.vocab * dim

    def flops(side, kinds):
        rows = [r for r in sides[side][0] if r["phase"] != "optimizer"]
        return sum(r["flops"] for r in rows if r["kind"] in kinds)

    products = ("products", "products in Triton")
    assert flops("nothing", products) == 6 * (layers + head) * tokens
    assert flops("hidden", products) == (6 * (layers + head) + 2 * depth * 4 * dim * dim) * tokens
    assert flops("nothing+1", products) == (6 * (layers + head) + 2 * 4 * dim * dim) * tokens
    assert flops("layer", products) == (8 * layers - 2 * depth * 4 * dim * dim + 6 * head) * tokens
    assert flops("ports", products) == flops("layer", products)
    seen = sum(launches.pairs(SMALL.context, window) for window in (SMALL.context // 2, SMALL.context))
    rows = tokens // SMALL.context
    for kind, count in (("attention forward", 2), ("attention backward", 5)):
        assert flops("nothing", (kind,)) == 2 * count * dim * rows * seen
        again = 2 if kind == "attention forward" else 1
        assert flops("ports", (kind,)) == again * 2 * count * dim * rows * depth * SMALL.context**2


def test_the_command_tells_its_options():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.ports", "--help"],
        cwd=project_root(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "NOT MEASURED" in done.stdout and "--card" in done.stdout and "h100" not in done.stdout.split("--rows")[0]
