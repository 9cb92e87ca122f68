"""Text of evaluation sets is kept out of training: n-grams of words that both have.

The n-grams of all evaluation items are held as sorted 64-bit hashes (12 bytes each) with a bit map
before them, so that a document is checked in a few passes over its own n-grams.

Shape letters: `E` n-grams of the evaluation sets, `G` n-grams of a document.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from data_prep.evalsets import read_items
from data_prep.ngrams import Words, find_words, ngram_hashes
from data_prep.readers.base import Document, Drop
from data_prep.settings import DecontaminateConfig, config_hash, to_dict

CONTAMINATED = "in an evaluation set"
_MAP_FACTOR = 16
"""Bits of the map for each n-gram: one of so many n-grams that are not there passes it."""


@dataclass(frozen=True)
class _Grams:
    """N-grams of one length."""

    length: int
    hashes: NDArray[np.uint64]
    """[E] sorted, each once."""
    items: NDArray[np.int32]
    """[E] the first item that holds it."""
    seen: NDArray[np.bool_]
    """By the lowest bits of a hash: whether an n-gram has these."""

    @classmethod
    def of(cls, length: int, found: list[tuple[int, NDArray[np.uint64]]]) -> _Grams:
        hashes = np.concatenate([grams for _, grams in found])
        numbers = np.concatenate([np.full(len(grams), i, dtype=np.int32) for i, grams in found])
        hashes, first = np.unique(hashes, return_index=True)
        bits = max(10, (_MAP_FACTOR * len(hashes)).bit_length())
        seen = np.zeros(1 << bits, dtype=np.bool_)
        seen[hashes & np.uint64(len(seen) - 1)] = True
        return cls(length, hashes, numbers[first], seen)

    def find(self, words: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(first words, places in `hashes`) of the document's n-grams that are there."""
        grams = ngram_hashes(words, self.length)
        at = np.flatnonzero(self.seen[grams & np.uint64(len(self.seen) - 1)])
        places = np.searchsorted(self.hashes, grams[at])
        places = np.minimum(places, len(self.hashes) - 1)
        same = self.hashes[places] == grams[at]
        return at[same], places[same]


@dataclass(frozen=True)
class Match:
    """What a document shares with the evaluation sets."""

    item: str
    """Set and number of the item that it shares most with."""
    num_ngrams: int
    """Different n-grams shared with that item."""
    spans: NDArray[np.int64]
    """[*, 2] characters of all n-grams shared with any item."""


class Decontaminator:
    """The check of documents against evaluation sets; a step."""

    name = "decontaminate"

    def __init__(
        self, items: Iterable[tuple[str, str]], config: DecontaminateConfig | None = None
    ) -> None:
        """Builds the index.

        Args:
            items: (name, text) of each evaluation item.
            config: the settings; its sets are not read here.
        """
        self.config = config = config or DecontaminateConfig()
        self._names: list[str] = []
        self.num_too_short = 0
        """Items with fewer than `min_words` words, which are not checked."""
        found: dict[int, list[tuple[int, NDArray[np.uint64]]]] = {}
        for name, text in items:
            words = find_words(text).hashes
            if len(words) < config.min_words:
                self.num_too_short += 1
                continue
            length = min(len(words), config.ngram)
            grams = np.unique(ngram_hashes(words, length))
            found.setdefault(length, []).append((len(self._names), grams))
            self._names.append(name)
        self._grams = [_Grams.of(length, found[length]) for length in sorted(found)]

    @property
    def num_items(self) -> int:
        """Evaluation items in the index."""
        return len(self._names)

    @property
    def num_ngrams(self) -> int:
        """Different n-grams in the index."""
        return sum(len(grams.hashes) for grams in self._grams)

    def match(self, text: str) -> Match | None:
        """What the text shares with an item, where it is enough."""
        words: Words = find_words(text)
        counts: Counter[int] = Counter()
        spans = []
        enough = False
        for grams in self._grams:
            at, places = grams.find(words.hashes)
            if not len(at):
                continue
            numbers = grams.items[np.unique(places)]
            own = Counter(numbers.tolist())
            counts.update(own)
            # An item that is shorter than an n-gram has only one.
            least = self.config.min_matches if grams.length == self.config.ngram else 1
            enough = enough or max(own.values()) >= least
            spans.append(np.stack([words.starts[at], words.ends[at + grams.length - 1]], axis=1))
        if not enough:
            return None
        item, count = min(counts.items(), key=lambda pair: (-pair[1], pair[0]))
        return Match(self._names[item], count, np.concatenate(spans))

    def apply(self, document: Document) -> Document | Drop:
        """The document where it shares nothing; without the shared passages; or a drop."""
        match = self.match(document.content)
        if match is None:
            return document
        drop = Drop(CONTAMINATED, f"{match.item}, {match.num_ngrams} n-grams")
        if self.config.policy == "drop" or document.kind == "chat":
            return drop
        pieces = _outside(len(document.text), match.spans, self.config.cut_characters)
        left = sum(end - start for start, end in pieces)
        if left < (1.0 - self.config.max_cut_fraction) * len(document.text) or not left:
            return drop
        text = "\n".join(document.text[start:end] for start, end in pieces)
        return replace(document, text=text, cuts=(*document.cuts, drop))


def _outside(length: int, spans: NDArray[np.int64], margin: int) -> list[tuple[int, int]]:
    """The ranges of a text that lie outside all spans and `margin` characters around them."""
    pieces, start = [], 0
    for first, last in spans[np.argsort(spans[:, 0], kind="stable")].tolist():
        if first - margin > start:
            pieces.append((start, first - margin))
        start = max(start, last + margin)
    if start < length:
        pieces.append((start, length))
    return pieces


_loaded: dict[str, Decontaminator] = {}


def decontaminator(config: DecontaminateConfig) -> Decontaminator:
    """The check that a configuration describes; its index is built once for a process.

    Raises:
        ValueError: an evaluation set that is not there, cannot be read or has none of the fields.
    """
    key = config_hash(to_dict(config))
    if key not in _loaded:
        items = (item for chosen in config.sets for item in read_items(chosen))
        _loaded[key] = Decontaminator(items, config)
    return _loaded[key]
