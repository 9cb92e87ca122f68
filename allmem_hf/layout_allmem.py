"""Where each token of a call stands: its row, its position in the row, and how rows are packed.

B sequences, T columns of the call, R rows (sequences or packed documents), S real tokens.

A batch without padding runs as `[B, T]`. With padding, or with several documents in one row, the
real tokens run packed as `[1, S]` with `cu_seqlens`: the memory, the convolution and the window
then never see a padding token, and a padded row computes exactly what it computes alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """Rows and positions of the tokens of one forward call.

    Attributes:
        batch_shape: `(B, T)` as the caller gave it.
        positions: `[B, T]`, or `[1, S]` when packed: position of each token in its row.
        rows: same shape: the row of each token.
        past: `[R]` tokens each row had seen before this call.
        lengths: `[R]` tokens each row has seen with it.
        host_past: `past` as a tuple, known without waiting for the device.
        host_lengths: `lengths` likewise.
        max_new: most new tokens in a row.
        cu_seqlens: `[R + 1]` int32 borders of the packed rows, or None when not packed. On the
            CPU: every layer asks for the numbers, and would wait for the device.
        source: `[S]` index of each packed token in the flattened `[B * T]`, or None.
    """

    batch_shape: tuple[int, int]
    positions: Tensor
    rows: Tensor
    past: Tensor
    lengths: Tensor
    host_past: tuple[int, ...]
    host_lengths: tuple[int, ...]
    max_new: int
    cu_seqlens: Tensor | None = None
    source: Tensor | None = None

    @property
    def is_step(self) -> bool:
        """Whether every row gets exactly one token: a decode step."""
        return self.cu_seqlens is None and self.batch_shape[1] == 1

    @property
    def is_uniform(self) -> bool:
        """Whether all rows are of one length, before and after the call."""
        return self.cu_seqlens is None and len(set(self.host_past)) == 1

    def pack(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` -> `[1, S, ...]`, or `x` itself when nothing is packed."""
        return x if self.source is None else x.flatten(0, 1)[self.source][None]

    def unpack(self, x: Tensor) -> Tensor:
        """`[1, S, ...]` -> `[B, T, ...]` with zeros at padding, the inverse of `pack`."""
        if self.source is None:
            return x
        flat = x.new_zeros(self.batch_shape[0] * self.batch_shape[1], *x.shape[2:])
        return flat.index_copy(0, self.source, x[0]).unflatten(0, self.batch_shape)

    def to_rows(self, x: Tensor, fill: float = 0) -> Tensor:
        """`[1, S, ...]` -> `[R, max_new, ...]`, each row's new tokens first, then `fill`."""
        if self.cu_seqlens is None:
            return x
        out = x.new_full((len(self.past), self.max_new, *x.shape[2:]), fill)
        return out.index_put((self.rows[0], self._offsets()), x[0])

    def from_rows(self, x: Tensor) -> Tensor:
        """`[R, max_new, ...]` -> `[1, S, ...]`, the inverse of `to_rows`."""
        return x if self.cu_seqlens is None else x[self.rows[0], self._offsets()][None]

    def _offsets(self) -> Tensor:
        return self.positions[0] - self.past[self.rows[0]]


