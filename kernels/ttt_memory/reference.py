"""The memory of AllMem in plain PyTorch: equations (6) to (11) of arXiv 2602.13680 as numbered in this project.

Shape letters: B sequences, R rows (documents; R = B, or the N documents of one packed sequence), T tokens, C chunk
length, H memory heads, K head width, F hidden width of one memory head, P pending tokens.

Each row goes through its chunks strictly in order: read (8), normalise (9), write (10, 11). The rows are independent,
so step j takes the j-th complete chunk of every row that has one in one batched matrix product per matrix. Work and
memory are linear in the number of tokens: no row is padded to the longest one.

This file imports torch and the standard library only: exported models carry a copy of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-5  # of equation (9)


class FastWeights(NamedTuple):
    """The three matrices of every memory head: gate, up ``[..., H, F, K]`` and down ``[..., H, K, F]``."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def map(self, function: object) -> FastWeights:
        """Apply ``function`` (tensor to tensor) to each of the three matrices."""
        return FastWeights(*(function(matrix) for matrix in self))  # type: ignore[operator]


@dataclass(frozen=True)
class MemoryState:
    """Everything a row needs to go on: its fast weights, their momentum and the tokens of its unfinished chunk.

    Its size does not depend on the number of tokens seen. Tensors are never changed in place, and are part of the
    autograd graph of the call that made them (``detach`` cuts it).

    Attributes:
        weights: W of equation (11), matrices ``[R, H, F, K]``, ``[R, H, F, K]``, ``[R, H, K, F]``, float32
            (float64 for float64 inputs), exactly as the last write left them.
        momentum: M of equation (11), as ``weights``.
        pending_k: keys of the unfinished chunk ``[R, P, H, K]``; row i holds ``pending_length[i]`` from slot 0 on.
        pending_v: its values ``[R, P, H, K]``.
        pending_eta: its learning rates ``[R, P, H, 3]``.
        pending_mu: its per-token momentum coefficients ``[R, P, H]``.
        pending_length: int64 ``[R]``, always on the CPU (it steers the loop, and reading it must not wait for a GPU).
    """

    weights: FastWeights
    momentum: FastWeights
    pending_k: Tensor
    pending_v: Tensor
    pending_eta: Tensor
    pending_mu: Tensor
    pending_length: Tensor

    @property
    def num_rows(self) -> int:
        """R, the number of rows."""
        return self.pending_length.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (*self.weights, *self.momentum, *self._pending(), self.pending_length)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _pending(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.pending_k, self.pending_v, self.pending_eta, self.pending_mu

    def _map(self, function: object, length: Tensor) -> MemoryState:
        pending = [function(tensor) for tensor in self._pending()]  # type: ignore[operator]
        return MemoryState(
            self.weights.map(function), self.momentum.map(function), *pending, length
        )

    def to(self, device: torch.device | str) -> MemoryState:
        """The same state on ``device``; dtypes and ``pending_length`` stay as they are."""
        return self._map(lambda tensor: tensor.to(device), self.pending_length)

    def detach(self) -> MemoryState:
        """The same values, cut from the autograd graph."""
        return self._map(lambda tensor: tensor.detach(), self.pending_length)

    def select(self, rows: Sequence[int] | Tensor) -> MemoryState:
        """The state of ``rows`` (indices, repeats allowed: beams) in that order."""
        index = torch.as_tensor(rows, dtype=torch.int64).cpu()
        return self._map(
            lambda t: t.index_select(0, index.to(t.device)), self.pending_length[index]
        )


def initial_state(
    weights: FastWeights,
    num_rows: int,
    *,
    dtype: torch.dtype = torch.float32,
    pending_dtype: torch.dtype | None = None,
) -> MemoryState:
    """The state before the first token: (W0, 0) and no pending token.

    Args:
        weights: initial fast weights ``[H, F, K]``, ``[H, F, K]``, ``[H, K, F]``; gradients flow back to them.
        num_rows: R.
        dtype: of weights and momentum.
        pending_dtype: of the (empty) pending keys and values; ``dtype`` if None.
    """
    heads, _, width = weights.gate.shape
    like = weights.gate.detach()
    rows = weights.map(lambda w: w.to(dtype).expand(num_rows, *w.shape))
    zeros = rows.map(lambda w: torch.zeros_like(w, memory_format=torch.contiguous_format))
    empty = like.new_zeros(num_rows, 0, heads, width, dtype=pending_dtype or dtype)
    rates = like.new_zeros(num_rows, 0, heads, 3, dtype=dtype)
    length = torch.zeros(num_rows, dtype=torch.int64)
    return MemoryState(rows, zeros, empty, empty, rates, rates[..., 0], length)


# ---------------------------------------------------------------------------------------------- the formula


def read(q: Tensor, weights: FastWeights) -> Tensor:
    """Equations (6) and (8): ``(SiLU(Q G^T) * Q U^T) D^T + Q`` for q ``[..., C, K]``."""
    return (F.silu(q @ weights.gate.mT) * (q @ weights.up.mT)) @ weights.down.mT + q


def row_norms(weights: FastWeights) -> FastWeights:
    """L2 norm of each row of each matrix along its input dimension, kept as a last dimension of 1."""
    return weights.map(lambda w: torch.linalg.vector_norm(w, dim=-1, keepdim=True))


def normalise(weights: FastWeights, norms: FastWeights) -> FastWeights:
    """Equation (9): rows rescaled to the norms ``norms`` of the initial weights."""
    now = row_norms(weights)
    return FastWeights(
        *(w * (n / (m + NORM_EPS)) for w, n, m in zip(weights, norms, now, strict=True))
    )


def descent(k: Tensor, v: Tensor, eta: Tensor, weights: FastWeights) -> FastWeights:
    """Equation (10): minus the gradient of the inner loss (7), each token weighted by its learning rate.

    Args:
        k: ``[..., C, K]``.
        v: ``[..., C, K]``.
        eta: ``[..., C, 3]``, gate, up, down.
        weights: W~ of equation (9).
    """
    eta_gate, eta_up, eta_down = eta.unsqueeze(-1).unbind(-2)  # [..., C, 1]
    h_gate, h_up = k @ weights.gate.mT, k @ weights.up.mT  # [..., C, F]
    p = v @ weights.down  # [..., C, F]
    sigmoid = torch.sigmoid(h_gate)
    silu = h_gate * sigmoid
    slope = sigmoid + silu * (1 - sigmoid)  # SiLU'(h) = s + h s (1 - s)
    return FastWeights(
        gate=(p * h_up * slope).mT @ (k * eta_gate),
        up=(p * silu).mT @ (k * eta_up),
        down=(v * eta_down).mT @ (silu * h_up),
    )


def write(
    k: Tensor, v: Tensor, eta: Tensor, mu: Tensor, weights: FastWeights, momentum: FastWeights, norms: FastWeights,
    clip: float | None, decay: Tensor | None,
) -> tuple[FastWeights, FastWeights]:  # fmt: skip
    """Equations (9) to (11) for one complete chunk; mu is ``[R, H, 1, 1]``, decay None or ``[H, 1, 1]``."""
    base = normalise(weights, norms)
    step = descent(k, v, eta, base)
    if clip is not None:  # S min(1, clip / |S|), written so that S = 0 has a gradient
        step = step.map(
            lambda s: (
                s * (clip / torch.linalg.vector_norm(s, dim=(-2, -1), keepdim=True).clamp(min=clip))
            )
        )
    momentum = FastWeights(*(torch.addcmul(s, mu, m) for s, m in zip(step, momentum, strict=True)))
    if decay is not None:
        base = base.map(lambda w: w * (1 - decay))
    return FastWeights(*(w + m for w, m in zip(base, momentum, strict=True))), momentum


def chunk_mu(mu: Tensor, eta: Tensor) -> Tensor:
    """Equation (5): the mean over the chunk's tokens, those with all three rates 0 (padding) left out.

    Args:
        mu: ``[R, H, C]``.
        eta: ``[R, H, C, 3]``.

    Returns:
        ``[R, H, 1, 1]``; 0 for a chunk of padding only.
    """
    counts = (eta.detach() != 0).any(-1)
    return ((mu * counts).sum(-1) / counts.sum(-1).clamp(min=1))[..., None, None]


# ---------------------------------------------------------------------------------------------- the scan


def memory_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    mu: Tensor,
    weights: FastWeights,
    state: MemoryState | None = None,
    *,
    chunk_size: int,
    cu_seqlens: Tensor | None = None,
    clip: float | None = None,
    decay: float | Tensor | None = None,
    return_state: bool = True,
) -> tuple[Tensor, MemoryState | None]:
    """Read and learn online, chunk by chunk: equations (8) to (11) of AllMem (arXiv 2602.13680).

    Two calls over a split sequence equal one call, wherever the split falls: an incomplete chunk only reads, and waits
    in the state for its other tokens. Chunk boundaries count from the start of each row's document.

    Args:
        q: queries ``[B, T, H, K]``, any float dtype; the arithmetic is float32 (float64 for float64).
        k: keys, as q.
        v: values, as q.
        eta: learning rates ``[B, T, H, 3]`` in the order gate, up, down, >= 0. A token whose three rates are all 0 is
            padding: it writes nothing and is left out of the mean of equation (5).
        mu: momentum coefficients per token ``[B, T, H]``, after the sigmoid.
        weights: initial fast weights, one set for all rows; also give the norms of equation (9).
        state: what an earlier call returned, R rows, whose pending lengths may differ; None starts at (W0, 0).
        chunk_size: C in tokens, the same in all calls over one sequence.
        cu_seqlens: int ``[N + 1]`` document starts and the end T of a packed sequence (B = 1, R = N); None: R = B.
        clip: bound on the Frobenius norm of each matrix's step S, or None (the paper's setting).
        decay: share of W~ forgotten at each write, a number or ``[H]``; W = (1 - decay) W~ + M. None is the paper's.
        return_state: False saves building the state when only the outputs matter, and returns None in its place.

    Returns:
        out ``[B, T, H, K]`` in q's dtype, V^ of equation (8), and the state after the last token.

    Raises:
        ValueError: shapes that do not fit, or a state of other rows or of a longer chunk.
    """
    _check(q, k, v, eta, mu, weights, chunk_size, clip)
    starts = _row_starts(q, cu_seqlens)
    _check_state(q, weights, state, len(starts) - 1, chunk_size)
    with torch.autocast(q.device.type, enabled=False):
        dtype = torch.promote_types(q.dtype, torch.float32)
        weights = weights.map(lambda w: w.to(dtype))
        if decay is not None:
            decay = torch.as_tensor(decay, dtype=dtype, device=q.device).reshape(-1, 1, 1)
        scan = _Scan(weights, chunk_size, clip, decay, dtype)
        lengths = [end - start for start, end in zip(starts, starts[1:], strict=False)]
        pending = [0] * len(lengths) if state is None else state.pending_length.tolist()
        streams: tuple[Tensor, ...] = (q, k, v, eta, mu)
        if len(set(lengths)) <= 1 and len(set(pending)) <= 1:
            rows = [x.reshape(len(lengths), max(lengths, default=0), *x.shape[2:]) for x in streams]
            out, state = scan.uniform(*rows, state, return_state)
        else:
            flat = [x.flatten(0, 1) for x in streams]
            out, state = scan.ragged(*flat, state, starts, pending, return_state)
        return out.reshape(q.shape).to(q.dtype), state


