"""Sliding-window attention with sinks in plain PyTorch: equation (1) of AllMem, arXiv 2602.13680.

Query t sees key j iff ``j <= t and (t - j < W or j < s)``: the W keys of the window, its own
included, and the first s tokens of the document. A sink that lies inside the window counts once.

Shape letters: B sequences, N documents, T tokens, H query heads, G key-value heads (grouped-query
attention: H is a multiple of G), K head width, W window, s sinks, C block of queries.

Memory is linear in T: queries go in blocks of W/2, and a block is given the sinks and the blocks of
keys it can reach. This file imports torch and the standard library only: exported models carry a
copy of it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

MASK_ELEMENTS = 1 << 24  # the most mask entries made at once, unless one block needs more
SMALLEST_BLOCK = 32  # queries: smaller blocks waste time on calls, not on scores


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
    """Causal attention to the last ``window_size`` tokens and the document's first ``num_sinks``.

    Args:
        q: ``[B, T, H, K]``, positions already rotated in.
        k: ``[B, T, G, K]``.
        v: ``[B, T, G, K]``.
        window_size: W in tokens, the query's own included.
        num_sinks: s, the tokens at each document's start that every later query sees; may be 0.
        cu_seqlens: int ``[N + 1]`` document starts and T of a packed sequence (B = 1); None: each
            row is a document.
        scale: of the scores; ``K ** -0.5`` if None.

    Returns:
        ``[B, T, H, K]`` in q's dtype.

    Raises:
        ValueError: shapes that do not fit, ``window_size < 1`` or ``num_sinks < 0``.
    """
    _check(q, k, v)
    _check_window(window_size, num_sinks)
    return _per_document(q, k, v, cu_seqlens, scale, window_size, num_sinks)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Full causal attention, the teacher's; arguments as in ``sliding_window_attention``."""
    _check(q, k, v)
    return _per_document(q, k, v, cu_seqlens, scale, None, 0)


def attention_with_positions(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_positions: Tensor,
    k_positions: Tensor,
    window_size: int | None,
    num_sinks: int,
    scale: float | None = None,
) -> Tensor:
    """The same function over a cache whose slots stand in any order: a ring of keys, and sinks.

    A key must not stand in two slots. The mask has ``B * Tq * Tk`` entries: for few queries a call.

    Args:
        q: ``[B, Tq, H, K]``.
        k: ``[B, Tk, G, K]``.
        v: ``[B, Tk, G, K]``.
        q_positions: int ``[B, Tq]`` position of each query in its document.
        k_positions: int ``[B, Tk]`` position of each key; -1 marks an empty slot.
        window_size: W in tokens; None for full causal attention.
        num_sinks: s.
        scale: of the scores; ``K ** -0.5`` if None.

    Returns:
        ``[B, Tq, H, K]`` in q's dtype; 0 for a query that sees no key.

    Raises:
        ValueError: shapes that do not fit, ``window_size < 1`` or ``num_sinks < 0``.
    """
    _check(q, k, v)
    _check_window(1 if window_size is None else window_size, num_sinks)
    for name, positions, like in (("q_positions", q_positions, q), ("k_positions", k_positions, k)):
        if positions.shape != like.shape[:2]:
            raise ValueError(
                f"{name} of shape {list(positions.shape)} does not fit; give it "
                f"{list(like.shape[:2])}, one for each token"
            )
    query, key = q_positions[:, :, None], k_positions[:, None, :]
    seen = (key >= 0) & (key <= query)
    if window_size is not None:
        seen &= (query - key < window_size) | (key < num_sinks)
    blind = ~seen.any(-1)  # a query without keys: attend to anything, then give 0
    out = _attend(
        _heads_first(q),
        _heads_first(k),
        _heads_first(v),
        scale,
        mask=(seen | blind[..., None])[:, None],
    )
    return out.transpose(1, 2).masked_fill(blind[..., None, None], 0)


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)  # [B, T, H, K] -> [B, H, T, K]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, *, mask: Tensor | None = None
) -> Tensor:
    """softmax(q k^T) v for ``[B, H, T, K]``; causal where no mask is given."""
    group = q.shape[1] // k.shape[1]
    if group > 1 and q.device.type != "cpu":  # CUDA's kernels of linear memory want equal heads
        k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=group > 1
    )


