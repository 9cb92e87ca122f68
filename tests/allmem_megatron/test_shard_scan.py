"""Shards scanned one after another equal one scan: outputs and all gradients, any borders."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from allmem_megatron.context_parallel import ContextShard
from allmem_megatron.shard_scan import (
    ShardDocuments,
    StateLayout,
    halo_of,
    scan_shard,
    ssd_scan_shard,
)
from kernels.ssd import ssd_scan
from kernels.ttt_memory import FastWeights, memory_scan

HEADS, WIDTH, HIDDEN = 2, 3, 4


def leaves(rows: int, tokens: int, seed: int) -> tuple[list[Tensor], FastWeights]:
    """q, k, v, eta, mu and fast weights that ask for gradients, float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = (normal(rows, tokens, HEADS, WIDTH) for _ in range(3))
    eta = torch.rand(rows, tokens, HEADS, 3, generator=generator, dtype=torch.float64) * 0.3
    mu = torch.rand(rows, tokens, HEADS, generator=generator, dtype=torch.float64)
    streams = [x.requires_grad_() for x in (q, k, v, eta, mu)]
    shapes = ((HEADS, HIDDEN, WIDTH), (HEADS, HIDDEN, WIDTH), (HEADS, WIDTH, HIDDEN))
    return streams, FastWeights(*(normal(*shape).requires_grad_() for shape in shapes))


