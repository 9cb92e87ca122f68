"""Duplicates in two phases: a signature of each document alone, then one search over all of them.

Signatures are made wherever a document is read; they are numpy rows of fixed size that can be
stored and put together in the order of the documents. The search then needs that order only, so
that the result does not depend on who read what. Of duplicates the first in order is kept.

Exact duplicates share a 128-bit hash of their text in lower case with every run of white space as
one space. Near duplicates (MinHash, Broder 1997) are found by locality-sensitive hashing: documents
that agree in all numbers of one of `num_bands` bands are compared by their whole signatures. The
signatures are bit by bit those of `datasketch.MinHash(scheme="affine32")`, but computed for one
permutation after the other, so that the numbers stay in the processor's cache.

Shape letters: `N` documents, `P` numbers of a signature, `G` n-grams of a document.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.ngrams import find_words, mix64, ngram_hashes
from data_prep.readers.base import Document
from data_prep.settings import DedupConfig

EXACT, NEAR = "exact duplicate", "near duplicate"
_EMPTY = np.uint32(0xFFFFFFFF)
_BLOCK = 1 << 14
_FEW = 512
_ROWS = 1 << 16
"""Signatures read at a time."""
MAX_COMPARED = 64
"""Kept documents of one band's bucket that a document is compared with; more that agree in a band
and are no duplicates of each other are boilerplate."""


class Signer:
    """Signatures of documents; `dtype` has `id` (u8), `exact` (2 × u8) and `minhash` (P × u4)."""

    def __init__(self, config: DedupConfig) -> None:
        self.config = config
        near = config.mode == "near"
        fields: list[tuple[Any, ...]] = [("id", "<u8"), ("exact", "<u8", (2,))]
        self.dtype = np.dtype(fields + ([("minhash", "<u4", (config.num_perm,))] if near else []))
        if near:
            self._factors, self._shifts = _permutations(config.num_perm, config.seed)

    def signature(self, document: Document) -> NDArray[np.void]:
        """The document's row, an array of shape [1]."""
        row = np.zeros(1, dtype=self.dtype)
        name = f"{document.source}/{document.id}".encode()
        row["id"] = np.frombuffer(hashlib.blake2b(name, digest_size=8).digest(), dtype="<u8")
        text = document.content
        plain = " ".join(text.lower().split()).encode()
        digest = hashlib.blake2b(plain, digest_size=16).digest()
        row["exact"] = np.frombuffer(digest, dtype="<u8")
        if self.config.mode == "near":
            row["minhash"] = self.minhash(text)
        return row

    def minhash(self, text: str) -> NDArray[np.uint32]:
        """[P] least values of P permutations over the text's n-grams; all ones without a word."""
        words = find_words(text).hashes
        grams = ngram_hashes(words, min(self.config.shingle_size, max(len(words), 1)))
        return minhash(fold32(grams), self._factors, self._shifts)


