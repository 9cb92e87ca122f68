"""Packing loses and doubles nothing, whatever the lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.pack import best_fit, build_sample, pack_documents
from data_prep.sample import Sample

LENGTHS = st.lists(st.integers(1, 100), max_size=60)


@settings(deadline=None)
@given(lengths=LENGTHS, seq_length=st.integers(8, 40))
def test_every_token_is_packed_exactly_once(lengths: list[int], seq_length: int) -> None:
    documents = [np.arange(n) + 1000 * i for i, n in enumerate(lengths)]
    result = pack_documents(lengths, seq_length, packing="best_fit")
    seen = []
    for pieces in result.samples:
        assert 0 < sum(piece.length for piece in pieces) <= seq_length
        seen += [documents[p.document][p.start : p.end] for p in pieces]
    tokens = np.concatenate(seen) if seen else np.zeros(0)
    expected = np.concatenate(documents) if documents else np.zeros(0)
    assert np.array_equal(np.sort(tokens), np.sort(expected))
    assert result.num_dropped_tokens == 0


@settings(deadline=None)
@given(lengths=LENGTHS, seq_length=st.integers(8, 40))
def test_without_packing_tails_are_counted(lengths: list[int], seq_length: int) -> None:
    result = pack_documents(lengths, seq_length, packing="none")
    assert all(len(p) == 1 and p[0].length == seq_length for p in result.samples)
    kept = sum(piece.length for pieces in result.samples for piece in pieces)
    assert kept + result.num_dropped_tokens == sum(lengths)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 64), max_size=80))
def test_best_fit_is_the_plain_algorithm(lengths: list[int]) -> None:
    """Against the textbook form that looks at every bin."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(64 - length)
    bins = best_fit(lengths, 64)
    assert sorted(64 - sum(lengths[i] for i in b) for b in bins) == sorted(rooms)


def test_fill_is_high_on_mixed_lengths() -> None:
    lengths = np.random.default_rng(0).lognormal(7, 1.5, size=5000).astype(int) + 1
    result = pack_documents(lengths.tolist(), 24_576, packing="best_fit")
    assert lengths.sum() / (len(result.samples) * 24_576) > 0.98


def test_samples_have_borders_masks_and_padding() -> None:
    segments = [
        (np.arange(3, dtype=np.int32), np.ones(3, dtype=np.uint8)),
        (np.arange(4, dtype=np.int32) + 10, np.asarray([1, 0, 1, 1], dtype=np.uint8)),
    ]
    sample = build_sample(segments, seq_length=9, pad_id=99, meta={"kind": "text"})
    assert sample.tokens.tolist() == [0, 1, 2, 10, 11, 12, 13, 99, 99]
    assert sample.loss_mask.tolist() == [0, 1, 1, 0, 0, 1, 1, 0, 0]
    assert sample.cu_seqlens.tolist() == [0, 3, 7, 9]
    assert sample.meta["num_padding"] == 2
    full = build_sample(segments, seq_length=7, pad_id=99, meta={"kind": "text"})
    assert full.cu_seqlens.tolist() == [0, 3, 7]


@pytest.mark.parametrize(
    ("mask", "borders", "kind", "message"),
    [
        (np.zeros(3), [0, 4], "text", "loss_mask has shape"),
        (np.zeros(4), [0, 3], "text", "must run from 0 to 4"),
        (np.zeros(4), [0, 2, 2, 4], "text", "grow strictly"),
        (np.zeros(4), [0, 4], "poem", "not one of"),
    ],
)
def test_broken_samples_are_refused(
    mask: np.ndarray, borders: list[int], kind: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Sample(
            tokens=np.zeros(4, dtype=np.int32),
            loss_mask=mask.astype(np.uint8),
            cu_seqlens=np.asarray(borders, dtype=np.int32),
            meta={"kind": kind},
        )


def test_pieces_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        best_fit([9], 8)
