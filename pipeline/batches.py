"""From the loader's batches to what one forward pass takes.

Shape letters: `B` sequences, `T` tokens of a sequence, `N` packed documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from data_prep.loader import Batch
from pipeline.train_schema import TrainSettings


def target_mask(loss_mask: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Which positions predict a loss token: `loss_mask` moved one to the left.

    The first token of a packed document is never a target: nothing before it belongs to it.

    Args:
        loss_mask: [B, T] bool, true where the token at this index is a target.
        cu_seqlens: [N+1] borders of the documents of a single packed row (B = 1), or None.

    Returns:
        [B, T] bool; the last column is false.
    """
    mask = torch.zeros_like(loss_mask, dtype=torch.bool)
    mask[:, :-1] = loss_mask[:, 1:].bool()
    if cu_seqlens is not None:
        inner = cu_seqlens[1:-1].long()
        mask[:, inner - 1] = False
    return mask


class MicroBatch(NamedTuple):
    """What one forward pass gets, on the rank's device."""

    tokens: Tensor
    """[B, T] int64; with `cu_seqlens` the rows lie one after the other in a single one."""
    targets: Tensor
    """[B, T] bool: positions whose next token is a loss token."""
    labels: Tensor
    """[B, T] int64: the next token of the whole row, read where `targets` is true."""
    cu_seqlens: Tensor | None
    """[N+1] int32 borders of packed documents (B = 1) in the whole row, on the CPU; or None."""

    @classmethod
    def of(cls, tokens: Tensor, loss_mask: Tensor, cu_seqlens: Tensor | None) -> MicroBatch:
        """Move the loss mask from targets to the positions that predict them."""
        if cu_seqlens is not None:
            tokens, loss_mask = tokens.reshape(1, -1), loss_mask.reshape(1, -1)
        labels = torch.zeros_like(tokens)
        labels[:, :-1] = tokens[:, 1:]
        return cls(tokens, target_mask(loss_mask, cu_seqlens), labels, cu_seqlens)

    def beyond(self, window_size: int) -> MicroBatch:
        """The same with targets only where a token of the document lies outside the window.

        Args:
            window_size: tokens that the window of a position holds, its own included.
        """
        if self.cu_seqlens is None:
            place = torch.arange(self.tokens.shape[1])
        else:
            borders = self.cu_seqlens.long()
            place = torch.cat([torch.arange(n) for n in borders.diff().tolist()])
        return self._replace(targets=self.targets & (place >= window_size))

    def shard(self, rank: int, size: int) -> MicroBatch:
        """The part of a context-parallel rank: T / size neighbouring tokens of every row.

        Labels were taken from the whole row, so the last token of a part still has its own.

        Raises:
            ValueError: T does not split.
        """
        num_tokens = self.tokens.shape[1]
        if num_tokens % size:
            raise ValueError(
                f"{num_tokens} tokens do not split over parallel.cp={size} ranks; set "
                f"data.seq_length to a multiple of {size}"
            )
        share = num_tokens // size
        columns = slice(rank * share, (rank + 1) * share)
        return self._replace(
            tokens=self.tokens[:, columns],
            targets=self.targets[:, columns],
            labels=self.labels[:, columns],
        )

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device; the borders stay, they steer loops on the CPU."""
        return self._replace(
            tokens=self.tokens.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
        )


class RankSplit(NamedTuple):
    """How a rank goes through its share of a step's sequences."""

    micro_batch_size: int
    """Sequences of one forward pass."""
    num_micro_batches: int
    """Forward passes of a step, the same in all phases."""


def split_over_ranks(stage: str, phases: Sequence[TrainSettings], dp_size: int) -> list[RankSplit]:
    """Sequences per forward pass of one rank, for each phase of a stage.

    Args:
        stage: its name, for messages.
        phases: settings of each phase.
        dp_size: data-parallel groups; the tensor- and context-parallel ranks of a group work on
            the same sequences.

    Raises:
        ValueError: a batch does not split over the ranks, or `micro_batch_size` (of the first
            phase; the others' follow from the number of passes) does not suit all phases.
    """
    shares: list[int] = []
    for settings in phases:
        per_rank, rest = divmod(settings.batch_size, dp_size)
        if rest:
            raise ValueError(
                f"{stage}.batch_size={settings.batch_size} does not split over {dp_size} "
                f"data-parallel ranks; set {stage}.batch_size={(per_rank + 1) * dp_size}"
            )
        shares.append(per_rank)
    micro = phases[0].micro_batch_size or shares[0]
    most = math.gcd(*shares)  # passes that every phase's share can be cut into
    if shares[0] % micro or most % (shares[0] // micro):
        possible = [shares[0] // p for p in range(most, 0, -1) if most % p == 0]
        raise ValueError(
            f"{stage}.micro_batch_size={micro} does not cut the {_listed(shares)} sequences that a "
            f"rank has in a step into equally many passes; set {stage}.micro_batch_size to "
            f"{' or '.join(map(str, possible))}"
        )
    passes = shares[0] // micro
    return [RankSplit(share // passes, passes) for share in shares]


def _listed(shares: Sequence[int]) -> str:
    return " and ".join(str(share) for share in dict.fromkeys(shares))


def split_batch(
    batch: Batch, micro_batch_size: int, seq_length: int | None, stage: str
) -> list[MicroBatch]:
    """Cut a batch into micro-batches of `micro_batch_size` rows and `seq_length` tokens.

    Raises:
        ValueError: `seq_length` exceeds the shards'.
    """
    num_rows, stored = batch.tokens.shape
    length = stored if seq_length is None else seq_length
    if length > stored:
        raise ValueError(
            f"{stage}.seq_length={length} exceeds the shards' {stored} tokens; set "
            f"data.seq_length={length} or {stage}.seq_length={stored}"
        )
    parts = []
    for first in range(0, num_rows, micro_batch_size):
        rows = slice(first, min(first + micro_batch_size, num_rows))
        borders = batch.cu_seqlens
        if borders is not None:
            borders = _borders_of_rows(borders, rows, stored, length)
        parts.append(
            MicroBatch.of(batch.tokens[rows, :length], batch.loss_mask[rows, :length], borders)
        )
    return parts


def _borders_of_rows(borders: Tensor, rows: slice, stored: int, length: int) -> Tensor:
    """Borders of some rows, each cut to its first `length` of `stored` tokens."""
    chosen = [0]
    for place, row in enumerate(range(rows.start, rows.stop)):
        inside = borders[(borders > row * stored) & (borders < row * stored + length)]
        chosen.extend((inside - row * stored + place * length).tolist())
        chosen.append((place + 1) * length)
    return torch.tensor(chosen, dtype=torch.int32)
