"""Packing: pieces of documents into samples of exactly seq_length tokens.

Policy. Text beyond its length (seq_length, or one drawn from `lengths`) is cut from its begin into
windows of that length, one after the other without overlap; each window is a document of its own
for attention and memory (`long_documents` may keep the first window alone, or nothing). What
remains at the end, and shorter documents, are pieces; they are never cut to fill a sample. With
`best_fit` the pieces share samples (longest first, each into the fullest sample that still holds
it, in bounded windows of the corpus), divided by `cu_seqlens`, and the tail of a sample is padding,
a segment of its own without loss. With `none` pieces are dropped and counted. No token is lost or
doubled otherwise.

Shape letters: `N` documents, `M` pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.config import PrepareConfig, SourceConfig
from data_prep.sample import Sample

WINDOW_PIECES = 1 << 17
"""Pieces that are packed together: memory does not grow with the corpus."""


@dataclass
class CutCounts:
    """What cutting left out."""

    tails: int = 0
    tail_tokens: int = 0
    truncated: int = 0
    truncated_tokens: int = 0
    long: int = 0
    """Documents dropped because they are longer than a sample."""
    long_tokens: int = 0


@dataclass(frozen=True)
class Pieces:
    """Tokens `start:start + length` of document `document`, in the documents' order."""

    document: NDArray[np.int64]
    """[M]."""
    start: NDArray[np.int64]
    length: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.document)

    def __getitem__(self, which: Any) -> Pieces:
        return Pieces(self.document[which], self.start[which], self.length[which])


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """How documents of a source become pieces."""

    seq_length: int
    packing: str
    chat: bool = False
    """Conversations fit already and are never cut; with `none` each is a sample, padded."""
    long_documents: str = "split"
    min_tail: int = 1
    lengths: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()

    @classmethod
    def of(cls, config: PrepareConfig, source: SourceConfig) -> Cutting:
        """As a source has it."""
        order = sorted(source.lengths, key=int)
        return cls(
            seq_length=config.seq_length,
            packing=config.packing,
            chat=source.sample_kind == "chat",
            long_documents=source.long_documents,
            min_tail=source.min_tail,
            lengths=tuple(int(length) for length in order),
            shares=tuple(source.lengths[length] for length in order),
        )

    @property
    def sure_per_sample(self) -> int:
        """What a sample counts in `sure`."""
        return self.seq_length if self.packing == "best_fit" else 1

    def limits(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """[N] longest document, drawn by the texts' hashes [N, 2] where there are `lengths`."""
        if not self.lengths:
            return np.full(len(hashes), self.seq_length, dtype=np.int64)
        borders = np.cumsum(self.shares) / np.sum(self.shares)
        drawn = (hashes[:, 1] >> np.uint64(11)).astype(np.float64) / 2**53
        which = np.minimum(np.searchsorted(borders, drawn, side="right"), len(borders) - 1)
        return np.asarray(self.lengths, dtype=np.int64)[which]

    def cut(
        self,
        lengths: NDArray[Any],
        hashes: NDArray[np.uint64],
        counts: CutCounts | None = None,
    ) -> Pieces:
        """The pieces of documents.

        Args:
            lengths: [N] tokens.
            hashes: [N, 2] of their texts.
            counts: what is left out is added to it.
        """
        counts = CutCounts() if counts is None else counts
        lengths = lengths.astype(np.int64)
        everything = np.arange(len(lengths))
        if self.chat:
            return Pieces(everything, np.zeros_like(lengths), lengths)
        limits = self.limits(hashes)
        beyond = lengths > limits
        if self.long_documents == "drop":
            counts.long += int(beyond.sum())
            counts.long_tokens += int(lengths[beyond].sum())
            lengths = np.where(beyond, 0, lengths)
        elif self.long_documents == "truncate":
            counts.truncated += int(beyond.sum())
            counts.truncated_tokens += int((lengths - limits)[beyond].sum())
            lengths = np.minimum(lengths, limits)
        num_pieces = -(-lengths // limits)
        document = np.repeat(everything, num_pieces)
        first = np.cumsum(num_pieces) - num_pieces
        start = (np.arange(len(document)) - first[document]) * limits[document]
        pieces = Pieces(document, start, np.minimum(limits[document], lengths[document] - start))
        tail = pieces.length < (self.seq_length if self.packing == "none" else 1)
        if self.min_tail > 1:
            tail |= (start > 0) & (pieces.length < self.min_tail)
        counts.tails += int(tail.sum())
        counts.tail_tokens += int(pieces.length[tail].sum())
        return pieces[~tail] if tail.any() else pieces

    def sure(self, lengths: NDArray[Any], hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """[N] samples that each document adds at least; tokens with `best_fit`, as no sample holds
        more than seq_length."""
        pieces = self.cut(lengths, hashes)
        weights = pieces.length if self.packing == "best_fit" else None
        found = np.bincount(pieces.document, weights=weights, minlength=len(lengths))
        return found.astype(np.int64)


@dataclass(frozen=True)
class Piece:
    """Tokens `start:end` of document number `document`."""

    document: int
    start: int
    end: int

    @property
    def length(self) -> int:
        """In tokens."""
        return self.end - self.start


@dataclass
class PackResult:
    """Samples as lists of pieces, and what was left out."""

    samples: list[list[Piece]] = field(default_factory=list)
    num_dropped_pieces: int = 0
    num_dropped_tokens: int = 0


def pack_documents(lengths: Sequence[int], seq_length: int, *, packing: str) -> PackResult:
    """Which pieces of whole documents go into which sample; for few documents.

    Args:
        lengths: tokens of each document.
        seq_length: tokens of each sample.
        packing: `best_fit` or `none`.
    """
    cutting, counts = Cutting(seq_length=seq_length, packing=packing), CutCounts()
    hashes = np.zeros((len(lengths), 2), dtype=np.uint64)
    pieces = cutting.cut(np.asarray(lengths, dtype=np.int64), hashes, counts)
    flat = [
        Piece(d, s, s + n)
        for d, s, n in zip(
            pieces.document.tolist(), pieces.start.tolist(), pieces.length.tolist(), strict=True
        )
    ]
    order, sizes = pack_pieces(pieces.length, seq_length)
    groups = np.split(order, np.cumsum(sizes)[:-1]) if len(sizes) else []
    samples = [[flat[i] for i in group.tolist()] for group in groups]
    return PackResult(samples, counts.tails, counts.tail_tokens)


def pack_pieces(
    lengths: NDArray[np.int64], seq_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Samples of pieces: whole ones alone and first, then the others by best fit.

    Returns:
        the piece numbers of all samples one after the other [M], and how many each sample has.
    """
    whole = np.flatnonzero(lengths == seq_length)
    short = np.flatnonzero(lengths < seq_length)
    groups = best_fit(lengths[short].tolist(), seq_length)
    sizes = np.concatenate([np.ones(len(whole), np.int64), [len(group) for group in groups]])
    flat = np.array([i for group in groups for i in sorted(group)], dtype=np.int64)
    return np.concatenate([whole, short[flat]]).astype(np.int64), sizes.astype(np.int64)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing; gives the item numbers of each bin.

    Free room is kept as a bit set of the rooms that occur, so that the tightest bin is found by a
    shift, whatever the number of bins.

    Raises:
        ValueError: an item is empty or larger than a bin.
    """
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms = 0  # bit r is set where a bin with room r exists
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[item]
        if not 0 < length <= capacity:
            raise ValueError(f"a piece of {length} tokens does not fit a sample of {capacity}")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                del by_room[room]
                rooms ^= 1 << room
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(item)
        left = room - length
        if left:
            by_room.setdefault(left, []).append(number)
            rooms |= 1 << left
    return bins


def build_sample(
    segments: Sequence[tuple[NDArray[np.int32], NDArray[np.uint8]]],
    *,
    seq_length: int,
    pad_id: int,
    meta: dict[str, Any],
) -> Sample:
    """One sample of tokens and masks laid one after the other, padded to seq_length.

    The first token of every segment is no loss target: nothing within the segment predicts it.
    """
    tokens = np.full(seq_length, pad_id, dtype=np.int32)
    mask = np.zeros(seq_length, dtype=np.uint8)
    borders = [0]
    for segment_tokens, segment_mask in segments:
        start, end = borders[-1], borders[-1] + len(segment_tokens)
        tokens[start:end] = segment_tokens
        mask[start:end] = segment_mask
        mask[start] = 0
        borders.append(end)
    num_padding = seq_length - borders[-1]
    if num_padding:
        borders.append(seq_length)
    return Sample(
        tokens=tokens,
        loss_mask=mask,
        cu_seqlens=np.asarray(borders, dtype=np.int32),
        meta={**meta, "num_padding": num_padding},
    )