class Line:
    """Ranks one after another in one process: what one sends, the next one receives."""

    def __init__(self) -> None:
        self.messages: list[list[Tensor]] = []
        self.order: list[str] = []

    def receive(self, specs: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
        self.order.append("receive")
        messages = self.messages.pop(0)
        assert [(tuple(m.shape), m.dtype) for m in messages] == list(specs)
        return messages

    def send(self, out: Tensor, messages: list[Tensor]) -> Tensor:
        self.order.append("send")
        self.messages.append(messages)
        return out


def shards_of(tokens: int, ranks: int, bounds: list[int] | None) -> list[ContextShard]:
    """The shard of every rank; none of them speaks to another."""
    each = tokens // ranks
    first = ContextShard(
        exchange=None,
        mode="wavefront",
        rank=0,
        size=ranks,
        start=0,
        stop=each,
        num_tokens=tokens,
        cu_seqlens=None if bounds is None else torch.tensor(bounds),
    )
    return [first.at(rank) for rank in range(ranks)]


def gradients_of(out: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    grads = torch.autograd.grad((out * weight).sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def assert_same(one: Tensor, many: Tensor, parameters: Sequence[Tensor]) -> None:
    torch.testing.assert_close(many, one, rtol=1e-9, atol=1e-9)
    for mine, theirs in zip(
        gradients_of(many, parameters), gradients_of(one, parameters), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, int, list[int] | None, int, int]:
    """Ranks, tokens of each, global bounds (empty documents too) or None, chunk size, rows."""
    ranks = draw(st.integers(1, 5))
    tokens = draw(st.integers(1, 9))
    inner = st.lists(st.integers(0, ranks * tokens), max_size=6)
    bounds = draw(st.none() | inner.map(lambda cuts: [0, *sorted(cuts), ranks * tokens]))
    return ranks, tokens, bounds, draw(st.integers(1, 14)), 1 if bounds else draw(st.integers(1, 2))


@settings(max_examples=60, deadline=None)
@given(layouts(), st.booleans())
def test_shards_one_after_another_equal_one_scan(layout, strange):
    ranks, tokens, bounds, chunk, rows = layout
    options = {"chunk_size": chunk, **({"clip": 0.4, "decay": 0.1} if strange else {})}
    streams, weights = leaves(rows, ranks * tokens, seed=tokens)
    packed = None if bounds is None else torch.tensor(bounds)
    one, _ = memory_scan(*streams, weights, cu_seqlens=packed, **options)
    line, parts = Line(), []
    for shard in shards_of(ranks * tokens, ranks, bounds):
        own = tuple(x[:, shard.start : shard.stop] for x in streams)
        ends = {"receive": line.receive, "send": line.send}
        parts.append(scan_shard(own, weights, ShardDocuments.of(shard), **ends, **options))
    assert not line.messages
    assert_same(one, torch.cat(parts, 1), [*streams, *weights])


@settings(max_examples=30, deadline=None)
@given(layouts())
def test_ssd_shards_one_after_another_equal_one_scan(layout):
    ranks, tokens, bounds, _, rows = layout
    (c, b, x, _, dt), _ = leaves(rows, ranks * tokens, seed=tokens)
    a_log = torch.tensor([0.1, -0.4], dtype=torch.float64, requires_grad=True)
    packed = None if bounds is None else torch.tensor(bounds)
    one, _ = ssd_scan(x, dt, a_log, b, c, cu_seqlens=packed)
    line, parts = Line(), []
    for shard in shards_of(ranks * tokens, ranks, bounds):
        own = tuple(y[:, shard.start : shard.stop] for y in (x, dt, b, c))
        ends = {"receive": line.receive, "send": line.send}
        parts.append(ssd_scan_shard(own, a_log, ShardDocuments.of(shard), **ends))
    assert_same(one, torch.cat(parts, 1), [x, dt, b, c, a_log])


@settings(max_examples=60, deadline=None)
@given(layouts(), st.integers(1, 12))
def test_halo_is_what_lies_before_in_the_same_document(layout, reach):
    ranks, tokens, bounds, _, _ = layout
    shards = shards_of(ranks * tokens, ranks, bounds)
    owner = [t // tokens for t in range(ranks * tokens)]
    edges = [0, ranks * tokens] if bounds is None else bounds
    document = [sum(edge <= t for edge in edges) for t in range(ranks * tokens)]
    for shard in shards:
        want = [
            (owner[t], t)
            for t in range(max(0, shard.start - reach), shard.start)
            if document[t] == document[shard.start]
        ]
        pieces = halo_of(shards[0], shard.rank, reach)
        assert sorted((r, t) for r, lo, hi in pieces for t in range(lo, hi)) == want
        assert [r for r, _, _ in pieces] == sorted({r for r, _ in want}, reverse=True)


def test_documents_that_begin_inside_are_computed_and_sent_before_the_wait():
    streams, weights = leaves(1, 12, seed=0)
    documents = ShardDocuments.of(shards_of(18, 3, [0, 7, 18])[1])  # tokens 6 to 11
    assert documents.before == 6
    assert documents.leaves
    line = Line()
    layout = StateLayout.of(
        streams[1], streams[3], weights, num_rows=1, num_pending=documents.before % 4
    )
    asked: list[str] = line.order
    state = memory_scan(*(x[:, :6] for x in streams), weights, chunk_size=4)[1]
    first = layout.pack(state)

    def receive(specs):
        asked.append("receive")
        return first

    shard = tuple(x[:, 6:] for x in streams)
    scan_shard(shard, weights, documents, receive=receive, send=line.send, chunk_size=4)
    assert asked == ["send", "receive"]


@pytest.mark.parametrize("num_pending", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_state_survives_the_way_bit_for_bit(dtype, num_pending):
    streams, weights = leaves(2, 4 + num_pending, seed=1)
    q, k, v, eta, mu = (x.to(dtype) for x in streams)
    rates = torch.float32  # float64 activations with float32 rates: both keep their dtype
    _, state = memory_scan(
        q, k, v, eta.to(rates), mu.to(rates), weights.map(lambda w: w.to(dtype)), chunk_size=4
    )
    layout = StateLayout.of(k, eta.to(rates), weights, num_rows=2, num_pending=num_pending)
    messages = layout.pack(state)
    assert len(messages) == (2 if dtype == torch.bfloat16 and num_pending else 1)
    assert layout.num_bytes == sum(m.numel() * m.element_size() for m in messages)
    back = layout.unpack(messages)
    pairs = zip(
        (*state.weights, *state.momentum, *state.pending()),
        (*back.weights, *back.momentum, *back.pending()),
        strict=True,
    )
    for mine, theirs in pairs:
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
    assert torch.equal(state.pending_length, back.pending_length)


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_chunks_of_all_shards_are_those_of_the_sequence(layout):
    ranks, tokens, bounds, chunk, _ = layout
    edges = [0, ranks * tokens] if bounds is None else bounds
    want = sum((b - a) // chunk for a, b in itertools.pairwise(edges))
    found = [
        ShardDocuments.of(shard).complete_chunks(chunk)
        for shard in shards_of(ranks * tokens, ranks, bounds)
    ]
    assert sum(found) == want
