"""A recurrence over one rank's shard of a sequence: what it needs from its neighbours, and when.

Rank r of R holds the tokens [rT/R, (r+1)T/R). Each computes the documents that begin in its shard,
receives the state of the one that began before it, scans, and sends the state of the last document
on. For the memory (equations (8) to (11) of AllMem, arXiv 2602.13680) the state is a `MemoryState`:
W, M and the unfinished chunk; shards need not be multiples of the chunk, and a chunk may be longer
than a shard. All sizes follow from the document bounds, which every rank knows.

Nothing here communicates: messages come and go through `receive` and `send`.

Shapes: B sequences, T tokens of this rank, H memory heads of this rank, K head width, F hidden
width of a head, N state columns, P pending tokens, R context-parallel ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar, cast

import torch
from torch import Tensor

from allmem_megatron.context_parallel import ContextShard
from allmem_megatron.exchange import Spec
from kernels.ssd import ssd_scan
from kernels.ttt_memory import FastWeights, MemoryState, memory_scan

State = TypeVar("State")
Streams = tuple[Tensor, ...]


def scan_in_order(
    scan: Callable[[Streams, State | None, Tensor | None, bool], tuple[Tensor, State]],
    streams: Streams,
    bounds: Tensor | None,
    *,
    receive: Callable[[], State] | None,
    send: Callable[[Tensor, State], Tensor] | None,
) -> Tensor:
    """Scan one rank's shard: first what needs no other rank, then the document that goes on.

    Args:
        scan: (streams, state or None, bounds or None, whether the state is wanted) -> (out, state
            of every row), as `memory_scan`.
        streams: tensors `[B, T, ...]` of this shard.
        bounds: int `[N + 1]` document bounds inside the shard (B = 1), none of them empty; None:
            every row is one document.
        receive: gives the state of the first document (of all rows) at the shard's start, once it
            is there; None: that document starts here.
        send: takes (out, state) of the last document (of all rows) at the shard's end, sends the
            state on and gives out back; None: it ends here.

    Returns:
        out `[B, T, ...]`, of all documents.
    """
    if bounds is None or len(bounds) == 2:
        out, state = scan(streams, receive() if receive else None, None, send is not None)
        return send(out, state) if send else out
    head = int(bounds[1]) if receive else 0
    whole = streams[0].shape[1]
    # split, not slices: the gradient of a slice is a tensor of the whole shard
    parts = [x.split([head, whole - head], 1) for x in streams]
    inner = bounds[1:] - head if receive else bounds
    rest, state = scan(tuple(part[1] for part in parts), None, inner, send is not None)
    if send:
        rest = send(rest, state)
    if not receive:
        return rest
    first, _ = scan(tuple(part[0] for part in parts), receive(), None, False)
    return torch.cat((first, rest), 1)


# ------------------------------------------------------------------------------- what travels


@dataclass(frozen=True)
class StateLayout:
    """Sizes of a `MemoryState` of rows that all have the same number of pending tokens."""

    num_rows: int
    num_pending: int
    num_heads: int
    head_dim: int
    hidden_dim: int
    wide: torch.dtype
    """Of W, M and, on the way, of eta and mu."""
    narrow: torch.dtype
    """Of the pending keys and values."""
    rates: torch.dtype
    """Of eta and mu at both ends."""

    @classmethod
    def of(
        cls, k: Tensor, eta: Tensor, weights: FastWeights, *, num_rows: int, num_pending: int
    ) -> StateLayout:
        """The layout of the state of a scan with keys k `[B, T, H, K]` and rates eta."""
        heads, hidden, width = weights.gate.shape
        wide = torch.promote_types(k.dtype, torch.float32)
        return cls(num_rows, num_pending, heads, width, hidden, wide, k.dtype, eta.dtype)

    def _parts(self) -> list[Spec]:
        """Shape and dtype on the way of W, M (gate, up, down each), eta, mu, k, v."""
        rows, pending, heads = self.num_rows, self.num_pending, self.num_heads
        across = (rows, heads, self.hidden_dim, self.head_dim)
        back = (rows, heads, self.head_dim, self.hidden_dim)
        wide = [across, across, back] * 2 + [(rows, pending, heads, 3), (rows, pending, heads)]
        narrow = [(rows, pending, heads, self.head_dim)] * 2
        return [(s, self.wide) for s in wide] + [(s, self.narrow) for s in narrow]

    @property
    def specs(self) -> list[Spec]:
        """Shape and dtype of each message: one flat tensor per dtype, none of them empty."""
        sizes: dict[torch.dtype, int] = {}
        for shape, dtype in self._parts():
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
        return [((size,), dtype) for dtype, size in sizes.items() if size]

    @property
    def num_bytes(self) -> int:
        """Bytes of all messages."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.specs)

    def pack(self, state: MemoryState) -> list[Tensor]:
        """The messages that `unpack` turns back into `state`; differentiable."""
        pending = [x[:, : self.num_pending] for x in state.pending()]
        k, v, eta, mu = pending
        tensors = [*state.weights, *state.momentum, eta, mu, k, v]
        flat: dict[torch.dtype, list[Tensor]] = {}
        for tensor, (_, dtype) in zip(tensors, self._parts(), strict=True):
            flat.setdefault(dtype, []).append(tensor.to(dtype).flatten())
        return [torch.cat(flat[dtype]) for _, dtype in self.specs]

    def unpack(self, messages: Sequence[Tensor]) -> MemoryState:
        """The state that was packed into `messages`."""
        left = {dtype: message for (_, dtype), message in zip(self.specs, messages, strict=True)}
        sizes: dict[torch.dtype, list[int]] = {}
        for shape, dtype in self._parts():
            sizes.setdefault(dtype, []).append(math.prod(shape))
        pieces: dict[torch.dtype, Iterator[Tensor]] = {
            dtype: iter(left[dtype].split(sizes[dtype])) for dtype in left
        }
        empty = messages[0].new_empty(0)
        parts = [
            (next(pieces[dtype]) if dtype in pieces else empty.to(dtype)).view(shape)
            for shape, dtype in self._parts()
        ]
        eta, mu, k, v = parts[6:]
        pending = (k, v, eta.to(self.rates), mu.to(self.rates))
        return MemoryState.of(tuple(parts[:6]), pending, [self.num_pending] * self.num_rows)


