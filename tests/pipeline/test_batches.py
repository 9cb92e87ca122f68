"""Loss masks and micro-batches."""

from __future__ import annotations

import pytest
import torch

from data_prep.loader import Batch
from pipeline.batches import split_batch, target_mask


def test_mask_moves_to_the_position_that_predicts():
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]])
    wanted = [[False, True, True, False], [True, False, False, False]]
    assert target_mask(mask).tolist() == wanted


def test_first_token_of_a_document_is_never_a_target():
    mask = torch.ones(1, 6, dtype=torch.bool)
    borders = torch.tensor([0, 2, 5, 6])
    assert target_mask(mask, borders).tolist() == [[True, False, True, True, False, False]]


def batch(cu_seqlens: torch.Tensor | None) -> Batch:
    tokens = torch.arange(24).reshape(4, 6)
    mask = torch.ones(4, 6, dtype=torch.bool)
    return Batch(tokens=tokens, loss_mask=mask, cu_seqlens=cu_seqlens, meta=[{}] * 4)


def test_rows_are_cut_into_micro_batches():
    parts = split_batch(batch(None), 2, None, "convert")
    assert [part.tokens.tolist() for part in parts] == [
        batch(None).tokens[:2].tolist(),
        batch(None).tokens[2:].tolist(),
    ]
    assert all(part.cu_seqlens is None for part in parts)


def test_packed_rows_keep_their_borders_when_cut():
    packed = batch(torch.tensor([0, 2, 6, 12, 15, 18, 24], dtype=torch.int32))
    first, second = split_batch(packed, 2, 4, "convert")
    assert first.tokens.tolist() == [[0, 1, 2, 3, 6, 7, 8, 9]]
    assert first.cu_seqlens is not None
    assert second.cu_seqlens is not None
    assert first.cu_seqlens.tolist() == [0, 2, 4, 8]
    assert second.cu_seqlens.tolist() == [0, 3, 4, 8]
    # tokens 2 and 6 begin documents, so nothing predicts them
    assert first.targets.tolist() == [[True, False, True, False, True, True, True, False]]


def test_targets_beyond_the_window_are_counted_in_each_document():
    (rows,) = split_batch(batch(None), 4, None, "convert")
    # position 2 is the first that cannot see token 0 through a window of 2
    assert rows.beyond(2).targets.tolist() == [[False, False, True, True, True, False]] * 4
    (packed,) = split_batch(batch(torch.tensor([0, 2, 6, 12, 15, 18, 24])), 4, None, "convert")
    places = packed.beyond(2).targets.flatten().nonzero().flatten().tolist()
    assert places == [4, 8, 9, 10, 20, 21, 22]
    assert not packed.beyond(6).targets.any()


def test_longer_sequences_than_the_shards_are_refused():
    with pytest.raises(ValueError, match=r"convert\.seq_length=8 exceeds the shards' 6 tokens"):
        split_batch(batch(None), 2, 8, "convert")


def test_parts_of_a_sequence_keep_the_labels_of_the_whole():
    (whole,) = split_batch(batch(torch.tensor([0, 2, 6, 12, 15, 18, 24])), 4, None, "convert")
    parts = [whole.shard(rank, 4) for rank in range(4)]
    for name in ("tokens", "targets", "labels"):
        joined = torch.cat([getattr(part, name) for part in parts], dim=1)
        assert torch.equal(joined, getattr(whole, name))
    assert parts[0].tokens.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert parts[0].labels.tolist() == [[1, 2, 3, 4, 5, 6]]  # the last one stands in the next part
    assert not parts[0].targets[0, -1]  # where it begins a document
    assert parts[1].labels.tolist() == [[7, 8, 9, 10, 11, 12]]
    assert all(part.cu_seqlens is whole.cu_seqlens for part in parts)


def test_a_sequence_that_does_not_split_is_refused():
    (whole,) = split_batch(batch(None), 4, None, "convert")
    with pytest.raises(ValueError, match=r"6 tokens do not split over parallel\.cp=4 ranks"):
        whole.shard(0, 4)