def fold32(hashes: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """The upper halves of 64-bit hashes: what MinHash takes for an n-gram."""
    return (hashes >> np.uint64(32)).astype(np.uint32)


@functools.cache
def _permutations(num_perm: int, seed: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Factors and shifts [P] of datasketch's permutations h → factor·h + shift mod 2^32."""
    from datasketch import MinHash

    factors, shifts = MinHash(num_perm=num_perm, seed=seed, scheme="affine32").permutations
    return factors, shifts


def minhash(
    grams: NDArray[np.uint32], factors: NDArray[np.uint32], shifts: NDArray[np.uint32]
) -> NDArray[np.uint32]:
    """[P] minima of factor·fmix32(gram) + shift mod 2^32 over the grams [G], any order."""
    least = np.full(len(factors), _EMPTY, dtype=np.uint32)
    for start in range(0, len(grams), _BLOCK):
        mixed = _fmix32(grams[start : start + _BLOCK])
        if len(mixed) <= _FEW:  # one product of [P, G] costs less than P calls
            values = factors[:, None] * mixed
            values += shifts[:, None]
            np.minimum(least, values.min(axis=1), out=least)
            continue
        space = np.empty_like(mixed)
        for i in range(len(factors)):
            np.multiply(mixed, factors[i], out=space)
            np.add(space, shifts[i], out=space)
            least[i] = min(least[i], space.min())
    return least


def _fmix32(values: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The finalizer of MurmurHash3."""
    mixed = values ^ (values >> np.uint32(16))
    mixed *= np.uint32(0x85EBCA6B)
    mixed ^= mixed >> np.uint32(13)
    mixed *= np.uint32(0xC2B2AE35)
    mixed ^= mixed >> np.uint32(16)
    return mixed


@dataclass(frozen=True)
class Duplicates:
    """Which documents are left out, and for which they stand."""

    keeper: NDArray[np.int64]
    """[N] the kept document that this one repeats; -1 where it is kept itself."""
    near: NDArray[np.bool_]
    """[N] whether it was dropped as a near duplicate."""
    num_duplicate_ids: int
    """Documents whose source and id an earlier document has; they are not dropped for that."""

    def reason(self, number: int) -> str | None:
        """Why document `number` is left out; None where it is kept."""
        if self.keeper[number] < 0:
            return None
        return NEAR if self.near[number] else EXACT


def find_duplicates(rows: NDArray[np.void], config: DedupConfig) -> Duplicates:
    """Searches the signatures of all documents for duplicates.

    Memory: about 250 bytes a document where one in five is a near duplicate, beside the rows, which
    may be mapped from a file.

    Args:
        rows: [N] of `Signer.dtype`, in the documents' order; the first of duplicates is kept.
        config: the settings that the signatures were made with.
    """
    keeper = np.full(len(rows), -1, dtype=np.int64)
    near = np.zeros(len(rows), dtype=np.bool_)
    ids = np.ascontiguousarray(rows["id"])
    num_duplicate_ids = len(ids) - len(np.unique(ids))
    if config.mode != "none":
        _mark_exact(np.ascontiguousarray(rows["exact"]), keeper)
    if config.mode == "near":
        _mark_near(rows, config, keeper, near)
        copies = np.flatnonzero((keeper >= 0) & ~near)  # of a document that is dropped by now
        behind = keeper[keeper[copies]]
        keeper[copies] = np.where(behind >= 0, behind, keeper[copies])
    return Duplicates(keeper, near, num_duplicate_ids)


def _mark_exact(exact: NDArray[np.uint64], keeper: NDArray[np.int64]) -> None:
    if not len(exact):
        return
    order = np.lexsort((exact[:, 1], exact[:, 0]))  # stable: within a group by number
    ordered = exact[order]
    first = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])
    heads = order[first][np.cumsum(first) - 1]
    keeper[order[~first]] = heads[~first]


@functools.cache
def bands(threshold: float, num_perm: int) -> tuple[int, int]:
    """(number of bands, numbers in each) by datasketch, missed pairs weighing nine times as much.

    Pairs that agree by chance are cheap, as whole signatures are compared.
    """
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold=threshold, num_perm=num_perm, weights=(0.1, 0.9))
    return int(index.b), int(index.r)


def _mark_near(
    rows: NDArray[np.void],
    config: DedupConfig,
    keeper: NDArray[np.int64],
    near: NDArray[np.bool_],
) -> None:
    """Goes through documents that share a band with another, in order, and compares."""
    documents, buckets = _shared_buckets(rows, config, keeper < 0)
    kept: dict[int, list[int]] = defaultdict(list)
    starts = np.flatnonzero(np.diff(documents, prepend=-1)).tolist()
    for start, end in itertools.pairwise([*starts, len(documents)]):
        number = int(documents[start])
        own = buckets[start:end].tolist()
        others = sorted({other for bucket in own for other in kept[bucket]})
        if others:
            signature = rows[number]["minhash"]
            equal = (rows["minhash"][others] == signature).mean(axis=1)
            alike = np.flatnonzero(equal >= config.threshold)
            if len(alike):
                keeper[number] = others[int(alike[0])]
                near[number] = True
                continue
        for bucket in own:
            if len(kept[bucket]) < MAX_COMPARED:
                kept[bucket].append(number)


def _shared_buckets(
    rows: NDArray[np.void], config: DedupConfig, wanted: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(document, bucket) pairs of all buckets with two documents or more, sorted by document."""
    num_bands, width = bands(config.threshold, config.num_perm)
    documents, buckets = [], []
    count = 0
    for band in range(num_bands):
        keys, numbers = _band_keys(rows, band * width, width, wanted)
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        new = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(keys) else ordered > 0
        group = np.cumsum(new) - 1
        shared = np.bincount(group)[group] > 1 if len(keys) else new
        documents.append(numbers[order[shared]])
        buckets.append(group[shared] + count)
        count += int(group[-1]) + 1 if len(keys) else 0
    all_documents = np.concatenate(documents)
    order = np.argsort(all_documents, kind="stable")
    return all_documents[order], np.concatenate(buckets)[order]


def _band_keys(
    rows: NDArray[np.void], first: int, width: int, wanted: NDArray[np.bool_]
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hashes of one band's numbers, and their documents; those without a word are left out."""
    keys, numbers = [], []
    for start in range(0, len(rows), _ROWS):
        part = rows["minhash"][start : start + _ROWS]
        use = np.flatnonzero(wanted[start : start + _ROWS] & (part != _EMPTY).any(axis=1))
        total = np.zeros(len(use), dtype=np.uint64)
        for column in range(first, first + width):
            total = mix64(total + part[use, column].astype(np.uint64) + np.uint64(1))
        keys.append(total)
        numbers.append(use + start)
    if not keys:
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    return np.concatenate(keys), np.concatenate(numbers)
