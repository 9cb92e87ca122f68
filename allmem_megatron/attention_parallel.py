"""Attention over context-parallel ranks: keys and values that come from the ranks before.

The window needs the W - 1 keys before the shard, of its first document only, over as many ranks as
they lie on, and that document's first s tokens (the sinks) where they lie before those; each key
comes once. Full attention needs every key of the document before the shard, or, in mode "a2a", an
all-to-all that gives each rank all tokens of some heads, which shares the work evenly.

Keys are sent right after the projections; a rank first attends within the documents that begin in
its shard, then waits for what the first document needs.

Shapes: B sequences, T tokens of this rank, H query heads of this rank, G key-value heads of this
rank, K head width, R context-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from allmem_megatron.context_parallel import ContextShard, by_heads
from allmem_megatron.exchange import Key, Spec
from kernels.swa import causal_attention, continued_attention, sliding_window_attention

Span = tuple[int, int]
"""Tokens [start, stop), counted over all ranks; none if the two are equal."""


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What a query sees: its window and the sinks, or everything before it."""

    window_size: int | None
    num_sinks: int = 0

    def before(self, shard: ContextShard) -> tuple[Span, Span]:
        """Tokens before `shard` that its queries see: sinks, and those next to the shard."""
        first, start = shard.document_start, shard.start
        if self.window_size is None:
            return (first, first), (first, start)
        near = max(first, start - (self.window_size - 1))
        return (first, min(first + self.num_sinks, near)), (near, start)

    def before_on(self, shard: ContextShard, rank: int) -> tuple[Span, Span] | None:
        """Those of them that `rank` holds; None if it holds none."""
        spans = tuple(_overlap(span, shard.bounds(rank)) for span in self.before(shard))
        sinks, near = spans
        return None if sinks[0] == sinks[1] and near[0] == near[1] else (sinks, near)

    def within(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Attention of documents that begin here."""
        if self.window_size is None:
            return causal_attention(q, k, v, cu_seqlens=cu_seqlens)
        return sliding_window_attention(
            q,
            k,
            v,
            window_size=self.window_size,
            num_sinks=self.num_sinks,
            cu_seqlens=cu_seqlens,
        )


def attention_over_ranks(
    q: Tensor, k: Tensor, v: Tensor, shard: ContextShard, reach: Reach, key: Key
) -> Tensor:
    """Attention of one rank's tokens to those of all ranks.

    Args:
        q: [B, T, H, K], rotated by positions within documents, as k is.
        k: [B, T, G, K].
        v: [B, T, G, K].
        shard: where the tokens lie.
        reach: what a query sees.
        key: names the messages, (layer, what).

    Returns:
        [B, T, H, K].
    """
    if reach.window_size is None and shard.mode == "a2a" and k.shape[2] % shard.size == 0:
        return _full_by_heads(q, k, v, shard, key)
    send_keys(k, v, shard, reach, key)
    bounds = shard.local_cu_seqlens
    sources = _sources(shard, reach)
    if not sources:  # the shard begins with a document, or no query looks back
        return reach.within(q, k, v, bounds)
    for source, spans in sources:
        shard.exchange.expect(key, k, _specs(k, spans), source)
    head = q.shape[1] if bounds is None else int(bounds[1])
    # split, not slices: the gradient of a slice is a tensor of the whole shard
    parts = [x.split([head, x.shape[1] - head], 1) for x in (q, k, v)]
    (q, q_rest), (k, k_rest), (v, v_rest) = parts
    rest = []
    if bounds is not None and len(bounds) > 2:
        rest.append(reach.within(q_rest, k_rest, v_rest, bounds[1:] - head))
    came = [shard.exchange.receive(key, k, _specs(k, spans), source) for source, spans in sources]
    sink_k, sink_v, near_k, near_v = (
        torch.cat(pieces, 1) for pieces in zip(*reversed(came), strict=True)
    )
    out = continued_attention(
        q,
        torch.cat((near_k, k), 1),
        torch.cat((near_v, v), 1),
        position=shard.start - shard.document_start,
        window_size=reach.window_size,
        num_sinks=reach.num_sinks,
        sinks=(sink_k, sink_v),
    )
    return torch.cat((out, *rest), 1)


def send_keys(k: Tensor, v: Tensor, shard: ContextShard, reach: Reach, key: Key) -> None:
    """Sends each later rank the keys and values of this shard that its queries see."""
    messages: list[tuple[tuple[Span, Span], list[int]]] = []
    for rank in range(shard.rank + 1, shard.size):
        spans = reach.before_on(shard.at(rank), shard.rank)
        if spans is None:
            continue
        if messages and messages[-1][0] == spans:
            messages[-1][1].append(rank)  # one buffer for all that see the same
        else:
            messages.append((spans, [rank]))
    for spans, ranks in messages:
        pieces = [x[:, a - shard.start : b - shard.start] for a, b in spans for x in (k, v)]
        shard.exchange.send(key, k, pieces, ranks)


def _sources(shard: ContextShard, reach: Reach) -> list[tuple[int, tuple[Span, Span]]]:
    """The ranks that send to this one, nearest first, and what."""
    found = ((rank, reach.before_on(shard, rank)) for rank in reversed(range(shard.rank)))
    return [(rank, spans) for rank, spans in found if spans is not None]


def _specs(k: Tensor, spans: tuple[Span, Span]) -> list[Spec]:
    """Of k and v of the sinks, then of k and v next to the shard."""
    rows, _, heads, width = k.shape
    return [((rows, b - a, heads, width), k.dtype) for a, b in spans for _ in range(2)]


def _overlap(span: Span, bounds: Span) -> Span:
    start = min(max(span[0], bounds[0]), bounds[1])
    return start, max(start, min(span[1], bounds[1]))


def _full_by_heads(q: Tensor, k: Tensor, v: Tensor, shard: ContextShard, key: Key) -> Tensor:
    """Full attention over all tokens for 1/R of the heads on each rank."""
    group = q.shape[2] // k.shape[2]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # [B, R T, G/R, group K] -> [B, R T, H/R, K]: a key-value head's queries lie together
        q = q.unflatten(3, (group, -1)).flatten(2, 3)
        out = causal_attention(q, k, v, cu_seqlens=shard.cu_seqlens)
        return out.unflatten(2, (-1, group)).flatten(3)

    queries = q.unflatten(2, (-1, group)).flatten(3)  # [B, T, H, K] -> [B, T, G, group K]
    out = by_heads(attend, (queries, k, v), shard, key)
    return out.unflatten(3, (group, -1)).flatten(2, 3)