class _Scan:
    """One call of ``memory_scan``: what all chunks share, and the two ways to cut rows into chunks."""

    def __init__(
        self,
        weights: FastWeights,
        chunk_size: int,
        clip: float | None,
        decay: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.weights, self.norms = weights, row_norms(weights)
        self.chunk_size, self.clip, self.decay, self.dtype = chunk_size, clip, decay, dtype

    def heads_first(self, x: Tensor) -> Tensor:
        """``[R, C, H, ...]`` -> ``[R, H, C, ...]`` in the state's dtype."""
        return x.transpose(1, 2).to(self.dtype, memory_format=torch.contiguous_format).contiguous()

    def write(
        self, k: Tensor, v: Tensor, eta: Tensor, mu: Tensor, memory: tuple[FastWeights, FastWeights]
    ) -> tuple[FastWeights, FastWeights]:
        """Write one chunk given as ``[R, C, H, ...]``."""
        k, v, eta, mu = (self.heads_first(x) for x in (k, v, eta, mu))
        return write(k, v, eta, chunk_mu(mu, eta), *memory, self.norms, self.clip, self.decay)

    def read(self, q: Tensor, weights: FastWeights) -> Tensor:
        """Read tokens given and returned as ``[R, C, H, K]``."""
        return read(self.heads_first(q), weights).transpose(1, 2)

    def start(self, state: MemoryState | None, num_rows: int) -> tuple[FastWeights, FastWeights]:
        """(W, M) of every row before this call's tokens."""
        if state is None:
            rows = self.weights.map(lambda w: w.expand(num_rows, *w.shape))
            return rows, rows.map(lambda w: w.new_zeros(w.shape))
        return tuple(
            part.map(lambda w: w.to(self.dtype)) for part in (state.weights, state.momentum)
        )  # type: ignore[return-value]

    def uniform(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        eta: Tensor,
        mu: Tensor,
        state: MemoryState | None,
        return_state: bool,
    ) -> tuple[Tensor, MemoryState | None]:
        """All rows of one length and one pending length: chunks are slices of ``[R, T, H, ...]``."""
        size, num_pending, memory = self.chunk_size, 0, self.start(state, q.shape[0])
        if state is not None and (num_pending := int(state.pending_length[0]) if q.shape[0] else 0):
            old = (x[:, :num_pending] for x in state._pending())
            k, v, eta, mu = (
                torch.cat([a.to(b.dtype), b], 1) for a, b in zip(old, (k, v, eta, mu), strict=True)
            )
        full, rest = divmod(k.shape[1], size)
        sizes = [size] * full + [rest]
        read_sizes = [size - num_pending] * min(full, 1) + sizes[1:] if full else [q.shape[1]]
        # split, not slices: the gradient of a slice is a tensor of the whole sequence, once for each chunk
        *k_chunks, k_rest = k.split(sizes, 1)
        *v_chunks, v_rest = v.split(sizes, 1)
        *eta_chunks, eta_rest = eta.split(sizes, 1)
        *mu_chunks, mu_rest = mu.split(sizes, 1)
        *q_chunks, q_rest = q.split(read_sizes, 1)
        out = []
        for q_j, *chunk in zip(q_chunks, k_chunks, v_chunks, eta_chunks, mu_chunks, strict=True):
            out.append(self.read(q_j, memory[0]))
            memory = self.write(*chunk, memory)
        if q_rest.shape[1]:
            out.append(self.read(q_rest, memory[0]))
        result = torch.cat(out, 1) if out else q.to(self.dtype)
        if not return_state:
            return result, None
        length = torch.full((q.shape[0],), rest, dtype=torch.int64)
        # copies: a view would keep the whole sequence alive
        return result, MemoryState(
            *memory, *(x.clone() for x in (k_rest, v_rest, eta_rest, mu_rest)), length
        )

    def ragged(
        self, q: Tensor, k: Tensor, v: Tensor, eta: Tensor, mu: Tensor, state: MemoryState | None,
        starts: list[int], pending: list[int], return_state: bool,
    ) -> tuple[Tensor, MemoryState | None]:  # fmt: skip
        """Rows of any length: tokens are ``[T, H, ...]``, row i's at ``starts[i]`` to ``starts[i + 1]``.

        Chunks are gathered by an index. Rows are taken in order of their number of complete chunks, so that those still
        active at a step are the first ones.
        """
        cut = _Cut.make(
            starts, pending, self.chunk_size, 0 if state is None else state.pending_k.shape[1]
        )
        device, num_rows = q.device, len(pending)
        if state is not None and cut.slots:
            old = (x.flatten(0, 1) for x in state._pending())
            k, v, eta, mu = (
                torch.cat([a.to(b.dtype), b]) for a, b in zip(old, (k, v, eta, mu), strict=True)
            )

        def gather(x: Tensor, index: Tensor) -> Tensor:
            return x.index_select(0, index.flatten().to(device)).unflatten(0, index.shape)

        out: list[Tensor] = []
        token_of_out: list[Tensor] = []  # the token of each row of ``out``, < 0 where there is none
        known = (
            num_rows
            if return_state or state is not None
            else cut.num_active[0]
            if cut.num_active
            else 0
        )
        first = self.start(state, num_rows)
        memory = tuple(part.map(lambda w: _take(w, cut.order[:known])) for part in first)
        if cut.num_active:
            index = cut.chunks()
            token_of_out.append(index.flatten() - num_rows * cut.slots)
            chunks = [gather(x, index).split(cut.num_active) for x in (k, v, eta, mu)]
            q_chunks = gather(q, (index - num_rows * cut.slots).clamp(min=0)).split(cut.num_active)
            finished: list[tuple[FastWeights, FastWeights]] = []
            for q_j, *chunk in zip(q_chunks, *chunks, strict=True):
                memory, done = _split_rows(memory, q_j.shape[0])
                finished.append(done)
                out.append(self.read(q_j, memory[0]).flatten(0, 1))
                memory = self.write(*chunk, memory)
            memory = _join_rows([memory, *reversed(finished)])
        if tails := list(cut.tails(fresh=state is None)):
            q_tails = gather(q, torch.cat([tail.token.clamp(min=0).flatten() for tail in tails]))
            for tail, q_tail in zip(
                tails, q_tails.split([t.token.numel() for t in tails]), strict=True
            ):
                q_tail = q_tail.unflatten(0, tail.token.shape)
                fresh = tail.ranks is None
                w = (
                    self.weights.map(lambda w: w[None])
                    if fresh
                    else memory[0].map(lambda w: _take(w, tail.ranks))
                )
                out.append(self.read(q_tail, w).flatten(0, 1))
                token_of_out.append(tail.token.flatten())
        result = q.to(self.dtype)
        if out:
            token = torch.cat(token_of_out)
            (position,) = (token >= 0).nonzero(as_tuple=True)
            inverse = torch.empty_like(position)
            inverse[token[position]] = position
            result = gather(torch.cat(out), inverse)
        if not return_state:
            return result, None
        index = cut.rests()
        rests = (gather(x, index.clamp(min=0)) for x in (k, v, eta, mu))
        kept = (index >= 0).to(device)
        rests = (x.masked_fill(~kept.view(*kept.shape, *[1] * (x.dim() - 2)), 0) for x in rests)
        final = (part.map(lambda w: _take(w, cut.ranks)) for part in memory)
        return result, MemoryState(*final, *rests, torch.tensor(cut.rest, dtype=torch.int64))


# ---------------------------------------------------------------------------------------------- cutting rows


def _take(x: Tensor, rows: Sequence[int]) -> Tensor:
    """``x[rows]``, without a copy where that is all of x in order."""
    if list(rows) == list(range(x.shape[0])):
        return x
    return x.index_select(0, torch.tensor(rows, dtype=torch.int64).to(x.device))


_Memory = tuple[FastWeights, FastWeights]


def _split_rows(memory: _Memory, num_rows: int) -> tuple[_Memory, _Memory]:
    """The first ``num_rows`` rows of (W, M), and the others."""
    if num_rows == memory[0].gate.shape[0]:
        return memory, tuple(part.map(lambda w: w[:0]) for part in memory)  # type: ignore[return-value]
    sizes = [num_rows, memory[0].gate.shape[0] - num_rows]
    pairs = [[w.split(sizes) for w in part] for part in memory]
    first, others = (
        tuple(FastWeights(*(pair[i] for pair in part)) for part in pairs) for i in (0, 1)
    )
    return first, others  # type: ignore[return-value]


def _join_rows(pieces: list[_Memory]) -> _Memory:
    """The rows of several (W, M) one after the other."""
    pieces = [piece for piece in pieces if piece[0].gate.shape[0]] or pieces[:1]
    if len(pieces) == 1:
        return pieces[0]
    weights, momentum = zip(*pieces, strict=True)
    return tuple(
        FastWeights(*(torch.cat(ws) for ws in zip(*part, strict=True)))
        for part in (weights, momentum)
    )  # type: ignore[return-value]


class _Tail(NamedTuple):
    """Rows whose incomplete last chunk is read together."""

    token: Tensor  # [G, L] index of each new token, -1 where a row is shorter
    ranks: list[int] | None  # the G rows' places in ``_Cut.order``; None: rows that still hold W0


class _Cut(NamedTuple):
    """Where each row's chunks lie. Indices count ``R * slots`` pending slots first, then the new tokens."""

    starts: list[int]  # [R] first new token of each row
    pending: list[int]  # [R] pending tokens before it
    full: list[int]  # [R] complete chunks
    rest: list[int]  # [R] tokens left over, pending after this call
    order: list[int]  # rows, most complete chunks first
    ranks: list[int]  # [R] place of each row in ``order``
    num_active: list[int]  # rows with a j-th complete chunk, for each j
    size: int
    slots: int  # P of the state that comes in

    @classmethod
    def make(cls, starts: list[int], pending: list[int], size: int, slots: int) -> _Cut:
        """Cut rows with new tokens from ``starts[i]`` to ``starts[i + 1]``."""
        totals = [
            p + end - start for p, start, end in zip(pending, starts, starts[1:], strict=False)
        ]
        full, rest = [t // size for t in totals], [t % size for t in totals]
        order = sorted(range(len(full)), key=lambda row: -full[row])
        ranks = [0] * len(order)
        for place, row in enumerate(order):
            ranks[row] = place
        num_active, active = [], len(order)
        for step in range(max(full, default=0)):
            while full[order[active - 1]] <= step:
                active -= 1
            num_active.append(active)
        return cls(starts[:-1], pending, full, rest, order, ranks, num_active, size, slots)

    def _index(self, rows: Tensor, position: Tensor) -> Tensor:
        """Index of the tokens at ``position`` ``[..., S]`` (pending ones count) of ``rows`` ``[..., 1]``."""
        pending, starts = torch.tensor(self.pending)[rows], torch.tensor(self.starts)[rows]
        new = len(self.full) * self.slots + starts - pending + position
        return torch.where(position < pending, rows * self.slots + position, new)

    def chunks(self) -> Tensor:
        """Index ``[sum(num_active), C]`` of the complete chunks, step by step."""
        order = torch.tensor(self.order)
        rows = torch.cat([order[:active] for active in self.num_active])
        steps = torch.arange(len(self.num_active)).repeat_interleave(torch.tensor(self.num_active))
        return self._index(rows[:, None], steps[:, None] * self.size + torch.arange(self.size))

    def rests(self) -> Tensor:
        """Index ``[R, max(rest)]`` of the tokens left pending, -1 where a row has fewer."""
        rows = torch.arange(len(self.full))[:, None]
        slot = torch.arange(max(self.rest, default=0))
        index = self._index(rows, torch.tensor(self.full)[:, None] * self.size + slot)
        return index.masked_fill(slot >= torch.tensor(self.rest)[:, None], -1)

    def tails(self, fresh: bool) -> Iterator[_Tail]:
        """New tokens of incomplete chunks, in groups of rows that differ in length by less than a factor of 2."""
        groups: dict[int, list[int]] = {}
        tail = [
            min(rest, full * self.size + rest - p)
            for rest, full, p in zip(self.rest, self.full, self.pending, strict=True)
        ]
        for row, length in enumerate(tail):
            if length and fresh and not self.full[row]:
                groups.setdefault(0, []).append(row)
            elif length:
                groups.setdefault(length.bit_length(), []).append(row)
        ends = [
            start + f * self.size + r - p
            for start, f, r, p in zip(self.starts, self.full, self.rest, self.pending, strict=True)
        ]
        for key, rows in groups.items():
            if key == 0:
                yield _Tail(
                    torch.cat([torch.arange(ends[row] - tail[row], ends[row]) for row in rows])[
                        None
                    ],
                    None,
                )
                continue
            length = torch.tensor([tail[row] for row in rows])[:, None]
            slot = torch.arange(int(length.max()))
            token = torch.tensor([ends[row] for row in rows])[:, None] - length + slot
            yield _Tail(token.masked_fill(slot >= length, -1), [self.ranks[row] for row in rows])


# ---------------------------------------------------------------------------------------------- checks


def _row_starts(q: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    """First token of each row in ``q.flatten(0, 1)``, and the end."""
    num_rows, num_tokens = q.shape[:2]
    if cu_seqlens is None:
        return [row * num_tokens for row in range(num_rows + 1)]
    starts = cu_seqlens.tolist()
    rising = all(a <= b for a, b in zip(starts, starts[1:], strict=False))
    if (
        cu_seqlens.dim() != 1
        or num_rows != 1
        or len(starts) < 2
        or not rising
        or [starts[0], starts[-1]] != [0, num_tokens]
    ):
        raise ValueError(
            f"cu_seqlens={starts if len(starts) < 9 else [*starts[:4], '...', *starts[-4:]]} for q of B={num_rows}, T={num_tokens} "
            "must rise from 0 to T in one packed sequence (B=1); give the document starts and T, or None for unpacked rows"
        )
    return starts  # type: ignore[no-any-return]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    mu: Tensor,
    weights: FastWeights,
    chunk_size: int,
    clip: float | None,
) -> None:
    if q.dim() != 4 or not q.is_floating_point():
        raise ValueError(
            f"q of shape {list(q.shape)}, {q.dtype} is not [B, T, n, d_h] of a float dtype; reshape it to heads"
        )
    shape = tuple(q.shape)
    for name, tensor, want in (
        ("k", k, shape), ("v", v, shape), ("eta", eta, (*shape[:3], 3)), ("mu", mu, shape[:3]),
    ):  # fmt: skip
        if tuple(tensor.shape) != want:
            raise ValueError(
                f"{name} of shape {list(tensor.shape)} does not fit q of shape {list(shape)}; give it {list(want)}"
            )
    heads, width = shape[2:]
    hidden = weights.gate.shape[-2]
    for name, tensor, want in zip(
        weights._fields,
        weights,
        ((heads, hidden, width),) * 2 + ((heads, width, hidden),),
        strict=True,
    ):
        if tuple(tensor.shape) != want:
            raise ValueError(
                f"weights.{name} of shape {list(tensor.shape)} does not fit {heads} heads of width {width}; give it {list(want)}"
            )
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} is not positive; set it to at least 1 token")
    if clip is not None and not clip > 0:
        raise ValueError(
            f"clip={clip} is not positive; give a bound above 0, or None for no clipping"
        )


def _check_state(
    q: Tensor, weights: FastWeights, state: MemoryState | None, num_rows: int, chunk_size: int
) -> None:
    if state is None:
        return
    if state.num_rows != num_rows:
        raise ValueError(
            f"state of {state.num_rows} rows does not fit {num_rows} sequences or documents; select the rows that go on"
        )
    if state.weights.gate.shape[1:] != weights.gate.shape:
        raise ValueError(
            f"state with gate matrices {list(state.weights.gate.shape[1:])} does not fit weights {list(weights.gate.shape)}; "
            "go on with the weights the state was made with"
        )
    longest = int(state.pending_length.max()) if num_rows else 0
    if longest >= chunk_size:
        raise ValueError(
            f"chunk_size={chunk_size} is not above the state's {longest} pending tokens; keep the chunk_size the state was made with"
        )
