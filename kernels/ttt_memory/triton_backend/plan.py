"""Where the chunks, the states and the reads of one call of the scan lie.

Everything here is worked out on the CPU from lengths alone and kept, for a model asks for the same
plan in every layer. Rows are documents; a row's *stream* is its pending tokens and then the new
ones; a *slot* is a state (W, M): before the first and after each complete chunk of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class ScanPlan:
    """Indices of one call; tensors are int64 on the device of the call."""

    chunks: Tensor
    """[A, 3] slot before, slot after, first token in the stream; all first chunks come first, then
    all second chunks, …: chunks of one step are of different rows."""
    steps: tuple[int, ...]
    """[steps + 1] where each step's chunks begin in `chunks`."""
    blocks: Tensor
    """[P, 3] slot, first new token, number of tokens (at most the block's): who reads what."""
    spans: Tensor
    """[Q, 3] the same before they are cut into blocks, ordered by slot."""
    span_range: Tensor
    """[slots + 1] where each slot's spans begin in `spans`."""
    num_slots: int
    initial_rows: Tensor
    """[I] the row whose initial state slot i < I holds; -1: the initial weights, for all fresh rows
    without a complete chunk (where `own_slots` is False)."""
    final_slots: Tensor
    """[R] the state of each row after its last complete chunk."""
    stream: Tensor | None
    """[stream tokens] index into pending slots [R P], then new tokens; None: the new tokens."""
    rest: tuple[int, ...]
    """[R] tokens left over in each row."""
    rest_tokens: Tensor
    """[R, max rest] the stream's tokens left over; 0 where a row has fewer."""
    rest_valid: Tensor
    """bool [R, max rest]: where a row has some."""


@lru_cache(maxsize=64)
def make_plan(
    starts: tuple[int, ...],
    pending: tuple[int, ...],
    pending_slots: int,
    chunk_size: int,
    block_tokens: int,
    own_slots: bool,
    device: torch.device,
) -> ScanPlan:
    """The plan of R rows whose new tokens lie at `starts[r] … starts[r + 1]`.

    Args:
        starts: [R + 1].
        pending: [R] tokens that each row brings along.
        pending_slots: P, room for pending tokens in the state.
        chunk_size: C.
        block_tokens: most tokens of a read block.
        own_slots: every row has a slot of its own, because it brings its own (W, M) or because its
            state is wanted; else rows without a complete chunk share one.
        device: of the tensors.
    """
    num_rows = len(pending)
    begins = np.asarray(starts[:-1], dtype=np.int64)
    new = np.diff(np.asarray(starts, dtype=np.int64))
    held = np.asarray(pending, dtype=np.int64)
    total = new + held
    full, rest = np.divmod(total, chunk_size)
    own = np.flatnonzero((full > 0) | own_slots)
    shared = len(own) < num_rows
    first_slot = np.full(num_rows, len(own), dtype=np.int64)  # of the shared initial weights
    first_slot[own] = np.arange(len(own))
    num_initial = len(own) + shared
    stream_start = np.concatenate([[0], np.cumsum(total)[:-1]]) if num_rows else total

    # complete chunks, step by step
    row_of, step_of = [], []
    steps = [0]
    for step in range(int(full.max(initial=0))):
        rows = np.flatnonzero(full > step)
        row_of.append(rows)
        step_of.append(np.full(len(rows), step, dtype=np.int64))
        steps.append(steps[-1] + len(rows))
    rows_of = np.concatenate(row_of) if row_of else np.empty(0, dtype=np.int64)
    steps_of = np.concatenate(step_of) if step_of else np.empty(0, dtype=np.int64)
    slot_after = num_initial + np.arange(len(rows_of), dtype=np.int64)
    # slot of row r after j complete chunks
    slots = [np.empty(n + 1, dtype=np.int64) for n in full]
    for row in range(num_rows):
        slots[row][0] = first_slot[row]
    for row, step, slot in zip(rows_of, steps_of, slot_after, strict=True):
        slots[row][step + 1] = slot
    slot_before = np.array(
        [slots[r][j] for r, j in zip(rows_of, steps_of, strict=True)], dtype=np.int64
    )
    first_token = stream_start[rows_of] + steps_of * chunk_size
    chunks = np.stack([slot_before, slot_after, first_token], 1).reshape(-1, 3)

    # reads: new tokens, cut at chunks, and then at blocks
    found = []
    for row in range(num_rows):
        position, end = int(held[row]), int(total[row])
        while position < end:
            chunk = position // chunk_size
            stop = min(end, (chunk + 1) * chunk_size)
            token = int(begins[row]) + position - int(held[row])
            found.append((int(slots[row][chunk]), token, stop - position))
            position = stop
    found.sort()
    spans = np.asarray(found, dtype=np.int64).reshape(-1, 3)
    cuts = -(-spans[:, 2] // block_tokens)
    blocks = np.repeat(spans, cuts, axis=0)
    skipped = (np.arange(len(blocks)) - np.repeat(np.cumsum(cuts) - cuts, cuts)) * block_tokens
    blocks[:, 1] += skipped
    blocks[:, 2] = np.minimum(blocks[:, 2] - skipped, block_tokens)
    num_slots = num_initial + len(rows_of)
    span_range = np.searchsorted(spans[:, 0], np.arange(num_slots + 1))

    stream = None
    if held.any():
        parts = []
        for row in range(num_rows):
            parts.append(row * pending_slots + np.arange(held[row]))
            parts.append(num_rows * pending_slots + begins[row] + np.arange(new[row]))
        stream = np.concatenate(parts)
    leftover = np.zeros((num_rows, int(rest.max(initial=0))), dtype=np.int64)
    for row in range(num_rows):
        first = stream_start[row] + full[row] * chunk_size
        leftover[row, : rest[row]] = first + np.arange(rest[row])
    initial_rows = np.concatenate([own, np.full(int(shared), -1)])

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64)).to(device)

    return ScanPlan(
        chunks=tensor(chunks),
        steps=tuple(steps),
        blocks=tensor(blocks),
        spans=tensor(spans),
        span_range=tensor(span_range),
        num_slots=num_slots,
        initial_rows=tensor(initial_rows),
        final_slots=tensor(np.array([slot[-1] for slot in slots])),
        stream=None if stream is None else tensor(stream),
        rest=tuple(int(n) for n in rest),
        rest_tokens=tensor(leftover),
        rest_valid=tensor(np.arange(leftover.shape[1]) < rest[:, None]).bool(),
    )
