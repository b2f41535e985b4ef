"""Constants of a recipe: reading ranges, replacing values without touching anything else, comparing files."""

from __future__ import annotations

import keyword
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from core.errors import UserError
from core.recipe import Choices, Range, constants, fingerprint, replace
from core.size import syntax_tokens

SOURCE = '''"""A recipe. DEPTH = 99 in a docstring is no constant."""
import math

DEPTH = 4  # search: 2..12
MATRIX_LR = 0.04  # for the matrices; search: 0.005..0.2 log
TOTAL_BATCH_SIZE = 2**14  # search: 2**10..2**16 pow2; tokens in one optimizer step
WINDOW_PATTERN = "SSSL"  # search: SL | SSL | SSSL | L  S: half the context; L: all of it
BETAS = (0.8, 0.95)  # search: (0.8, 0.95) | (0.9, 0.95)
NAME: str = "größe"; COUNT = 3
HIDDEN = DEPTH * 64
lower = 5
LOOSE = 1
LOOSE += 1
if DEPTH > 3:
    BRANCH = 1
TABLE = [
    1,  # one
    2,
]


def build(spec):
    LOCAL = 7
    return math.sqrt(LOCAL)
'''


def test_reads_values_ranges_and_comments():
    found = constants(SOURCE)
    assert list(found) == [
        "DEPTH",
        "MATRIX_LR",
        "TOTAL_BATCH_SIZE",
        "WINDOW_PATTERN",
        "BETAS",
        "NAME",
        "COUNT",
        "TABLE",
    ]
    assert found["DEPTH"].search == Range(2, 12, "linear", True)
    assert found["DEPTH"].line == 4
    assert found["MATRIX_LR"].search == Range(0.005, 0.2, "log", False)
    assert found["MATRIX_LR"].comment == "for the matrices; search: 0.005..0.2 log"
    assert found["TOTAL_BATCH_SIZE"].value == 16384
    assert found["TOTAL_BATCH_SIZE"].search == Range(1024, 65536, "pow2", True)
    assert found["WINDOW_PATTERN"].search == Choices(("SL", "SSL", "SSSL", "L"))
    assert found["BETAS"].search == Choices(((0.8, 0.95), (0.9, 0.95)))
    assert found["NAME"].search is None
    assert found["TABLE"].value == [1, 2]


def test_replace_keeps_layout_comments_and_style():
    new = {"DEPTH": 6, "TOTAL_BATCH_SIZE": 2**15, "MATRIX_LR": 1, "WINDOW_PATTERN": "L", "COUNT": -2, "NAME": "ß"}
    changed = replace(SOURCE, new)
    expected = (
        SOURCE.replace("DEPTH = 4 ", "DEPTH = 6 ")
        .replace("2**14 ", "2**15 ")
        .replace("= 0.04 ", "= 1.0 ")
        .replace('= "SSSL"', '= "L"')
        .replace('"größe"; COUNT = 3', '"ß"; COUNT = -2')
    )
    assert changed == expected


def test_replace_keeps_windows_line_ends():
    source = SOURCE.replace("\n", "\r\n")
    assert replace(source, {"BETAS": (0.9, 0.95)}) == source.replace("BETAS = (0.8,", "BETAS = (0.9,")


def test_a_byte_order_mark_is_kept():
    assert replace("\ufeff" + SOURCE, {"DEPTH": 6}) == "\ufeff" + replace(SOURCE, {"DEPTH": 6})


def test_replace_spans_lines():
    assert constants(replace(SOURCE, {"TABLE": [3, 4, 5]}))["TABLE"].value == [3, 4, 5]


def test_unknown_constant_names_the_known_ones():
    with pytest.raises(UserError, match=r"no constant WIDTH; known are: DEPTH, MATRIX_LR"):
        replace(SOURCE, {"WIDTH": 1})


@pytest.mark.parametrize("value", [math.nan, math.inf, {"a": 1}, object()])
def test_value_without_a_literal_is_refused(value):
    with pytest.raises(UserError, match="COUNT"):
        replace(SOURCE, {"COUNT": value})


@pytest.mark.parametrize(
    ("comment", "value"),
    [
        ("search: 5", "3"),
        ("search:", "3"),
        ("search: 2..12 layers", "3"),
        ("search: 9..2", "3"),
        ("search: 0..4 log", "3"),
        ("search: 2..12 pow2", "4"),
        ("search: 1..2 cubic", "1"),
        ("search: a..b", "1"),
        ("search: x | y", "1"),
        ("search: A | A", "'A'"),
        ("search: 10**10**10..1", "1"),
        ("search: 1/0..1", "1"),
    ],
)
def test_a_broken_range_is_reported_and_not_searched(comment, value):
    found = constants(f"A = {value}  # {comment}\n")["A"]
    assert found.search is None
    assert "search" in found.problem