def _per_document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    scale: float | None,
    window: int | None,
    sinks: int,
) -> Tensor:
    """Attention within each document; documents of one length go together."""
    if cu_seqlens is None:
        return _rows(q, k, v, scale, window, sinks)
    starts = cu_seqlens.tolist()
    if (
        q.shape[0] != 1
        or len(starts) < 2
        or starts[0] != 0
        or starts[-1] != q.shape[1]
        or sorted(starts) != starts
    ):
        raise ValueError(
            f"cu_seqlens from {starts[0]} to {starts[-1]} does not rise from 0 to T={q.shape[1]} "
            f"in one packed sequence (B={q.shape[0]}); give the document starts and T, with B=1"
        )
    lengths = [end - start for start, end in pairwise(starts)]
    if len(set(lengths)) == 1:
        q_r, k_r, v_r = (x.reshape(len(lengths), lengths[0], *x.shape[2:]) for x in (q, k, v))
        return _rows(q_r, k_r, v_r, scale, window, sinks).reshape(q.shape)
    # split, not slices: the gradient of a slice is a tensor of the whole sequence
    documents = zip(q.split(lengths, 1), k.split(lengths, 1), v.split(lengths, 1), strict=True)
    return torch.cat([_rows(*document, scale, window, sinks) for document in documents], 1)


def _rows(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, sinks: int
) -> Tensor:
    """Attention of rows that are one document each."""
    num_tokens = q.shape[1]
    if num_tokens == 0:
        return q
    if window is None or num_tokens <= window:
        return _attend(_heads_first(q), _heads_first(k), _heads_first(v), scale).transpose(1, 2)
    return _banded(q, k, v, scale, window, min(sinks, num_tokens))


def _banded(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int, sinks: int
) -> Tensor:
    """Blocks of C queries against the sinks and the blocks of keys within reach."""
    num_rows, num_tokens = q.shape[:2]
    block = min(max((window + 1) // 2, SMALLEST_BLOCK), num_tokens)
    before = -(-(window - 1) // block)  # earlier blocks of keys that a block of queries can see
    num_blocks = -(-num_tokens // block)
    padding = num_blocks * block - num_tokens

    def blocks(x: Tensor, earlier: int) -> Tensor:
        """``[B, T, G, K]`` -> ``[B, T/C, (earlier + 1) C, G, K]``: blocks with those before."""
        x = F.pad(x, (0, 0, 0, 0, earlier * block, padding)).unflatten(
            1, (num_blocks + earlier, block)
        )
        shifted = [x[:, shift : shift + num_blocks] for shift in range(earlier + 1)]
        return torch.cat(shifted, 2) if earlier else x

    per_block = block * (sinks + (before + 1) * block) * num_rows
    group = max(1, min(num_blocks, MASK_ELEMENTS // per_block))
    groups = zip(
        *(blocks(x, n).split(group, 1) for x, n in ((q, 0), (k, before), (v, before))), strict=True
    )
    sink_k, sink_v = k[:, None, :sinks], v[:, None, :sinks]
    out = []
    for index, (q_g, k_g, v_g) in enumerate(groups):
        size = q_g.shape[1]
        mask = _block_mask(index * group, size, block, before, window, sinks, q.device)
        if sinks:
            k_g = torch.cat([sink_k.expand(-1, size, -1, -1, -1), k_g], 2)
            v_g = torch.cat([sink_v.expand(-1, size, -1, -1, -1), v_g], 2)
        q_g, k_g, v_g = (_heads_first(x.flatten(0, 1)) for x in (q_g, k_g, v_g))  # [B g, H, C, K]
        if size > 1:
            mask = mask.expand(num_rows, *mask.shape).flatten(0, 1)
        result = _attend(q_g, k_g, v_g, scale, mask=mask[:, None])
        out.append(result.transpose(1, 2).unflatten(0, (num_rows, size)))
    return torch.cat(out, 1).flatten(1, 2)[:, :num_tokens]


def _block_mask(
    first: int, count: int, block: int, before: int, window: int, sinks: int, device: torch.device
) -> Tensor:
    """What ``count`` blocks from ``first`` on see, ``[count, C, s + (before + 1) C]``.

    First the sinks, then the band. A sink's own slot is seen only from outside its window: inside,
    the band already holds it.
    """
    start = (torch.arange(first, first + count, device=device) * block)[:, None, None]
    query = start + torch.arange(block, device=device)[:, None]
    key = start + torch.arange(-before * block, block, device=device)
    band = (key >= 0) & (key <= query) & (query - key < window)
    return torch.cat([query - torch.arange(sinks, device=device) >= window, band], -1)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            f"q, k, v of shapes {list(q.shape)}, {list(k.shape)}, {list(v.shape)} are not "
            "[B, T, heads, width] with k like v; reshape them to heads"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"k of shape {list(k.shape)} does not fit q of shape {list(q.shape)}; "
            "give the same B and width"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key-value heads; "
            "give q a multiple of the heads of k and v"
        )


def _check_window(window_size: int, num_sinks: int) -> None:
    if window_size < 1:
        raise ValueError(
            f"window_size={window_size} leaves a token blind to itself; set it to at least 1"
        )
    if num_sinks < 0:
        raise ValueError(f"num_sinks={num_sinks} is negative; set it to 0 for none")
