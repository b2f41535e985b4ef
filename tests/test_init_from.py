"""Taking over from an upstream clone: what is carried, what is not, and that nothing of it is run."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from console import upstream
from console.making import told
from core.errors import UserError

OURS = {
    "DEPTH": 4, "ASPECT_RATIO": 32, "MATRIX_LR": 0.04, "TOTAL_BATCH_SIZE": 4096, "WINDOW_PATTERN": "SSSL",
    "ADAM_BETAS": (0.8, 0.95), "WARMUP_RATIO": 0.1, "HEAD_DIM": 64,
}  # fmt: skip

# A file of the same make as upstream's, with the same kinds of statement.
THEIRS = '''\
"""Pretraining script."""
import os
import torch
from prepare import MAX_SEQ_LEN

open("it_was_run", "w").close()

class GPT(torch.nn.Module):
    LAYERS = 3

def norm(x):
    return x

DEPTH = 8               # layers
ASPECT_RATIO = 64
TOTAL_BATCH_SIZE = 2**19 # tokens
MATRIX_LR = 0.04
WINDOW_PATTERN = "SL"
ADAM_BETAS = (0.9, 0.95)
WARMUP_RATIO = 0
HEAD_DIM = "wide"
MODEL_DIM = DEPTH * ASPECT_RATIO
H100_BF16_PEAK_FLOPS = 989.5e12
DEVICE = torch.device("cuda")
step = 0

while True:
    step += 1
'''

RESULTS = (
    "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
    'a1b2c3d\t0.997900\t44.0\tkeep\tbaseline, with a "quote\n'
    "b2c3d4e\t0.000000\t0.0\tcrash\tdouble width (OOM)\n"
    "c3d4e5f\tnot a number\t44.0\tdiscard\ttypo in the file\n"
)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "fork"
    folder.mkdir()
    (folder / "train.py").write_text(THEIRS)
    (folder / "results.tsv").write_text(RESULTS)
    (folder / "program.md").write_text("# mine\n")
    return folder


def test_constants_of_the_same_name_and_kind_are_carried(clone: Path) -> None:
    found = upstream.read(clone, OURS)
    assert found.constants == {
        "DEPTH": 8, "ASPECT_RATIO": 64, "TOTAL_BATCH_SIZE": 2**19, "WINDOW_PATTERN": "SL", "ADAM_BETAS": (0.9, 0.95),
        "WARMUP_RATIO": 0,
    }  # fmt: skip
    assert found.same == ["MATRIX_LR"]
    assert found.mismatched == {"HEAD_DIM": "wide"}
    assert found.unknown == {"MODEL_DIM": 512, "H100_BF16_PEAK_FLOPS": 989.5e12}
    assert found.unread == ["DEVICE"]


def test_code_is_listed_as_not_carried_and_never_run(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clone)
    found = upstream.read(clone, OURS)
    assert found.not_carried == ["class GPT (line 8)", "function norm (line 11)", "while block (lines 27-28)"]
    assert not (clone / "it_was_run").exists()
    text = "\n".join(told(found))
    for words in ("DEPTH = 8", "class GPT", "HEAD_DIM", "DEVICE", "never a score", "program.md is kept"):
        assert words in text


def test_history_has_no_number_for_a_crash(clone: Path) -> None:
    found = upstream.read(clone, OURS)
    assert [past["claimed_bpb"] for past in found.history] == [0.9979, None, None]
    assert [past["status"] for past in found.history] == ["keep", "crash", "discard"]
    assert found.history[0]["description"] == 'baseline, with a "quote'
    assert not any("val_bpb" in past for past in found.history)  # nothing that could be taken for a score
    assert found.program == "# mine\n"


def test_a_clone_without_history_and_program_is_fine(clone: Path) -> None:
    (clone / "results.tsv").unlink()
    (clone / "program.md").unlink()
    found = upstream.read(clone, OURS)
    assert found.history == [] and found.program is None
    assert "ours is used" in "\n".join(told(found))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda d: (d / "train.py").unlink(), "holds no train.py"),
        (lambda d: (d / "train.py").write_text("def (:"), "not valid Python"),
        (lambda d: (d / "train.py").write_bytes(b"X = 1\n\xff\xfe"), "not UTF-8"),
        (lambda d: (d / "train.py").write_bytes(b"X = 1\0"), "not valid Python"),
        (lambda d: (d / "train.py").write_bytes(b"#" * (upstream.MOST_BYTES + 1)), "bytes, more than"),
        (lambda d: (d / "results.tsv").write_text("a,b\n1,2\n"), "upstream's columns"),
        (lambda d: (d / "program.md").write_bytes(b"\xff"), "not UTF-8"),
    ],
)
def test_spoiled_clones_give_one_clear_error(clone: Path, spoil, says: str) -> None:  # type: ignore[no-untyped-def]
    spoil(clone)
    with pytest.raises(UserError, match=says):
        upstream.read(clone, OURS)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        upstream.read(tmp_path / "nowhere", OURS)


@pytest.mark.parametrize(
    "text",
    ["9**9**9", "2**-100000", "10**400", "'a' * 10**9", "(1,) * 9", "1/0", "(-8) ** 0.5", "f()", "x", "[i for i in y]",
     "__import__('os')", "1 if 2 else 3", "b'x'", "1j", "True + 1"],
)  # fmt: skip
def test_expressions_that_are_not_simple_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        upstream.evaluate(ast.parse(text, mode="eval").body, {})


numbers = st.one_of(st.integers(-999, 999), st.floats(-1e3, 1e3, allow_nan=False).map(lambda x: round(x, 3)))


@given(numbers, numbers, st.sampled_from(["+", "-", "*", "//", "/", "%"]))
def test_arithmetic_is_pythons(left: float, right: float, op: str) -> None:
    text = f"({left}) {op} ({right})"
    node = ast.parse(text, mode="eval").body
    if right == 0 and op in "//%":
        with pytest.raises(ValueError):
            upstream.evaluate(node, {})
    else:
        assert upstream.evaluate(node, {}) == eval(text)


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        values, _ = upstream.read_constants(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    assert all(name.isupper() for name in values)
