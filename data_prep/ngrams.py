"""Word n-grams of a text as 64-bit hashes, in whole arrays: what duplicates and leaks are found by.

A word is a run of letters, digits and combining marks, in lower case; an ideograph, a kana or a
letter of a script without spaces (Thai, Lao, Burmese, Khmer) is a word of its own. Hashes are the
same on every machine.

Shape letters: `W` words of the text, `G` n-grams.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_TABLE_SIZE = 0x20000
"""Code points with an entry of their own; those above are ideographs."""
_BLOCK = 1 << 17
"""Characters worked on at a time."""
_WORD, _SINGLE = 1, 2
_SINGLE_RANGES = (
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF)),  # Thai, Lao, Burmese, Khmer
    *((0x3005, 0x3007), (0x3040, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF)),
    (0xF900, 0xFAFF),
)
_LETTER_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_WORD_FACTOR = np.uint64(0xD6E8FEB86659FD93)


@dataclass(frozen=True)
class Words:
    """The words of a text in order."""

    hashes: NDArray[np.uint64]
    """[W]."""
    starts: NDArray[np.int64]
    """[W] first character of each."""
    ends: NDArray[np.int64]
    """[W] past the last character of each."""

    def __len__(self) -> int:
        return len(self.hashes)


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64: a bijection after which every bit depends on all bits."""
    z = values ^ (values >> np.uint64(30))
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


@dataclass(frozen=True)
class _Tables:
    """By code point: its class (0: between words) and the hash of its lower-case form."""

    classes: NDArray[np.uint8]
    letters: NDArray[np.uint64]
    powers: NDArray[np.uint64]
    """[_BLOCK + 1] powers of the letter factor, and …"""
    inverses: NDArray[np.uint64]
    """… of its inverse modulo 2^64."""


@functools.cache
def _tables() -> _Tables:
    lower = np.arange(_TABLE_SIZE, dtype=np.uint64)
    classes = np.zeros(_TABLE_SIZE, dtype=np.uint8)
    for code in range(_TABLE_SIZE):
        letter = chr(code)
        if letter.isalnum() or unicodedata.category(letter).startswith("M"):
            classes[code] = _WORD
            small = letter.lower()
            if len(small) == 1:
                lower[code] = ord(small)
    for first, last in _SINGLE_RANGES:
        inside = classes[first : last + 1]
        inside[inside > 0] = _SINGLE
    factor = int(_LETTER_FACTOR)
    powers = np.full(_BLOCK + 1, _LETTER_FACTOR)
    inverses = np.full(_BLOCK + 1, np.uint64(pow(factor, -1, 2**64)))
    powers[0] = inverses[0] = 1
    return _Tables(
        classes,
        mix64(lower + np.uint64(1)),
        np.multiply.accumulate(powers),
        np.multiply.accumulate(inverses),
    )


def _blocks(text: str) -> Iterator[tuple[int, str]]:
    """(place, piece) of a long text, cut between words where there is a space or line end."""
    start = 0
    while start < len(text):
        end = start + _BLOCK
        if end < len(text):
            cut = max(text.rfind(" ", start + 1, end), text.rfind("\n", start + 1, end))
            end = cut if cut > 0 else end
        yield start, text[start:end]
        start = end


def _codes(text: str) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """Code points of a text and their classes."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    if text.isascii():
        return codes, _tables().classes[codes]
    classes = _tables().classes[np.minimum(codes, _TABLE_SIZE - 1)]
    classes[codes >= _TABLE_SIZE] = _SINGLE
    return codes, classes


def letter_counts(text: str) -> tuple[int, int]:
    """(letters and digits, characters that are no white space) of a text."""
    letters = characters = 0
    for _, piece in _blocks(text):
        letters += int(np.count_nonzero(_codes(piece)[1]))
        characters += len(piece) - sum(map(piece.count, " \n\t\r\u00a0\u3000"))
    return letters, characters


@functools.lru_cache(maxsize=1)
def find_words(text: str) -> Words:
    """The words of a text; the last answer is kept, as several steps ask for the same."""
    found = [_block_words(piece, place) for place, piece in _blocks(text)]
    if not found:
        nothing = np.zeros(0, dtype=np.int64)
        return Words(nothing.astype(np.uint64), nothing, nothing)
    return Words(
        np.concatenate([words.hashes for words in found]),
        np.concatenate([words.starts for words in found]),
        np.concatenate([words.ends for words in found]),
    )


def _block_words(piece: str, place: int) -> Words:
    tables = _tables()
    codes, classes = _codes(piece)
    inside = classes > 0
    single = classes == _SINGLE
    before = np.concatenate([[False], inside[:-1]])
    begins = inside & ~before
    if single.any():
        after_single = np.concatenate([[False], single[:-1]])
        begins |= inside & (single | after_single)
    starts = np.flatnonzero(begins)
    # A word ends where the next one starts, or with its run.
    runs = np.flatnonzero(np.concatenate([inside, [False]]) < np.concatenate([[False], inside]))
    ends = runs[np.searchsorted(runs, starts, side="right")]
    ends[:-1] = np.minimum(ends[:-1], starts[1:])
    if codes.size and int(codes.max()) >= _TABLE_SIZE:
        letters = tables.letters[np.minimum(codes, _TABLE_SIZE - 1)]
        high = codes >= _TABLE_SIZE
        letters[high] = mix64(codes[high].astype(np.uint64) + np.uint64(1))
    else:
        letters = tables.letters[codes]
    # Σ letter_i · P^(i - start), from differences of one running sum.
    sums = np.zeros(len(codes) + 1, dtype=np.uint64)
    np.cumsum(letters * tables.powers[: len(codes)], out=sums[1:])
    hashes = (sums[ends] - sums[starts]) * tables.inverses[starts]
    return Words(mix64(hashes), starts + place, ends + place)


def ngram_hashes(words: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """[G] hashes of all runs of n words; empty where the text has fewer.

    Args:
        words: [W] hashes of the words.
        n: words of a run.
    """
    count = len(words) - n + 1
    if count < 1:
        return np.zeros(0, dtype=np.uint64)
    total = words[:count].copy()
    for i in range(1, n):
        total *= _WORD_FACTOR
        total += words[i : i + count]
    return mix64(total)