@pytest.mark.parametrize("source", ["A = (", "A = 1\0", "\tA = 1\n  B = 2", "A = " + "(" * 5000])
def test_no_python_is_a_clear_error(source):
    with pytest.raises(UserError, match=r"train\.py"):
        constants(source)
    assert len(fingerprint(source.encode())) == 16


def test_a_name_that_is_bound_twice_is_no_constant():
    source = "A = 1\nB = 2\nC = 3\nfor B in (): pass\ndef f():\n    global C\n    C = 4\n"
    assert list(constants(source)) == ["A"]


def test_fingerprint_ignores_comments_docstrings_and_layout_only():
    same = '"""Another."""\n' + SOURCE.split("\n", 1)[1].replace("  # search: 2..12", "").replace(
        "(0.8, 0.95)  #", "(0.8,0.95) #"
    )
    assert fingerprint(same.encode()) == fingerprint(SOURCE.encode())
    assert syntax_tokens(same.encode()) == syntax_tokens(SOURCE.encode())
    for old, new in [
        ("= 4 ", "= 5 "),
        ("0.04", "4e-3"),
        ("SSSL", "SSL"),
        ("LOCAL = 7", "LOCAL = 7.0"),
        ("build", "make"),
    ]:
        assert fingerprint(SOURCE.replace(old, new, 1).encode()) != fingerprint(SOURCE.encode())


def test_fingerprint_tells_structures_apart():
    sources = [
        "f(a, b)",
        "f(a)(b)",
        "f(a, *b)",
        "f((a, b))",
        "f([a, b])",
        "a = b = c",
        "(a, b), c",
        "a, (b, c)",
        "a, b, c",
    ]
    sources += [
        "if a:\n  b\nelse:\n  c",
        "if a:\n  b\nc",
        "if a:\n  b\n  c",
        "x[a:b]",
        "x[a::b]",
        "x[::a]",
        "'a'",
        "a",
        "None",
    ]
    assert len({fingerprint(s.encode()) for s in sources}) == len(sources)


def test_tokens_counts_code():
    assert syntax_tokens(b"A = 1\n") < syntax_tokens(b"A = 1\nB = 2\n")
    assert syntax_tokens(b"A = 1  # a comment\n") == syntax_tokens(b"A = 1\n")


names = st.from_regex(r"[A-Z][A-Z0-9_]{0,8}", fullmatch=True).filter(lambda n: not keyword.iskeyword(n))
numbers = st.one_of(st.integers(-(10**12), 10**12), st.floats(allow_nan=False, allow_infinity=False), st.booleans())
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
literals = st.one_of(numbers, texts, st.none(), st.lists(st.one_of(numbers, texts), max_size=3).map(tuple))
comments = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=20)


@given(st.dictionaries(names, st.tuples(literals, literals, comments), min_size=1, max_size=5))
def test_replacing_changes_the_values_and_nothing_else(table):
    source = "".join(f"{name} = {old!r}  # {comment}\n" for name, (old, _, comment) in table.items())
    before = constants(source)
    assert {n: c.value for n, c in before.items()} == {n: old for n, (old, _, _) in table.items()}
    changed = replace(source, {name: new for name, (_, new, _) in table.items()})
    after = constants(changed)
    assert list(after) == list(table)
    for name, (old, new, _) in table.items():
        if isinstance(old, float) and type(new) is int:
            new = float(new)
        assert repr(after[name].value) == repr(new)
        assert after[name].comment == before[name].comment
        assert after[name].line == before[name].line
    assert replace(changed, {n: c.value for n, c in after.items()}) == changed
    back = replace(changed, {n: old for n, (old, _, _) in table.items()})
    assert {n: c.value for n, c in constants(back).items()} == {n: c.value for n, c in before.items()}


@given(st.text(max_size=60))
@example("\rà")
@example("A = 1  # search: 1..2\rB = 2  # à\r")
def test_any_text_is_read_or_refused_clearly(text):
    fingerprint(text.encode("utf-8", "surrogatepass"))
    try:
        constants(text)
    except UserError:
        return
    assert replace(text, {}) == text


@given(st.text("0123456789.*-+/()|abLS log", max_size=20))
def test_any_range_is_read_or_reported(text):
    found = constants(f"A = 4  # search: {text}\n")["A"]
    if found.search is not None and isinstance(found.search, Range):
        assert found.search.low < found.search.high