# ------------------------------------------------------------------------------- where tokens lie


def halo_of(shard: ContextShard, rank: int, reach: int) -> list[tuple[int, int, int]]:
    """The last `reach` tokens before a rank's shard, as far as they are of its first document.

    Args:
        shard: of any rank.
        rank: whose halo.
        reach: tokens looked back.

    Returns:
        (rank that holds them, first, one past the last token), nearest rank first.
    """
    its = shard.at(rank)
    begin = max(its.start - reach, its.document_start)
    shards = ((source, *shard.bounds(source)) for source in reversed(range(rank)))
    pieces = ((source, max(begin, lo), min(its.start, hi)) for source, lo, hi in shards)
    return [piece for piece in pieces if piece[1] < piece[2]]


@dataclass(frozen=True)
class ShardDocuments:
    """The documents of one rank's shard."""

    bounds: Tensor | None
    """int `[N + 1]`, bounds inside the shard, none empty; None: every row is one document."""
    num_tokens: int
    """T, tokens of the shard."""
    before: int
    """Tokens of the first document (of all rows) in earlier ranks; 0: it starts here."""
    last: int
    """Tokens of the last document up to the shard's end, those in earlier ranks counted."""
    leaves: bool
    """The last document goes on in the next rank."""

    @classmethod
    def of(cls, shard: ContextShard) -> ShardDocuments:
        """The documents of a shard."""
        num_tokens = shard.stop - shard.start
        before = shard.start - shard.document_start
        bounds = shard.local_cu_seqlens
        last = before + num_tokens
        if bounds is not None and len(bounds) > 2:
            last = num_tokens - int(bounds[-2])
        return cls(bounds, num_tokens, before, last, shard.leaves)

    def complete_chunks(self, chunk_size: int) -> int:
        """Chunks that end in this shard: of all its documents, of each row where there are none."""
        ends = [0, self.num_tokens] if self.bounds is None else self.bounds.tolist()
        lengths = [stop - start for start, stop in pairwise(ends)]
        lengths[0] += self.before % chunk_size
        return sum(length // chunk_size for length in lengths)


# ------------------------------------------------------------------------------- the scans


def scan_shard(
    streams: Streams,
    weights: FastWeights,
    documents: ShardDocuments,
    *,
    receive: Callable[[list[Spec]], Sequence[Tensor]],
    send: Callable[[Tensor, list[Tensor]], Tensor],
    chunk_size: int,
    clip: float | None = None,
    decay: float | None = None,
) -> Tensor:
    """`memory_scan` over one rank's shard, its neighbours' states coming and going as messages.

    Args:
        streams: q, k, v `[B, T, H, K]`, eta `[B, T, H, 3]`, mu `[B, T, H]` of the shard.
        weights: initial fast weights.
        documents: of the shard. Where `before` > 0, `receive(specs)` is called once; where
            `leaves`, `send(out, messages)` once, and gives out back.
        chunk_size, clip, decay: as in `memory_scan`.

    Returns:
        out `[B, T, H, K]`.
    """
    q, k, _, eta, _ = streams
    rows = q.shape[0]

    def layout(num_before: int) -> StateLayout:
        pending = num_before % chunk_size
        return StateLayout.of(k, eta, weights, num_rows=rows, num_pending=pending)

    def scan(
        parts: Streams, state: MemoryState | None, bounds: Tensor | None, wanted: bool
    ) -> tuple[Tensor, MemoryState]:
        q, k, v, eta, mu = parts
        out, after = memory_scan(
            q,
            k,
            v,
            eta,
            mu,
            weights,
            state,
            chunk_size=chunk_size,
            cu_seqlens=bounds,
            clip=clip,
            decay=decay,
            return_state=wanted,
        )
        # without `wanted` nobody looks at it
        return out, cast(MemoryState, after)

    def receive_state() -> MemoryState:
        entering = layout(documents.before)
        return entering.unpack(receive(entering.specs))

    def send_state(out: Tensor, state: MemoryState) -> Tensor:
        if documents.bounds is not None:
            state = state.select([state.num_rows - 1])
        return send(out, layout(documents.last).pack(state))

    return scan_in_order(
        scan,
        streams,
        documents.bounds,
        receive=receive_state if documents.before else None,
        send=send_state if documents.leaves else None,
    )


def ssd_scan_shard(
    streams: Streams,
    a_log: Tensor,
    documents: ShardDocuments,
    *,
    receive: Callable[[list[Spec]], Sequence[Tensor]],
    send: Callable[[Tensor, list[Tensor]], Tensor],
) -> Tensor:
    """`ssd_scan` over one rank's shard; see `scan_shard`.

    Args:
        streams: x `[B, T, H, K]`, dt `[B, T, H]`, b and c `[B, T, H, N]` of the shard.
        a_log: `[H]`.
        documents: of the shard.

    Returns:
        y `[B, T, H, K]`.
    """
    x, _, b, _ = streams
    wide = torch.promote_types(x.dtype, torch.float32)
    spec: Spec = ((x.shape[0], *x.shape[2:], b.shape[-1]), wide)

    def scan(
        parts: Streams, state: Tensor | None, bounds: Tensor | None, wanted: bool
    ) -> tuple[Tensor, Tensor]:
        del wanted
        x, dt, b, c = parts
        return ssd_scan(x, dt, a_log, b, c, state=state, cu_seqlens=bounds)

    def send_state(out: Tensor, state: Tensor) -> Tensor:
        return send(out, [state if documents.bounds is None else state[-1:]])

    return scan_in_order(
        scan,
        streams,
        documents.bounds,
        receive=(lambda: receive([spec])[0]) if documents.before else None,
        send=send_state if documents.leaves else None,
    )
