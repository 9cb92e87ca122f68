"""Window, sinks and documents as a block mask of FlexAttention: equation (1) of arXiv 2602.13680.

Shape letters: B sequences, T tokens, H query heads, G key-value heads, K head width.

The mask is worked out block by block from positions alone, never token by token, so a million
tokens cost 67 million booleans for a moment; blocks that are wholly seen skip the test of single
pairs. Compiled on CUDA devices; on a CPU PyTorch runs it only uncompiled, in memory T x T, which
serves tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from kernels.swa.reference import document_starts

BLOCK = 128
"""Queries, and keys, of a block."""


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int,
    num_sinks: int,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """As `kernels.swa.reference.sliding_window_attention`, by FlexAttention.

    Raises:
        ValueError: gradients on a CPU, where FlexAttention has none.
    """
    _check_gradients(q, k, v)
    if q.shape[1] == 0:
        return q * 1
    bounds = [0, q.shape[1]] if cu_seqlens is None else document_starts(q, cu_seqlens)
    mask = window_mask(tuple(bounds), window_size, num_sinks, q.device)
    return _attend(q, k, v, mask, scale)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """As `kernels.swa.reference.causal_attention`, all documents in one launch."""
    return sliding_window_attention(
        q, k, v, window_size=max(1, q.shape[1]), num_sinks=0, cu_seqlens=cu_seqlens, scale=scale
    )


def continued_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    position: int,
    window_size: int | None,
    num_sinks: int,
    sinks: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """As `kernels.swa.reference.continued_attention`, whose checks have been made."""
    _check_gradients(q, k, v)
    if q.shape[1] == 0:
        return q * 1
    lead = 0 if sinks is None else sinks[0].shape[1]
    past = k.shape[1] - q.shape[1]
    if sinks is not None and lead:
        k, v = torch.cat([sinks[0], k], 1), torch.cat([sinks[1], v], 1)
    window = position + q.shape[1] if window_size is None else window_size
    mask = continued_mask(position, q.shape[1], past, lead, window, num_sinks, q.device)
    return _attend(q, k, v, mask, scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    attend = _compiled() if q.is_cuda else cast(Callable[..., Any], flex_attention)
    # [B, T, H, K] -> [B, H, T, K]
    heads = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[2] != k.shape[2]
    # one program too many would run uncompiled, in memory T x T: an error is better
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        out: Tensor = attend(*heads, block_mask=mask, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2)


def _check_gradients(q: Tensor, k: Tensor, v: Tensor) -> None:
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if wanted and not q.is_cuda:
        raise ValueError(
            f"backend='flex' cannot run: FlexAttention has no gradients on {q.device}; "
            "set backend='reference' or 'auto'"
        )


@cache
def _compiled() -> Callable[..., Any]:
    """For the first length a program of its own; from the second on one for all lengths."""
    return torch.compile(flex_attention)


@lru_cache(maxsize=32)
def window_mask(
    bounds: tuple[int, ...], window: int, sinks: int, device: torch.device
) -> BlockMask:
    """Query t sees key j iff both are of one document, j <= t, and t - j < W or j is a sink.

    Args:
        bounds: document starts and T.
        window: W.
        sinks: s, first tokens of each document that all its later ones see.
        device: of the mask.
    """
    num_tokens = bounds[-1]
    starts = torch.tensor(bounds[:-1], device=device)
    tokens = torch.arange(num_tokens, device=device)
    document = torch.searchsorted(starts, tokens, right=True) - 1
    begin = starts[document]  # of each token's document
    # as tensors: other numbers are then no other program, and nothing is compiled again
    reach, most = (torch.tensor(n, device=device) for n in (window, sinks))

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del batch, head
        near = (query - key < reach) | (key - begin[query] < most)
        return (key <= query) & (key >= begin[query]) & near

    some, every = _blocks(tokens, begin, window, sinks)
    partial = some & ~every
    return BlockMask.from_kv_blocks(
        *_indices(partial),
        *_indices(every),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(num_tokens, num_tokens),
    )


@lru_cache(maxsize=32)
def continued_mask(
    position: int, num_tokens: int, past: int, lead: int, window: int, sinks: int,
    device: torch.device,
) -> BlockMask:  # fmt: skip
    """The same for queries from `position` on: keys are `lead` sinks, `past` tokens, their own.

    Keys stand in the order of their positions, so a block's first and last bound all of it.
    """
    keys = torch.cat(
        [
            torch.arange(lead, device=device),
            torch.arange(position - past, position + num_tokens, device=device),
        ]
    )
    reach, most, start = (torch.tensor(n, device=device) for n in (window, sinks, position))

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del batch, head
        at, other = query + start, keys[key]
        return (other <= at) & ((at - other < reach) | (other < most))

    q_low, q_high, q_whole = _edges(torch.arange(num_tokens, device=device) + position)
    k_low, k_high, k_whole = _edges(keys)
    q_low, q_high = q_low[:, None], q_high[:, None]
    some = (k_low <= q_high) & ((k_high > q_low - window) | (k_low < sinks))
    every = (k_high <= q_low) & ((k_low > q_high - window) | (k_high < sinks))
    every &= q_whole[:, None] & k_whole
    return BlockMask.from_kv_blocks(
        *_indices(some & ~every),
        *_indices(every),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(num_tokens, len(keys)),
    )


def _edges(positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First and last position of each block, and whether the block is full."""
    rows = torch.arange(-(-len(positions) // BLOCK), device=positions.device) * BLOCK
    last = (rows + BLOCK).clamp(max=len(positions)) - 1
    return positions[rows], positions[last], last - rows == BLOCK - 1


def _blocks(tokens: Tensor, begin: Tensor, reach: int, sinks: int) -> tuple[Tensor, Tensor]:
    """Which key blocks [queries / BLOCK, keys / BLOCK] are seen in part, and which wholly.

    `some` may name a block of which nothing is seen, `every` may leave one out: both are safe.
    """
    rows = -(-len(tokens) // BLOCK)
    last = torch.minimum(torch.arange(1, rows + 1, device=tokens.device) * BLOCK, tokens[-1] + 1)
    low, high = torch.arange(rows, device=tokens.device) * BLOCK, last - 1
    begin_low, begin_high = begin[low], begin[high]  # document starts only rise
    q_low, q_high = low[:, None], high[:, None]
    first, final = begin_low[:, None], begin_high[:, None]  # starts of a query block's documents
    k_low, k_high = low[None, :], high[None, :]
    reached = k_high > q_low - reach  # the first query's window; later ones see later keys
    # sinks of the block's documents lie in [first, final + sinks)
    sink = (k_high >= first) & (k_low < final + sinks)
    some = (k_low <= q_high) & (k_high >= first) & (reached | sink)
    inside = (k_high <= q_low) & (k_low >= final)  # of one document, and before all the queries
    every = inside & ((k_low > q_high - reach) | (k_high < final + sinks))
    whole = high - low == BLOCK - 1
    return some, every & whole[:, None] & whole[None, :]


def _indices(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row, and which: [1, 1, rows] and [1, 1, rows, columns] int32."""
    count = blocks.sum(-1, dtype=torch.int32)
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return count[None, None], order[None, None].contiguous()
