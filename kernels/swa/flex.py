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
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if wanted and not q.is_cuda:
        raise ValueError(
            f"backend='flex' cannot run: FlexAttention has no gradients on {q.device}; "
            "set backend='reference' or 'auto'"
        )
    if q.shape[1] == 0:
        return q * 1
    bounds = [0, q.shape[1]] if cu_seqlens is None else document_starts(q, cu_seqlens)
    mask = window_mask(tuple(bounds), window_size, num_sinks, q.device)
    attend = _compiled() if q.is_cuda else cast(Callable[..., Any], flex_attention)
    # [B, T, H, K] -> [B, H, T, K]
    heads = (x.transpose(1, 2) for x in (q, k, v))
    out: Tensor = attend(*heads, block_mask=mask, scale=scale, enable_gqa=q.shape[2] != k.shape[2])
    return out.transpose(1, 2)


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


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
