"""Packing: pieces of documents into samples of exactly seq_length tokens.

Policy. A document longer than seq_length is cut from its begin into windows of seq_length tokens,
one after the other without overlap; each window is a document of its own for attention and memory.
What remains at the end, and shorter documents, are pieces. With `best_fit` the pieces share samples
(longest first, each into the fullest sample that still holds it), divided by `cu_seqlens`, and
the tail of a sample is padding, a segment of its own without loss. With `none` pieces are dropped
and counted. No token is lost or doubled otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.sample import Sample


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


def split_windows(document: int, length: int, seq_length: int) -> list[Piece]:
    """Cuts a document of `length` tokens into consecutive pieces of at most `seq_length`."""
    return [
        Piece(document, start, min(start + seq_length, length))
        for start in range(0, length, seq_length)
    ]


def pack_documents(lengths: Sequence[int], seq_length: int, *, packing: str) -> PackResult:
    """Which pieces go into which sample, by the policy of this module.

    Args:
        lengths: tokens of each document.
        seq_length: tokens of each sample.
        packing: `best_fit` or `none`.
    """
    result = PackResult()
    short: list[Piece] = []
    for number, length in enumerate(lengths):
        for piece in split_windows(number, length, seq_length):
            if piece.length == seq_length:
                result.samples.append([piece])
            else:
                short.append(piece)
    if packing == "none":
        result.num_dropped_pieces = len(short)
        result.num_dropped_tokens = sum(piece.length for piece in short)
        return result
    for group in best_fit([piece.length for piece in short], seq_length):
        result.samples.append([short[i] for i in sorted(group)])
    return result


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
