"""Tokenizer, data sets on disk and the stream of training rows."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.loader import compare, packing
from core.data import Dataset, TokenStream, token_dtype
from core.errors import DataError, UserError
from core.stream import Schedule, Text
from core.tokenizer import PIECE, Tokenizer, pieces, train
from prepare import main as prepare_main
from prepare import prepare

WORDS = [a + b + c for a in ("be", "sha", "tu", "the") for b in ("", "na", "ro", "ki") for c in ("l", "n", "ing", "st")]
WORDS += ["1984", "—", "naïve", "東京", "🙂\n"]
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)


def make_text(count: int, seed: int = 1) -> str:
    """Paragraphs of common words."""
    rng = np.random.default_rng(seed)
    return "\n\n".join(f"{i} " + " ".join(rng.choice(WORDS, 40)) for i in range(count))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train([make_text(50)], 400)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small data set, not to be changed."""
    home = tmp_path_factory.mktemp("home")
    text = home / "words.txt"
    text.write_text(make_text(600), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_HOME", str(home))
        return prepare(text=text, vocab_size=400).path


@pytest.fixture
def home(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own with a copy of the data set."""
    shutil.copytree(prepared.parent, tmp_path / "data")
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path))
    return tmp_path


# --- tokenizer -----------------------------------------------------------------------------------


@given(text=any_text)
@settings(max_examples=300, deadline=None)
def test_any_text_round_trips_and_its_bytes_are_counted_from_the_merge_table(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode("utf-8"))
    assert tokenizer.encode_batch([text, "x" + text], threads=2) == [ids, tokenizer.encode("x" + text)]


@given(data=st.binary(max_size=200))
@settings(deadline=None)
def test_any_bytes_have_ids(tokenizer: Tokenizer, data: bytes) -> None:
    single = [tokenizer.ranks[bytes([b])] for b in data]
    assert tokenizer.decode_bytes(single) == data


def test_a_tokens_bytes_are_not_those_of_its_decoded_string(tokenizer: Tokenizer) -> None:
    part_of_a_character = tokenizer.ranks[b"\xe6"]
    assert tokenizer.token_bytes[part_of_a_character] == 1
    assert len(tokenizer.decode([part_of_a_character]).encode()) == 3


def test_bos_is_the_last_id_has_no_bytes_and_cannot_come_from_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.bos_id == tokenizer.vocab_size - 1 == 399
    assert tokenizer.token_bytes[tokenizer.bos_id] == 0
    assert tokenizer.bos_id not in tokenizer.encode("<|bos|>")
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("a")]) == "a"


@pytest.mark.parametrize("unit", [" ", "\t", "\u3000", "a", "\n", "é1 ", "word "])
def test_runs_that_overflow_the_pattern_are_cut_into_pieces(tokenizer: Tokenizer, unit: str) -> None:
    text = unit * (10**6 // len(unit)) + "end"
    assert all(len(p) <= PIECE for p in pieces(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text])[0] == tokenizer.encode(text)
    train([text], 258) if unit != "a" else None  # must not overflow either


def test_the_file_is_plain_ranks_and_loads_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "t"
    file.write_bytes(tokenizer.dumps())
    assert Tokenizer.load(file) == tokenizer
    assert file.read_bytes().splitlines()[0].split()[1] == b"0"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda d: d.replace(b" 300\n", b" x\n"), "line 301"),
        (lambda d: d.replace(b" 300\n", b" 299\n"), "not 0 to"),
        (lambda d: b"!!! 1\n" + d, "line 1 "),
        (lambda d: b"", "256 of the 256"),
        (lambda d: d[: len(d) // 2], "line|single bytes"),
    ],
)
def test_a_spoiled_tokenizer_file_is_an_error_with_its_line(tokenizer: Tokenizer, spoil, says: str) -> None:
    with pytest.raises(DataError, match=says):
        Tokenizer.loads(spoil(tokenizer.dumps()), "tokenizer.tiktoken")


def test_a_vocabulary_larger_than_the_text_allows_names_the_largest() -> None:
    with pytest.raises(DataError, match=r"vocabulary of (\d+) at most, not 5,000") as caught:
        train(["hello world hello"], 5000)
    allowed = int(caught.value.action.split("--vocab ")[1].split()[0])
    assert train(["hello world hello"], allowed).vocab_size == allowed


@pytest.mark.parametrize("size", [0, 256, 2**20 + 1])
def test_an_impossible_vocabulary_is_an_error(size: int) -> None:
    with pytest.raises(UserError, match="outside 257 to"):
        train(["hello"], size)


# --- stream --------------------------------------------------------------------------------------


def shards_of(sizes: list[int]) -> list[np.ndarray]:
    """Shards that hold 0, 1, 2, ...: a token is its own place in the text."""
    whole = np.arange(sum(sizes), dtype=np.uint32)
    return [s for s in np.split(whole, np.cumsum(sizes)[:-1]) if len(s)]


many_sizes = st.lists(st.integers(1, 90), min_size=1, max_size=5).filter(lambda s: sum(s) >= 40)


@given(sizes=many_sizes, starts=st.lists(st.integers(0, 10**6), min_size=1, max_size=20), length=st.integers(1, 30))
@settings(max_examples=200, deadline=None)
def test_windows_are_the_text_across_shards(sizes: list[int], starts: list[int], length: int) -> None:
    text = Text(shards_of(sizes), "u4")
    at = np.array(starts, dtype=np.int64) % (text.tokens - length)
    assert (text.windows(at, length) == at[:, None] + np.arange(length + 1)).all()


@given(sizes=many_sizes, rows=st.integers(1, 7), length=st.integers(1, 39), seed=st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_a_pass_serves_each_target_at_most_once_and_misses_less_than_a_row_at_either_end(
    sizes: list[int], rows: int, length: int, seed: int
) -> None:
    tokens = sum(sizes)
    schedule = Schedule(tokens, seed)
    windows, at = [], schedule.start
    while at.grid.number < 1:
        starts, at = schedule.take(at, 1, length)
        windows.append(int(starts[0]))
    first = np.sort(windows[:-1])  # the last one began the second pass
    assert (np.diff(first) == length).all()
    assert first[0] < length
    assert tokens - 1 - (first[-1] + length) < length
    with TokenStream(shards_of(sizes), "u4", seed, lambda x: x, prefetch=False) as stream:
        served = np.concatenate([stream.next(rows, length) for _ in range(len(windows) // rows + 1)])
    assert served[: len(windows), 0].tolist() == windows
    assert (np.diff(served, axis=1) == 1).all()


shapes = st.lists(st.tuples(st.integers(1, 5), st.sampled_from([1, 4, 7, 8, 16, 30])), min_size=1, max_size=25)


@given(sizes=many_sizes, asked=shapes, seed=st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_mixed_shapes_serve_no_target_twice_in_a_pass_unless_rows_grow(
    sizes: list[int], asked: list[tuple[int, int]], seed: int
) -> None:
    schedule = Schedule(sum(sizes), seed)
    at, seen = schedule.start, set()
    for rows, length in sorted(asked, key=lambda s: -s[1]):
        for _ in range(rows):
            starts, at = schedule.take(at, 1, length)
            targets = {(at.grid.number, t) for t in range(int(starts[0]) + 1, int(starts[0]) + length + 1)}
            assert not targets & seen
            seen |= targets


def test_longer_rows_leave_out_what_the_pass_has_served() -> None:
    schedule = Schedule(10_000, 3)
    starts, at = schedule.take(schedule.start, 60, 100)  # 6,000 of 10,000
    again, total = 0, 0
    served = {t for s in starts.tolist() for t in range(s, s + 100)}
    while True:
        more, at = schedule.take(at, 1, 200)
        if at.grid.number > 0:
            break
        total += 200
        again += sum(t in served for t in range(int(more[0]), int(more[0]) + 200))
    assert total >= 2000
    assert again < total / 2


@given(sizes=many_sizes, asked=shapes, seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_the_thread_ahead_changes_nothing(sizes: list[int], asked: list[tuple[int, int]], seed: int) -> None:
    with (
        TokenStream(shards_of(sizes), "u4", seed, lambda x: x, prefetch=True) as ahead,
        TokenStream(shards_of(sizes), "u4", seed, lambda x: x, prefetch=False) as plain,
    ):
        for rows, length in asked:
            assert (ahead.next(rows, length) == plain.next(rows, length)).all()
        assert ahead.served == plain.served == sum(r * n for r, n in asked)
        assert ahead.passes == pytest.approx(ahead.served / sum(sizes))


def test_another_seed_is_another_order_and_another_pass_too() -> None:
    def first(seed: int, skip: int) -> list[int]:
        with TokenStream(shards_of([5000]), "u4", seed, lambda x: x) as stream:
            for _ in range(skip):
                stream.next(1, 50)
            return stream.next(20, 50)[:, 0].tolist()

    assert first(1, 0) == first(1, 0)
    assert len({tuple(first(seed, skip)) for seed in (1, 2) for skip in (0, 100)}) == 4


def test_put_is_called_in_the_consumers_thread_with_an_array_that_nobody_writes_again() -> None:
    threads = set()

    def put(x: np.ndarray) -> np.ndarray:
        threads.add(threading.current_thread())
        return x

    with TokenStream(shards_of([3000]), "u4", 1, put) as stream:
        kept = [stream.next(4, 20) for _ in range(50)]
        copies = [k.copy() for k in kept]
        stream.next(4, 20)
    assert threads == {threading.current_thread()}
    assert all((k == c).all() for k, c in zip(kept, copies, strict=True))
    assert kept[0].dtype == np.int32
    assert len({id(k) for k in kept}) == 50


def test_a_text_shorter_than_a_row_is_an_error_from_next_and_the_stream_goes_on() -> None:
    with TokenStream(shards_of([50]), "u4", 1, lambda x: x) as stream:
        with pytest.raises(DataError, match="has 50 tokens, a row needs 51"):
            stream.next(1, 50)
        assert stream.next(1, 49).shape == (1, 50)
        with pytest.raises(ValueError, match="0 rows"):
            stream.next(0, 10)
        assert stream.served == 49


def test_an_exception_of_the_thread_surfaces_in_next(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Text.windows

    def fails_in_a_thread(self: Text, starts: np.ndarray, length: int) -> np.ndarray:
        if threading.current_thread() is not threading.main_thread() and starts[0] >= 0 and self.tokens == 777:
            raise OSError("the disk is gone")
        return real(self, starts, length)

    monkeypatch.setattr(Text, "windows", fails_in_a_thread)
    with TokenStream(shards_of([777]), "u4", 1, lambda x: x) as stream:
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                stream.next(2, 10)


def test_close_ends_the_thread_and_may_be_called_again() -> None:
    before = threading.active_count()
    stream = TokenStream(shards_of([500]), "u4", 1, lambda x: x)
    stream.next(2, 10)
    assert threading.active_count() == before + 1
    stream.close()
    stream.close()
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="closed"):
        stream.next(2, 10)


def test_a_stream_reads_from_descriptors_that_the_caller_closes(prepared: Path) -> None:
    dataset = Dataset.open(prepared)
    fds = dataset.open_files("train")
    stream = TokenStream(fds, dataset.token_dtype, 1, lambda x: x)
    for fd in fds:
        os.close(fd)
    with stream:
        batch = stream.next(8, 64)
    assert batch.shape == (8, 65)
    assert 0 <= batch.min() <= batch.max() < dataset.vocab_size


# --- data sets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["train", "val", "holdout"])
@pytest.mark.parametrize("length", [1, 7, 64, 1000])
def test_all_rows_count_every_byte_once(prepared: Path, part: str, length: int) -> None:
    dataset = Dataset.open(prepared)
    rows = dataset.rows(part, length, 10**12)
    assert rows.shape[1] == length + 1
    assert dataset.token_bytes[rows[:, 1:]].sum() == dataset.part(part).bytes
    assert (rows[1:, 0] == rows[:-1, -1]).all()
    documents = dataset.part(part).documents
    stream = np.concatenate([rows[:1, 0], rows[:, 1:].ravel()])[: dataset.part(part).tokens]
    assert (stream == dataset.bos_id).sum() == documents
    assert stream[0] == dataset.bos_id


def test_fewer_rows_are_spread_over_the_part(prepared: Path) -> None:
    dataset = Dataset.open(prepared)
    every = dataset.rows("train", 64, 10**12)
    some = dataset.rows("train", 64, 64 * 10)
    assert len(some) == 10
    at = [int(np.flatnonzero((every == row).all(axis=1))[0]) for row in some]
    assert (np.abs(np.diff(at) - len(every) / 10) <= 1).all()
    assert (dataset.rows("train", 64, 64 * 10) == some).all()
    assert len(dataset.rows("train", 64, 64 * 10 - 63)) == 10
    assert len(dataset.rows("train", 64, 0)) == 1


def test_a_part_shorter_than_a_row_is_an_error(prepared: Path) -> None:
    with pytest.raises(DataError, match=r"the val part of words-v400-.* a row needs 1,000,001"):
        Dataset.open(prepared).rows("val", 10**6, 1)


def test_unigram_is_the_training_parts_distribution(prepared: Path) -> None:
    dataset = Dataset.open(prepared)
    nats = dataset.unigram_nats
    assert nats.dtype == np.float32
    assert np.exp(-nats.astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)
    text = dataset.text("train")
    counts = np.bincount(text.span(0, text.tokens), minlength=400)
    assert (np.argsort(-nats, kind="stable")[::-1][:5] == np.argsort(counts, kind="stable")[::-1][:5]).all()


def test_large_vocabularies_take_four_bytes() -> None:
    assert token_dtype(65536).itemsize == 2
    assert token_dtype(65537).itemsize == 4


def spoil_size(path: Path) -> str:
    file = path / "train-00000.bin"
    size = file.stat().st_size
    os.truncate(file, size - 10)
    return rf"train-00000\.bin has {size - 10:,} bytes, {size:,} expected"


def spoil_content(name: str):
    def spoil(path: Path) -> str:
        data = bytearray((path / name).read_bytes())
        data[len(data) // 2] ^= 1
        (path / name).write_bytes(data)
        return rf"{name} was changed: SHA-256 \w+\.\.\., \w+\.\.\. expected"

    return spoil


def remove(name: str):
    def spoil(path: Path) -> str:
        (path / name).unlink()
        return f"{name} is missing"

    return spoil


def rewrite_manifest(change):
    def spoil(path: Path) -> str:
        file = path / "manifest.json"
        manifest = json.loads(file.read_text())
        change(manifest)
        file.write_text(json.dumps(manifest))
        return "manifest.json is"

    return spoil


def cut_manifest(path: Path) -> str:
    os.truncate(path / "manifest.json", 100)
    return r"manifest\.json is damaged \(100 bytes"


DAMAGES = {
    "truncated shard": spoil_size,
    "flipped bit in training": spoil_content("train-00000.bin"),
    "flipped bit in validation": spoil_content("val-00000.bin"),
    "edited tokenizer": spoil_content("tokenizer.tiktoken"),
    "edited counts": spoil_content("counts.bin"),
    "missing shard": remove("val-00000.bin"),
    "missing tokenizer": remove("tokenizer.tiktoken"),
    "missing manifest": remove("manifest.json"),
    "cut manifest": cut_manifest,
    "other schema": rewrite_manifest(lambda m: m.update(schema=99)),
    "no parts": rewrite_manifest(lambda m: m.pop("parts")),
    "parts of a wrong type": rewrite_manifest(lambda m: m.update(parts=[])),
    "a number that is none": rewrite_manifest(lambda m: m.update(vocab_size="many")),
    "tokens that do not add up": rewrite_manifest(lambda m: m["parts"]["val"].update(tokens=1)),
    "a path out of the folder": rewrite_manifest(lambda m: m["counts"].update(file="../x")),
    "null": rewrite_manifest(lambda m: m.update(parts=None)),
}


@pytest.mark.parametrize("verify", ["full", "quick"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_named_command_repairs_it(home: Path, damage: str, verify, monkeypatch) -> None:
    path = next((home / "data").glob("words-v400-*"))
    right = Dataset.open(path).sha256
    says = DAMAGES[damage](path)
    with pytest.raises(DataError, match=says) as caught:
        Dataset.open(path, verify)
    command = shlex.split(caught.value.action.removeprefix("repair it with: "))
    assert command[:2] == ["autoresearch", "prepare"]
    if verify == "full":
        prepare_main(command[2:], standalone_mode=False)
        assert Dataset.open(path).sha256 == right
        assert sorted(p.name for p in (home / "data").iterdir()) == [path.name]


def test_a_vocabulary_that_is_not_the_tokenizers_is_damage(home: Path) -> None:
    path = next((home / "data").glob("words-v400-*"))
    rewrite_manifest(lambda m: m.update(vocab_size=401, bos_id=400))(path)
    with pytest.raises(DataError, match=r"tokenizer\.tiktoken has 400 entries with BOS, the manifest says 401"):
        Dataset.open(path)


def test_without_its_origin_the_command_comes_from_the_folders_name(home: Path) -> None:
    path = next((home / "data").glob("words-v400-*"))
    (path / "origin.json").unlink()
    (path / "manifest.json").unlink()
    with pytest.raises(DataError, match="autoresearch prepare words --vocab 400"):
        Dataset.open(path)


def test_quick_notices_an_edit_whose_size_and_time_were_set_back(home: Path) -> None:
    path = next((home / "data").glob("words-v400-*"))
    Dataset.open(path)
    file = path / "val-00000.bin"
    before = file.stat()
    spoil_content("val-00000.bin")(path)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match="was changed"):
        Dataset.open(path, "quick")


def test_quick_hashes_only_what_moved(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = next((home / "data").glob("words-v400-*"))
    Dataset.open(path)
    hashed: list[str] = []
    monkeypatch.setattr("core.data.file_sha256", lambda p: hashed.append(p.name) or "")
    Dataset.open(path, "quick")
    assert hashed == []


def open_descriptors() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


def test_descriptors_are_read_only_and_none_is_left_open_on_an_error(home: Path) -> None:
    path = next((home / "data").glob("words-v400-*"))
    dataset = Dataset.open(path)
    (fd,) = dataset.open_files("train")
    with pytest.raises(OSError):
        os.write(fd, b"x")
    os.close(fd)
    spoil_size(path)
    before = open_descriptors()
    with pytest.raises(DataError, match="bytes"):
        dataset.open_files("train")
    assert open_descriptors() == before


# --- the benchmark -------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=40), rows=st.integers(1, 5), length=st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_the_peer_packs_whole_documents_and_crops_only_where_none_fits(
    sizes: list[int], rows: int, length: int
) -> None:
    given_documents = [[0, *range(100 * i + 1, 100 * i + n)] for i, n in enumerate(sizes)]
    source = ([*given_documents] for _ in range(10**6))
    batch = next(packing(source, rows, length, buffer=8))
    assert batch.shape == (rows, length + 1)
    assert (batch[:, 0] == 0).all()
    heads = {tuple(d[: length + 1]) for d in given_documents}
    for row in batch:
        for document in np.split(row, np.flatnonzero(row == 0)):
            assert not len(document) or any(tuple(document) == h[: len(document)] for h in heads)
            assert len(document) <= length + 1


def test_the_benchmark_compares_both_sides_on_one_data_set(home: Path) -> None:
    path = next((home / "data").glob("words-v400-*"))
    found = compare(Dataset.open(path), rows=4, length=64, count=2, peer=None)
    assert found["ours"]["cpu_ms"] > 0
    assert set(found["peers"]) == {"packing alone", "packing and tokenizing"}
    assert all(p["ours_to_peer"] > 0 for p in found["peers"].values())


def test_nothing_heavy_is_imported() -> None:
    import subprocess
    import sys

    code = (
        "import sys, core.data, core.stream, prepare; print([m for m in "
        "('torch', 'mlx', 'tiktoken', 'rustbpe', 'pyarrow', 'huggingface_hub', 'rich', 'bible') if m in sys.modules])"
    )
    root = Path(__file__).parent.parent
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
