"""The built-in search on made-up objectives: it learns, repeats nothing, and the same past gives the same answer."""

from __future__ import annotations

import itertools
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import researchers
from core.contract import Exhausted, Past, Proposal, View
from core.errors import UserError
from core.recipe import Choices, Range, constants, fingerprint, replace
from researchers.search import Search
from researchers.space import Dim, dims
from researchers.structural import edits
from researchers.study import Trial, aligned

RECIPE = """
DEPTH = 4  # search: 2..12
ASPECT_RATIO = 32  # search: 16..96
HEAD_DIM = 32  # search: 16 | 32 | 64
WINDOW_PATTERN = "SSSL"  # search: L | SL | SSL | SSSL
TOTAL_BATCH_SIZE = 2**13  # search: 2**10..2**16 pow2
DEVICE_BATCH_SIZE = 16
MATRIX_LR = 0.04  # search: 0.005..0.2 log
EMBEDDING_LR = 0.6  # search: 0.05..2.0 log
WEIGHT_DECAY = 0.2  # search: 0.0..0.5
WARMDOWN_RATIO = 0.5  # search: 0.1..0.9
FINAL_LR_FRAC = 0.0  # search: 0.0..0.2


def build(spec):
    return DEPTH
"""


@dataclass
class Night:
    """A lab in miniature: a surface instead of training, and the verdict of the loop."""

    score: Callable[[dict], float | None]  # None: crash
    source: bytes = RECIPE.encode()
    noise: float = 0.002
    seed: int = 0
    past: list[Past] = field(default_factory=list)
    best: bytes = b""
    best_bpb: float = math.inf

    def __post_init__(self):
        self.rng = np.random.default_rng(self.seed)
        self.judge(Proposal(self.source, "baseline"))

    def view(self) -> View:
        return View("", self.best, self.best_bpb, tuple(self.past), {}, {"sequence_len": 256})

    def judge(self, proposal: Proposal) -> Past:
        values = {name: c.value for name, c in constants(proposal.source.decode()).items()}
        true = self.score(values)
        measured = None if true is None else true + self.rng.normal() * self.noise
        status = "crash" if measured is None else "keep" if measured < self.best_bpb - 0.001 else "discard"
        if status == "keep":
            self.best, self.best_bpb = proposal.source, measured
        number = len(self.past) + 1
        done = Past(number, status, measured, proposal.description, proposal.source, "", "", proposal.detail, {})
        self.past.append(done)
        return done

    def run(self, researcher, experiments):
        for _ in range(experiments):
            self.judge(researcher.propose(self.view()))
        return self.score({name: c.value for name, c in constants(self.best.decode()).items()})


