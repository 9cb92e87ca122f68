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
    check_shapes(q, k, v)
    check_window(window_size, num_sinks)
    return _per_document(q, k, v, cu_seqlens, scale, window_size, num_sinks)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Full causal attention, the teacher's; arguments as in ``sliding_window_attention``."""
    check_shapes(q, k, v)
    return _per_document(q, k, v, cu_seqlens, scale, None, 0)


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
    """The same function for queries that begin inside a document, given the keys before them.

    Linear in T with a window; without one, masks are made for blocks of queries.

    Args:
        q: ``[B, T, H, K]``, the tokens from ``position`` on of one document a row.
        k: ``[B, P + T, G, K]``: the keys of the P tokens before them that the window reaches,
            ``P = min(position, window_size - 1)``, or all of them without a window; then their own.
        v: ``[B, P + T, G, K]``.
        position: of the first query in its document.
        window_size: W in tokens; None for full causal attention.
        num_sinks: s.
        sinks: k and v ``[B, S, G, K]`` of the document's first tokens as far as they lie before
            those P: ``S = min(num_sinks, position - P)``; None if S is 0.
        scale: of the scores; ``K ** -0.5`` if None.

    Returns:
        ``[B, T, H, K]`` in q's dtype.

    Raises:
        ValueError: shapes that do not fit, ``window_size < 1`` or ``num_sinks < 0``.
    """
    check_continued(q, k, v, position, window_size, num_sinks, sinks)
    before = (k[:, :0], v[:, :0]) if sinks is None else sinks
    return _rows(q, k, v, scale, window_size, num_sinks, position, before)


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
    check_shapes(q, k, v)
    check_window(1 if window_size is None else window_size, num_sinks)
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
    if mask is not None or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] > 256:
        k, v = _equal_heads(q, k, v)  # flash attention needs no copies
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa
    )


def _equal_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v as often as q's heads need them, where the device's kernels of linear memory ask."""
    group = q.shape[1] // k.shape[1]
    if group == 1 or q.device.type == "cpu":
        return k, v
    return k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)


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
    starts = document_starts(q, cu_seqlens)
    lengths = [end - start for start, end in pairwise(starts)]
    if len(set(lengths)) == 1:
        q_r, k_r, v_r = (x.reshape(len(lengths), lengths[0], *x.shape[2:]) for x in (q, k, v))
        return _rows(q_r, k_r, v_r, scale, window, sinks).reshape(q.shape)
    # split, not slices: the gradient of a slice is a tensor of the whole sequence
    documents = zip(q.split(lengths, 1), k.split(lengths, 1), v.split(lengths, 1), strict=True)
    return torch.cat([_rows(*document, scale, window, sinks) for document in documents], 1)


def document_starts(q: Tensor, cu_seqlens: Tensor) -> list[int]:
    """Document starts and T of a packed sequence; a ValueError where they do not fit q."""
    starts: list[int] = cu_seqlens.tolist()
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
    return starts


def _rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: int | None,
    sinks: int,
    position: int = 0,
    before: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of rows that are one document each, or a part of one that begins at `position`."""
    num_tokens = q.shape[1]
    if num_tokens == 0:
        return q
    if window is None or position + num_tokens <= window:
        if k.shape[1] == num_tokens:
            return _attend(_heads_first(q), _heads_first(k), _heads_first(v), scale).transpose(1, 2)
        return _causal_after(q, k, v, scale)
    sinks = min(sinks, position + num_tokens)
    sink_k, sink_v = k[:, :sinks], v[:, :sinks]
    if before is not None:  # what is left of the sinks comes right after them
        left = sinks - before[0].shape[1]
        sink_k = torch.cat([before[0], k[:, :left]], 1)
        sink_v = torch.cat([before[1], v[:, :left]], 1)
    return _banded(q, k, v, scale, window, sink_k, sink_v, position)


