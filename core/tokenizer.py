"""Byte-pair tokenizer: trained by rustbpe, run by tiktoken, stored as plain merge ranks.

The file has one line for each token, `base64(bytes) rank`, as tiktoken's own files do: nothing in it is ever
executed. A vocabulary of V entries is 256 single bytes, V - 257 merges, and one special token, BOS, as the last id.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import DataError, UserError

# How text is cut before merges are learned: a merge never crosses a cut. This is GPT-4's pattern with one change
# that upstream made too: numbers are cut after two digits, not three, because with a vocabulary of a few thousand
# entries a thousand three-digit ones would be a large share of it. Words keep the space before them, contractions
# are cut off, and line ends stay apart from words.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
BOS = "<|bos|>"
SMALLEST_VOCABULARY = 257  # all single bytes and BOS
LARGEST_VOCABULARY = 2**20
# Longest text (characters) that is handed to the pattern in one go. Its regex engine backtracks over a run of white
# space and overflows its stack between 262,144 and 1,000,000 of them (measured, tiktoken 0.14 and rustbpe 0.1);
# 65,536 is well below, and a cut that falls on a space costs nothing.
PIECE = 2**16


def pieces(text: str) -> Iterator[str]:
    """Parts of `text`, none longer than PIECE, that join to it; cut before a space where there is one."""
    start = 0
    while len(text) - start > PIECE:
        end = text.rfind(" ", start + PIECE // 2, start + PIECE)
        end = end if end > start else start + PIECE
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:] if start else text


@dataclass(frozen=True)
class Tokenizer:
    """Merge ranks with BOS after them."""

    ranks: dict[bytes, int]
    pattern: str = SPLIT_PATTERN

    @property
    def vocab_size(self) -> int:
        return len(self.ranks) + 1

    @property
    def bos_id(self) -> int:
        return len(self.ranks)

    @cached_property
    def _encoding(self) -> Any:
        import tiktoken  # here, because the trainer reads tokens and never text

        return tiktoken.Encoding(
            "autoresearch", pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens={BOS: self.bos_id}
        )

    @cached_property
    def _bytes(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        for token, rank in self.ranks.items():
            table[rank] = token
        return table

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS; a special token's name in the text is text like any other."""
        if len(text) <= PIECE:
            return self._encoding.encode_ordinary(text)
        return [i for piece in pieces(text) for i in self._encoding.encode_ordinary(piece)]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """`encode` of each, on several threads."""
        if all(len(t) <= PIECE for t in texts):
            return self._encoding.encode_ordinary_batch(list(texts), num_threads=threads)
        parts = [list(pieces(t)) for t in texts]
        encoded = iter(self._encoding.encode_ordinary_batch([p for part in parts for p in part], num_threads=threads))
        return [[i for _ in part for i in next(encoded)] for part in parts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Exact bytes; BOS has none. `IndexError` on an id outside the vocabulary."""
        table = self._bytes
        return b"".join(table[int(i)] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text; bytes that are no whole character become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """(V,) int32: bytes of each token, from the merge table. BOS: 0.

        Not from decoded strings: a token that is part of a character decodes to U+FFFD, three bytes, and the
        bits per byte would read too low.
        """
        return np.array([len(b) for b in self._bytes], dtype=np.int32)

    def dumps(self) -> bytes:
        in_order = sorted(self.ranks.items(), key=lambda item: item[1])
        return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in in_order)

    @classmethod
    def loads(cls, data: bytes, name: str | Path, pattern: str = SPLIT_PATTERN) -> Tokenizer:
        """`DataError` that names the file and line, unless ranks are 0..n-1 and hold all 256 single bytes."""
        ranks: dict[bytes, int] = {}
        for number, line in enumerate(data.splitlines(), start=1):
            try:
                token, rank = line.split(b" ")
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                raise DataError(f"{name}: line {number} is not `base64 rank`: {line[:60]!r}") from None
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise DataError(f"{name}: its {len(ranks)} ranks are not 0 to {len(ranks) - 1}, each once")
        lacking = sum(bytes([b]) not in ranks for b in range(256))
        if lacking:
            raise DataError(f"{name}: {lacking} of the 256 single bytes are missing")
        return cls(ranks, pattern)

    @classmethod
    def load(cls, path: Path, pattern: str = SPLIT_PATTERN) -> Tokenizer:
        return cls.loads(path.read_bytes(), path, pattern)

    def sha256(self) -> str:
        return hashlib.sha256(self.dumps()).hexdigest()


def check_vocabulary(vocab_size: int) -> None:
    """`UserError` for a size that no text could have."""
    if not SMALLEST_VOCABULARY <= vocab_size <= LARGEST_VOCABULARY:
        raise UserError(
            f"a vocabulary of {vocab_size:,} is outside {SMALLEST_VOCABULARY} to {LARGEST_VOCABULARY:,}",
            "256 of it are single bytes and one is BOS; 4096 or 8192 suit most texts",
        )


def train(texts: Iterable[str], vocab_size: int, pattern: str = SPLIT_PATTERN) -> Tokenizer:
    """Learn merges from `texts` until BOS completes a vocabulary of `vocab_size`.

    `DataError` with the largest size that this text allows, where it has too few different words.
    """
    check_vocabulary(vocab_size)
    if vocab_size == SMALLEST_VOCABULARY:  # no merges to be learned
        return Tokenizer({bytes([i]): i for i in range(256)}, pattern)
    import rustbpe  # here: only `prepare` trains

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator((p for t in texts for p in pieces(t)), vocab_size - 1, pattern=pattern)
    tokenizer = Tokenizer({bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}, pattern)
    if tokenizer.vocab_size < vocab_size:
        raise DataError(
            f"the training part of this text allows a vocabulary of {tokenizer.vocab_size:,} at most, "
            f"not {vocab_size:,}",
            f"choose one with --vocab {tokenizer.vocab_size} or less, or give more text",
        )
    return tokenizer