class RandomSearch:
    """The peer: any point of the space, uniform on each constant's scale."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def propose(self, view):
        source = view.best_source.decode()
        values = {}
        for dim in dims(constants(source)):
            unit = self.rng.random() if dim.ordered else int(self.rng.integers(dim.size()))
            values[dim.name] = dim.value(unit)
        return Proposal(replace(source, values).encode(), "random")


def surface(seed):
    """A bowl with its own optimum, weights and interactions; deep models run out of memory."""
    rng = np.random.default_rng(seed)
    space = dims(constants(RECIPE))
    start = {name: c.value for name, c in constants(RECIPE).items()}
    ordered = [d for d in space if d.ordered]
    best = {d.name: float(np.clip(d.unit(start[d.name]) + rng.normal() * 0.25, 0.05, 0.95)) for d in ordered}
    weight = {d.name: float(np.exp(rng.normal(-2.5, 1.2))) for d in ordered}
    offsets = {d.name: np.abs(rng.normal(0, 0.01, d.size())) for d in space if not d.ordered}
    pairs = [(*rng.choice([d.name for d in ordered], 2, replace=False), rng.normal() * 0.4) for _ in range(4)]

    def score(values):
        if values["DEPTH"] >= 9:
            return None
        far = {d.name: d.unit(values.get(d.name, start[d.name])) - best[d.name] for d in ordered}
        total = 1.5 + sum(weight[n] * x * x for n, x in far.items())
        total += sum(c * math.sqrt(weight[a] * weight[b]) * far[a] * far[b] for a, b, c in pairs)
        return total + sum(off[int(Dim(n, constants(RECIPE)[n].search).unit(values[n]))] for n, off in offsets.items())

    return score


def test_it_beats_random_search_in_a_night_of_sixty():
    gains, peer = [], []
    for seed in range(8):
        start = surface(seed)({name: c.value for name, c in constants(RECIPE).items()})
        gains.append(start - Night(surface(seed), seed=seed).run(Search(seed=seed), 60))
        peer.append(start - Night(surface(seed), seed=seed).run(RandomSearch(seed), 60))
    assert statistics.mean(gains) > 1.5 * statistics.mean(peer)
    assert sum(a >= b for a, b in zip(gains, peer, strict=True)) >= 6
    assert all(gain > -0.01 for gain in gains)


def test_no_file_is_proposed_twice_and_every_proposal_is_told():
    night = Night(surface(3))
    night.run(Search(), 60)
    prints = [fingerprint(p.source) for p in night.past]
    assert len(set(prints)) == len(prints)
    kinds = {p.detail["kind"] for p in night.past[1:]}
    assert kinds >= {"move", "tpe", "structural"}
    for p in night.past[1:]:
        assert "\n" not in p.description
        assert len(p.description) < 400
        assert " -> " in p.description
        assert ": " in p.description
        for name, (old, new) in p.detail["changed"].items():
            assert name in p.description
            assert old != new


def test_values_stay_within_their_ranges_and_comments_stay():
    night = Night(surface(4))
    night.run(Search(), 60)
    for p in night.past:
        for name, constant in constants(p.source.decode()).items():
            assert constant.search is None or constant.search.contains(constant.value), name
            assert constant.search == constants(RECIPE)[name].search
        batch = constants(p.source.decode())
        assert batch["TOTAL_BATCH_SIZE"].value >= 1024


def test_most_proposals_change_one_to_three_constants():
    night = Night(surface(5))
    night.run(Search(), 40)
    assert all(1 <= len(p.detail["changed"]) <= 3 for p in night.past[1:] if p.detail["kind"] != "structural")


def test_the_same_past_and_seed_give_the_same_proposal():
    night = Night(surface(1))
    night.run(Search(seed=7), 20)
    view = night.view()
    again = Search(seed=7)
    first = again.propose(view)
    assert again.propose(view) == first == Search(seed=7).propose(view)
    assert Search(seed=8).propose(view).source != first.source


def test_a_night_that_was_cut_in_two_goes_the_same_way():
    whole = Night(surface(2), noise=0)
    whole.run(Search(seed=1), 30)
    cut = Night(surface(2), noise=0)
    cut.run(Search(seed=1), 13)
    cut.run(Search(seed=1), 17)
    assert [p.source for p in cut.past] == [p.source for p in whole.past]


@pytest.mark.parametrize("status", ["crash", "timeout", "invalid"])
def test_where_a_constant_failed_it_goes_no_further(status):
    source = b"DEPTH = 4  # search: 2..64\nRATE = 0.1  # search: 0.01..1.0 log\n"
    night = Night(lambda v: 1.0 + abs(math.log(v["RATE"] / 0.3)), source=source)
    tried = replace(source.decode(), {"DEPTH": 6}).encode()
    night.past.append(Past(2, status, None, "deeper", tried, "out of memory", "", {}, {}))
    proposals = []
    for _ in range(25):
        done = night.judge(Search().propose(night.view()))
        proposals.append(done)
    moved = [p for p in proposals if p.detail["kind"] == "move"]
    assert moved
    assert all(constants(p.source.decode())["DEPTH"].value < 6 for p in moved)


@pytest.mark.parametrize("tainted", [False, True])
def test_a_loss_is_learned_from_unless_its_measurement_was_disturbed(tainted):
    source = b"".join(b"RATE%d = 0.1  # search: 0.001..10.0 log\n" % i for i in range(3))

    def proposals(loss: float) -> list[bytes]:
        night = Night(lambda v: 1.0, source=source)
        for i, rate in itertools.product(range(3), (0.03, 0.3)):
            tried = replace(source.decode(), {f"RATE{i}": rate}).encode()
            score = loss if rate > 0.1 else 1.01
            night.past.append(Past(len(night.past) + 1, "discard", score, "", tried, "", "", {}, {}, tainted))
        return [Search(seed=seed).propose(night.view()).source for seed in range(20)]

    assert (proposals(1.001) == proposals(5.0)) == tainted


def test_a_win_is_followed_up():
    source = b"".join(b"RATE%d = 0.1  # search: 0.001..10.0 log\n" % i for i in range(6))
    night = Night(lambda v: 2.0 - 0.1 * math.log(v["RATE3"]), source=source, noise=0.0)
    night.run(Search(), 25)
    best = constants(night.best.decode())
    assert best["RATE3"].value > 1.0
    assert any("higher won" in p.description for p in night.past)


def test_it_learns_from_experiments_of_others():
    source = b"".join(b"RATE%d = 0.1  # search: 0.001..10.0 log\n" % i for i in range(6))
    night = Night(lambda v: 2.0 - 0.1 * math.log(v["RATE3"]), source=source, noise=0.0)
    for value in (0.15, 0.2, 0.3):
        night.judge(Proposal(replace(night.best.decode(), {"RATE3": value}).encode(), "by hand"))
    hits = 0
    for seed in range(20):
        changed = Search(seed=seed).propose(night.view()).detail["changed"]
        hits += "RATE3" in changed and changed["RATE3"][1] > changed["RATE3"][0]
    assert hits >= 8


def test_broken_files_of_others_are_survived():
    night = Night(surface(0))
    for junk in (b"def (", b"\xff\xfe\0", b"", b"DEPTH = 'four'  # search: 2..12"):
        night.past.append(Past(len(night.past) + 1, "crash", None, "broken", junk, "", "", {}, {}))
    night.past.append(Past(99, "keep", math.nan, "odd", RECIPE.encode() + b"#", "", "", {}, {}))
    for _ in range(5):
        night.judge(Search().propose(night.view()))


def test_code_that_changed_starts_a_new_study_with_shifted_scores():
    old, new = {"A": 1.0}, {"A": 2.0}
    trials = [
        Trial(1, old, "code1", 1.50, 0.0, old, "code1"),
        Trial(2, new, "code1", 1.45, 0.05, old, "code1"),
        Trial(3, new, "code2", 1.35, 0.10, new, "code1"),  # the code alone changed: 0.10 better
        Trial(4, {"A": 3.0}, "code2", None, None, new, "code2"),
        Trial(5, new, "code3", 1.9, -0.55, old, "code2"),  # not the code alone: taken as it is
    ]
    known = aligned(trials, "code2")
    assert [round(score, 6) for _, score in known[:3]] == [1.40, 1.35, 1.35]
    assert known[3][1] > max(score for _, score in known if score != known[3][1])
    assert known[4][1] == 1.9
    assert aligned([], "code2") == []


def test_a_new_constant_and_a_renamed_one_are_taken_up():
    night = Night(surface(6))
    night.run(Search(), 15)
    changed = night.best.decode().replace("FINAL_LR_FRAC", "LAST_LR_FRAC") + "\nMOMENTUM = 0.9  # search: 0.8..0.99\n"
    night.judge(Proposal(changed.encode(), "another optimizer"))
    night.best, night.best_bpb = changed.encode(), night.best_bpb - 0.1
    seen = set()
    for _ in range(40):
        seen |= set(night.judge(Search().propose(night.view())).detail["changed"])
    assert {"MOMENTUM", "LAST_LR_FRAC"} <= seen


def test_it_ends_when_nothing_is_left():
    source = b"DEPTH = 4  # search: 2..5\nPATTERN = 'L'  # search: L | SL\n"
    night = Night(lambda v: 1.0 + 0.1 * v["DEPTH"], source=source, noise=0.0)
    with pytest.raises(Exhausted, match="2 constants were tried"):
        night.run(Search(), 100)
    assert len(night.past) == 8


def test_a_recipe_without_ranges_is_told():
    with pytest.raises(Exhausted, match="no constant with a `# search:` range"):
        Night(lambda v: 1.0, source=b"RATE = 0.1\n").run(Search(), 1)


def test_an_aspect_ratio_that_rounds_to_the_same_width_is_no_new_file():
    source = b"DEPTH = 4\nHEAD_DIM = 128\nASPECT_RATIO = 32  # search: 16..40\nRATE = 0.1  # search: 0.01..1.0 log\n"
    night = Night(lambda v: 1.0, source=source, noise=0.0)
    night.run(Search(), 40)
    alone = [p for p in night.past[1:] if set(p.detail["changed"]) == {"ASPECT_RATIO"}]
    assert all(p.detail["changed"]["ASPECT_RATIO"][1] > 32 for p in alone)
    assert len(alone) <= 1


def test_structural_edits_keep_the_parameters():
    found = constants(RECIPE)
    made = edits(found, 256)
    assert made
    shapes = [e.values for e in made if "ASPECT_RATIO" in e.values]
    assert {v["DEPTH"] for v in shapes} == {2, 3, 5, 6}
    for values in shapes:
        dim = math.ceil(values["DEPTH"] * values["ASPECT_RATIO"] / 32) * 32
        assert 0.7 < values["DEPTH"] * dim**2 / (4 * 128**2) < 1.4
    halved = next(e.values for e in made if e.values.get("TOTAL_BATCH_SIZE") == 2**12)
    assert halved["MATRIX_LR"] == pytest.approx(0.04 / math.sqrt(2), rel=0.01)
    for values in (e.values for e in made if "TOTAL_BATCH_SIZE" in e.values):
        device = values.get("DEVICE_BATCH_SIZE", 16)
        assert values["TOTAL_BATCH_SIZE"] % (device * 256) == 0
    assert {e.values["WINDOW_PATTERN"] for e in made if "WINDOW_PATTERN" in e.values} == {"L", "SL", "SSL"}
    assert {e.values["HEAD_DIM"] for e in made if "HEAD_DIM" in e.values} == {16, 64}
    assert edits(constants("RATE = 0.1"), 256) == []


ranges = st.one_of(
    st.tuples(st.integers(-50, 50), st.integers(1, 100)).map(lambda t: Range(t[0], t[0] + t[1], "linear", True)),
    st.tuples(st.integers(0, 12), st.integers(1, 8)).map(lambda t: Range(2 ** t[0], 2 ** (t[0] + t[1]), "pow2", True)),
    st.tuples(st.floats(1e-6, 10), st.floats(1.1, 1e4)).map(lambda t: Range(t[0], t[0] * t[1], "log")),
    st.tuples(st.floats(-10, 10), st.floats(1e-4, 1e3)).map(lambda t: Range(t[0], t[0] + t[1])),
    st.tuples(st.integers(1, 50), st.integers(1, 100)).map(lambda t: Range(t[0], t[0] + t[1], "log", True)),
)


@given(ranges, st.floats(0, 1), st.floats(-1, 1))
def test_coordinates_stay_within_the_range(search, unit, step):
    dim = Dim("X", search)
    value = dim.value(unit)
    assert search.contains(value)
    assert -1e-9 <= dim.unit(value) <= 1 + 1e-9
    if search.integer:
        assert isinstance(value, int)
        assert dim.value(dim.unit(value)) == value
    moved = dim.moved(value, step)
    if moved is not None:
        assert search.contains(moved)
        assert moved != value
        assert (moved > value) == (step > 0) or step == 0


@given(st.lists(st.integers(), min_size=2, max_size=5, unique=True))
def test_choices_have_indices(values):
    dim = Dim("X", Choices(tuple(values)))
    assert [dim.value(dim.unit(v)) for v in values] == values
    assert dim.unit("none of them") == -1


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_mix_of_constants_is_searched(data):
    lines = []
    for i in range(data.draw(st.integers(1, 4))):
        search = data.draw(ranges)
        value = Dim("X", search).value(data.draw(st.floats(0, 1)))
        scale = "" if search.scale == "linear" else f" {search.scale}"
        lines.append(f"C{i} = {value!r}  # search: {search.low!r}..{search.high!r}{scale}\n")
    night = Night(lambda v: 1.0 + data.draw(st.floats(0, 1)), source="".join(lines).encode())
    try:
        night.run(Search(), 16)
    except Exhausted:
        pass
    prints = {fingerprint(p.source) for p in night.past}
    assert len(prints) == len(night.past)


# --- researchers by name -----------------------------------------------------------------------


def test_researchers_are_made_by_name_or_place():
    assert researchers.names()[:2] == ["search", "claude"]
    assert researchers.make("search", seed=3) == Search(seed=3)
    assert researchers.make("researchers.search:Search").name == "search"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("serch", {}, r"no researcher 'serch'; known are: search"),
        ("search", {"model": "x"}, r"--model does not apply to researcher search"),
        ("no_such_module_x:Thing", {}, r"No module named 'no_such_module_x'"),
        ("researchers.search:Thing", {}, r"Thing"),
    ],
)
def test_unknown_researchers_and_options_are_named(name, options, message):
    with pytest.raises(UserError, match=message):
        researchers.make(name, **options)


def test_optuna_is_loaded_only_when_it_is_asked():
    code = "import sys, researchers; researchers.make('search');"
    code += "print({'optuna', 'torch', 'anthropic'} & set(sys.modules))"
    root = str(Path(researchers.__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "set()"


def test_nothing_is_printed(capfd):
    night = Night(surface(0))
    night.run(Search(), 16)
    assert capfd.readouterr() == ("", "")