def build_layout(
    batch_shape: tuple[int, int],
    device: torch.device,
    *,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past: Tensor | None,
    seen: int,
    host_past: tuple[int, ...] = (),
) -> RowLayout:
    """Reads padding and positions of a call.

    Args:
        batch_shape: `(B, T)` of the new tokens.
        device: where the layout's tensors go.
        attention_mask: `[B, T]` or `[B, seen + T]`, 1 for a real token; None when all are.
        position_ids: `[B, T]` or `[1, T]`. They must be the positions that the mask implies, or,
            without a cache and a mask, restart at 0 wherever a new document starts.
        past: `[B]` real tokens of each row in the cache, None for an empty cache.
        seen: columns in the cache, padding included.
        host_past: `past` as numbers.

    Raises:
        ValueError: a mask or positions that do not describe rows of consecutive tokens.
    """
    mask = _new_columns(attention_mask, batch_shape, seen)
    num_rows, length = batch_shape
    before = torch.zeros(num_rows, dtype=torch.long, device=device) if past is None else past
    host = (0,) * num_rows if past is None else host_past
    if len(host) != num_rows:
        raise ValueError(
            f"{num_rows} rows of new tokens do not fit a cache of {len(host)} rows; give tokens "
            "for each row, or take the rows that go on (AllMemCache.take)"
        )
    if mask is None:
        positions = before[:, None] + torch.arange(length, device=device)
        if position_ids is not None:
            given = position_ids.to(device).expand(batch_shape)
            if not torch.equal(given, positions):
                return _documents(given, past)
        return RowLayout(
            batch_shape=batch_shape,
            positions=positions,
            rows=torch.arange(num_rows, device=device)[:, None].expand(batch_shape),
            past=before,
            lengths=before + length,
            host_past=host,
            host_lengths=tuple(n + length for n in host),
            max_new=length,
        )
    mask = mask.to(device)
    positions = before[:, None] + mask.long().cumsum(1) - 1
    if position_ids is not None:
        given = position_ids.to(device).expand(batch_shape)
        if not torch.equal(given[mask], positions[mask]):
            raise ValueError(
                "position_ids differ from the positions that attention_mask implies; leave them out"
            )
    return _packed(batch_shape, mask.sum(1), positions[mask], (before, host), mask)


def _new_columns(mask: Tensor | None, batch_shape: tuple[int, int], seen: int) -> Tensor | None:
    """The mask's columns of this call as bool `[B, T]`, or None when every token is real."""
    if mask is None:
        return None
    num_rows, length = batch_shape
    widths = {length, seen + length}
    if mask.ndim != 2 or mask.shape[0] != num_rows or mask.shape[1] not in widths:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} does not fit {num_rows} rows of {length} "
            f"new tokens after {seen} cached ones; give [batch, cached + new] with 1 at real tokens"
        )
    new = mask[:, mask.shape[1] - length :].bool()
    return None if bool(new.all()) else new


def _documents(given: Tensor, past: Tensor | None) -> RowLayout:
    """Packed documents: `given` [B, T] restarts at 0 at the first token of each document."""
    starts = given == 0
    index = torch.arange(given.shape[1], device=given.device).expand_as(given)
    begun = torch.where(starts, index, -1).cummax(1).values
    if past is not None or bool((begun < 0).any()) or not torch.equal(given, index - begun):
        raise ValueError(
            "position_ids are neither consecutive after the cached tokens nor, without a cache, "
            "restarts at 0 of packed documents; leave them out, or pack documents without a cache"
        )
    borders = starts.flatten().nonzero().flatten()
    total = torch.tensor([given.numel()], device=given.device)
    counts = torch.diff(torch.cat([borders, total]))
    everything = torch.ones_like(given, dtype=torch.bool)
    before = (torch.zeros_like(counts), (0,) * len(counts))
    return _packed((given.shape[0], given.shape[1]), counts, given.flatten(), before, everything)


def _packed(
    batch_shape: tuple[int, int],
    counts: Tensor,
    positions: Tensor,
    before: tuple[Tensor, tuple[int, ...]],
    mask: Tensor,
) -> RowLayout:
    """Packs the tokens that `mask` [B, T] keeps; `counts` [R] of them in each row."""
    past, host_past = before
    host_counts = counts.tolist()
    borders = torch.tensor([0, *accumulate(host_counts)], dtype=torch.int32)
    rows = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    return RowLayout(
        batch_shape=batch_shape,
        positions=positions[None],
        rows=rows[None],
        past=past,
        lengths=past + counts,
        host_past=host_past,
        host_lengths=tuple(n + more for n, more in zip(host_past, host_counts, strict=True)),
        max_new=max(host_counts),
        cu_seqlens=borders,
        source=mask.flatten().nonzero().flatten(),
    )