def _causal_after(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Causal attention of the last T of P + T tokens, in blocks of queries."""
    num_tokens, past = q.shape[1], k.shape[1] - q.shape[1]
    block = min(max(MASK_ELEMENTS // k.shape[1], SMALLEST_BLOCK), num_tokens)
    q = _heads_first(q)
    k, v = _equal_heads(q, _heads_first(k), _heads_first(v))
    out = []
    for first, q_b in zip(range(0, num_tokens, block), q.split(block, 2), strict=True):
        query = torch.arange(first, first + q_b.shape[2], device=q.device)[:, None]
        last = past + first + q_b.shape[2]
        mask = torch.arange(-past, last - past, device=q.device) <= query
        out.append(_attend(q_b, k[:, :, :last], v[:, :, :last], scale, mask=mask))
    return torch.cat(out, 2).transpose(1, 2)


def _banded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: int,
    sink_k: Tensor,
    sink_v: Tensor,
    position: int,
) -> Tensor:
    """Blocks of C queries against the sinks and the blocks of keys within reach."""
    num_rows, num_tokens = q.shape[:2]
    past, sinks = k.shape[1] - num_tokens, sink_k.shape[1]
    block = min(max((window + 1) // 2, SMALLEST_BLOCK), num_tokens)
    before = -(-(window - 1) // block)  # earlier blocks of keys that a block of queries can see
    num_blocks = -(-num_tokens // block)
    padding = num_blocks * block - num_tokens

    def blocks(x: Tensor, earlier: int, given: int) -> Tensor:
        """``[B, T/C, (earlier + 1) C, G, K]``: blocks with those before, of which x has some."""
        x = F.pad(x, (0, 0, 0, 0, earlier * block - given, padding)).unflatten(
            1, (num_blocks + earlier, block)
        )
        shifted = [x[:, shift : shift + num_blocks] for shift in range(earlier + 1)]
        return torch.cat(shifted, 2) if earlier else x

    per_block = block * (sinks + (before + 1) * block) * num_rows
    group = max(1, min(num_blocks, MASK_ELEMENTS // per_block))
    pieces = (blocks(q, 0, 0), blocks(k, before, past), blocks(v, before, past))
    groups = zip(*(x.split(group, 1) for x in pieces), strict=True)
    sink_k, sink_v = sink_k[:, None], sink_v[:, None]
    out = []
    for index, (q_g, k_g, v_g) in enumerate(groups):
        size = q_g.shape[1]
        starts = torch.arange(index * group, index * group + size, device=q.device) * block
        mask = _block_mask(starts, block, before, past, window, sinks, position)
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
    starts: Tensor, block: int, before: int, past: int, window: int, sinks: int, position: int
) -> Tensor:
    """What blocks of queries see, ``[len(starts), C, s + (before + 1) C]``; `past` keys come first.

    First the sinks, then the band. A sink's own slot is seen only from outside its window: inside,
    the band already holds it.
    """
    device = starts.device
    starts = starts[:, None, None]
    query = starts + torch.arange(block, device=device)[:, None]
    key = starts + torch.arange(-before * block, block, device=device)
    band = (key >= -past) & (key <= query) & (query - key < window)
    return torch.cat([query + position - torch.arange(sinks, device=device) >= window, band], -1)


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuses q, k and v that do not fit each other, by a ValueError."""
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


def check_window(window_size: int, num_sinks: int) -> None:
    """Refuses a window or a number of sinks that makes no sense, by a ValueError."""
    if window_size < 1:
        raise ValueError(
            f"window_size={window_size} leaves a token blind to itself; set it to at least 1"
        )
    if num_sinks < 0:
        raise ValueError(f"num_sinks={num_sinks} is negative; set it to 0 for none")


def check_continued(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: int,
    window_size: int | None,
    num_sinks: int,
    sinks: tuple[Tensor, Tensor] | None,
) -> None:
    """Refuses arguments of `continued_attention` that do not fit, by a ValueError."""
    check_shapes(q, k, v)
    check_window(1 if window_size is None else window_size, num_sinks)
    past = position if window_size is None else min(position, window_size - 1)
    if k.shape[1] != past + q.shape[1]:
        raise ValueError(
            f"{k.shape[1]} keys do not fit {q.shape[1]} queries from position {position} on; give"
            f" the keys of the {past} tokens before them and their own"
        )
    lead = 0 if sinks is None else sinks[0].shape[1]
    wanted = 0 if window_size is None else min(num_sinks, position - past)
    if lead != wanted:
        raise ValueError(
            f"{lead} sinks do not fit; give the document's first {wanted} tokens,"
            " those before the window's"
        )
