"""The memory of AllMem in plain PyTorch: equations (5) to (11) of arXiv 2602.13680, our numbers.

Shape letters: B sequences, R rows (documents: R = B, or the N documents of one packed sequence),
T tokens, C chunk length, H memory heads, K head width, F hidden width of one memory head, P pending
tokens. W, M, S are the weights, momentum and steps of the equations; `README.md` derives them.

Each row goes through its chunks strictly in order: read (8), normalise (9), write (10, 11). Rows
are independent, so step j takes the j-th complete chunk of every row that has one, in one batched
matrix product per matrix. Work is linear in tokens: no row is padded to the longest one.

This file imports torch and the standard library only: exported models carry a copy of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-5  # of equation (9)

Memory = tuple[Tensor, ...]  # (W, M): gate, up, down, and the momentum of each
Streams = tuple[Tensor, ...]  # k, v, eta, mu


class FastWeights(NamedTuple):
    """The matrices of each memory head: gate, up ``[..., H, F, K]``, down ``[..., H, K, F]``."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> FastWeights:
        """Apply ``function`` to each of the three matrices."""
        return FastWeights(*(function(matrix) for matrix in self))


@dataclass(frozen=True)
class MemoryState:
    """What a row needs to go on: fast weights, momentum and the tokens of its unfinished chunk.

    Its size does not depend on the number of tokens seen. No call changes its tensors in place;
    they belong to the autograd graph of the call that made them (``detach`` cuts it).

    Attributes:
        weights: W of equation (11), ``[R, H, F, K]``, ``[R, H, F, K]``, ``[R, H, K, F]``, float32
            (float64 for float64 inputs), exactly as the last write left them.
        momentum: M of equation (11), as ``weights``.
        pending_k: keys of the unfinished chunk ``[R, P, H, K]``; row i holds ``pending_length[i]``
            of them from slot 0 on, the other slots mean nothing.
        pending_v: their values ``[R, P, H, K]``.
        pending_eta: their learning rates ``[R, P, H, 3]``.
        pending_mu: their momentum coefficients per token ``[R, P, H]``.
        pending_length: int64 ``[R]``, always on the CPU: it steers the loop, which must not wait
            for a GPU.
    """

    weights: FastWeights
    momentum: FastWeights
    pending_k: Tensor
    pending_v: Tensor
    pending_eta: Tensor
    pending_mu: Tensor
    pending_length: Tensor

    @classmethod
    def of(cls, memory: Memory, pending: Sequence[Tensor], length: list[int]) -> MemoryState:
        """Put a state together from (W, M) and the pending streams k, v, eta, mu."""
        k, v, eta, mu = pending
        rows = torch.tensor(length, dtype=torch.int64)
        return cls(FastWeights(*memory[:3]), FastWeights(*memory[3:]), k, v, eta, mu, rows)

    @property
    def num_rows(self) -> int:
        """R, the number of rows."""
        return self.pending_length.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (*self.weights, *self.momentum, *self.pending(), self.pending_length)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def pending(self) -> Streams:
        """The unfinished chunk's k, v, eta, mu."""
        return self.pending_k, self.pending_v, self.pending_eta, self.pending_mu

    def to(self, device: torch.device | str) -> MemoryState:
        """The same state on ``device``; ``pending_length`` stays on the CPU."""
        return self._map(lambda tensor: tensor.to(device), self.pending_length)

    def detach(self) -> MemoryState:
        """The same values, cut from the autograd graph."""
        return self._map(torch.Tensor.detach, self.pending_length)

    def select(self, rows: Sequence[int] | Tensor) -> MemoryState:
        """The state of ``rows`` in that order; an index may repeat (beams)."""
        index = torch.as_tensor(rows, dtype=torch.int64).cpu()
        length = self.pending_length[index]
        return self._map(lambda x: x.index_select(0, index.to(x.device)), length)

    def _map(self, function: Callable[[Tensor], Tensor], length: Tensor) -> MemoryState:
        k, v, eta, mu = map(function, self.pending())
        weights, momentum = self.weights.map(function), self.momentum.map(function)
        return MemoryState(weights, momentum, k, v, eta, mu, length)


def initial_state(
    weights: FastWeights, num_rows: int, *, dtype: torch.dtype = torch.float32
) -> MemoryState:
    """The state before the first token: (W0, 0) and no pending token.

    Args:
        weights: initial fast weights ``[H, F, K]``, ``[H, F, K]``, ``[H, K, F]``; gradients flow
            back to them.
        num_rows: R.
        dtype: of all tensors; float64 where the inputs of the scan are.
    """
    heads, _, width = weights.gate.shape
    rows = [w.to(dtype).expand(num_rows, *w.shape) for w in weights]
    empty = rows[0].new_zeros(num_rows, 0, heads, width)
    streams = (empty, empty, rows[0].new_zeros(num_rows, 0, heads, 3), empty[..., 0])
    momentum = [w.new_zeros(w.shape) for w in rows]
    return MemoryState.of((*rows, *momentum), streams, [0] * num_rows)


# ------------------------------------------------------------------------------------- the formula


def read(q: Tensor, weights: FastWeights) -> Tensor:
    """Equations (6) and (8): ``(SiLU(Q G^T) * Q U^T) D^T + Q`` for q ``[..., C, K]``."""
    return (F.silu(q @ weights.gate.mT) * (q @ weights.up.mT)) @ weights.down.mT + q


def row_norms(weights: FastWeights) -> FastWeights:
    """L2 norm of each row of each matrix along its input dimension, kept as a dimension of 1."""
    return weights.map(lambda w: torch.linalg.vector_norm(w, dim=-1, keepdim=True))


def normalise(weights: FastWeights, norms: FastWeights) -> FastWeights:
    """Equation (9): rows rescaled to ``norms``, those of the initial weights."""
    now = row_norms(weights)
    scales = (n / (m + NORM_EPS) for n, m in zip(norms, now, strict=True))
    return FastWeights(*(w * scale for w, scale in zip(weights, scales, strict=True)))


def descent(k: Tensor, v: Tensor, eta: Tensor, weights: FastWeights) -> FastWeights:
    """Equation (10): minus the gradient of the inner loss (7), weighted by each token's rates.

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
    slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)  # SiLU'(h) = s + h s (1 - s)
    return FastWeights(
        gate=(p * h_up * slope).mT @ (k * eta_gate),
        up=(p * silu).mT @ (k * eta_up),
        down=(v * eta_down).mT @ (silu * h_up),
    )


def clipped(step: Tensor, clip: float) -> Tensor:
    """``S min(1, clip / |S|_F)`` per head, in a form whose gradient is finite at S = 0."""
    norm = torch.linalg.vector_norm(step, dim=(-2, -1), keepdim=True)
    return step * (clip / norm.clamp(min=clip))


def chunk_mu(mu: Tensor, eta: Tensor) -> Tensor:
    """Equation (5): the mean of mu over a chunk's tokens that are no padding (a rate is not 0).

    Args:
        mu: ``[R, H, C]``.
        eta: ``[R, H, C, 3]``.

    Returns:
        ``[R, H, 1, 1]``; 0 for a chunk of padding only.
    """
    counts = (eta.detach() != 0).any(-1)
    return ((mu * counts).sum(-1) / counts.sum(-1).clamp(min=1))[..., None, None]


# ------------------------------------------------------------------------------------- the scan


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

    Two calls over a split sequence equal one call, wherever the split falls: an incomplete chunk
    only reads, and waits in the state for its other tokens. Chunk boundaries count from the start
    of each row's document. Autocast is off inside.

    Args:
        q: queries ``[B, T, H, K]``, any float dtype; computed in float32 (float64 for float64).
        k: keys, as q.
        v: values, as q.
        eta: learning rates ``[B, T, H, 3]``, >= 0, in the order gate, up, down. A token whose three
            rates are all 0 is padding: it writes nothing and is left out of the mean of (5).
        mu: momentum coefficients per token ``[B, T, H]``, after the sigmoid.
        weights: initial fast weights, for all rows; they also give the norms of equation (9).
        state: what an earlier call returned, R rows of any pending lengths; None starts at (W0, 0).
        chunk_size: C in tokens, the same in all calls over one sequence.
        cu_seqlens: int ``[N + 1]``, document starts and T of a packed sequence (B = 1, R = N);
            None: R = B.
        clip: bound on the Frobenius norm of each matrix's step S; None (the paper's) for no bound.
        decay: share of W~ forgotten at each write, a number or ``[H]``: W = (1 - decay) W~ + M;
            None (the paper's) for 0.
        return_state: False saves building the state, and returns None in its place.

    Returns:
        out ``[B, T, H, K]`` in q's dtype, V^ of equation (8), and the state after the last token.

    Raises:
        ValueError: cu_seqlens, or the state's rows or pending tokens, do not fit. All other shapes
            are checked by ``kernels.ttt_memory.memory_scan``.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    starts = _row_starts(q, cu_seqlens)
    lengths = [end - start for start, end in pairwise(starts)]
    pending = [0] * len(lengths) if state is None else state.pending_length.tolist()
    if len(pending) != len(lengths) or max(pending, default=0) >= chunk_size:
        raise ValueError(
            f"state of {len(pending)} rows with up to {max(pending, default=0)} pending tokens "
            f"does not fit {len(lengths)} rows and chunk_size={chunk_size}; keep the chunk_size of "
            "the call that made it, and select the rows that go on"
        )
    same = len(set(lengths)) <= 1 and len(set(pending)) <= 1
    with torch.autocast(q.device.type, enabled=False):
        weights = weights.map(lambda w: w.to(dtype))
        if decay is not None:
            decay = torch.as_tensor(decay, dtype=dtype, device=q.device).reshape(-1, 1, 1)
        scan = _Scan(weights, row_norms(weights), chunk_size, clip, decay, dtype)
        if same:
            shape = (len(lengths), max(lengths, default=0))
            q_rows, *rows = (x.reshape(*shape, *x.shape[2:]) for x in (q, k, v, eta, mu))
            out, state = scan.uniform(q_rows, tuple(rows), state, return_state)
        else:
            q_flat, *flat = (x.flatten(0, 1) for x in (q, k, v, eta, mu))
            out, state = scan.ragged(q_flat, tuple(flat), state, starts, pending, return_state)
        return out.reshape(q.shape), state


def _row_starts(q: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    """First token of each row in ``q.flatten(0, 1)``, and the end."""
    num_rows, num_tokens = q.shape[:2]
    if cu_seqlens is None:
        return [row * num_tokens for row in range(num_rows + 1)]
    starts: list[int] = cu_seqlens.tolist()
    if num_rows != 1 or starts[:1] + starts[-1:] != [0, num_tokens] or sorted(starts) != starts:
        raise ValueError(
            f"cu_seqlens of {len(starts)} entries, {starts[:1]} to {starts[-1:]}, does not rise "
            f"from 0 to T={num_tokens} in one packed sequence (B={num_rows}); give the document "
            "starts and T, with B=1"
        )
    return starts


class _Scan(NamedTuple):
    """One call of ``memory_scan``: what all chunks share, and the two ways to cut rows into chunks.

    A memory is (W, M) of some rows as one tuple of six matrices.
    """

    weights: FastWeights
    norms: FastWeights
    chunk_size: int
    clip: float | None
    decay: Tensor | None
    dtype: torch.dtype

    def start(self, state: MemoryState | None, num_rows: int) -> Memory:
        """(W, M) of every row before this call's tokens."""
        if state is not None:
            return tuple(w.to(self.dtype) for w in (*state.weights, *state.momentum))
        rows = tuple(w.expand(num_rows, *w.shape) for w in self.weights)
        return (*rows, *(w.new_zeros(w.shape) for w in rows))

    def read(self, q: Tensor, memory: Memory) -> Tensor:
        """Equation (8) for q ``[R, C, H, K]``, out likewise and in q's dtype."""
        return read(self.heads_first(q), FastWeights(*memory[:3])).transpose(1, 2).to(q.dtype)

    def write(self, streams: Streams, memory: Memory) -> Memory:
        """Equations (9) to (11) for one chunk, streams ``[R, C, H, ...]``."""
        k, v, eta, mu = map(self.heads_first, streams)
        base = normalise(FastWeights(*memory[:3]), self.norms)
        steps: Sequence[Tensor] = descent(k, v, eta, base)
        if self.clip is not None:
            steps = [clipped(step, self.clip) for step in steps]
        mean = chunk_mu(mu, eta)
        momentum = [torch.addcmul(s, mean, m) for s, m in zip(steps, memory[3:], strict=True)]
        kept = base if self.decay is None else [w * (1 - self.decay) for w in base]
        return (*(w + m for w, m in zip(kept, momentum, strict=True)), *momentum)

    def heads_first(self, x: Tensor) -> Tensor:
        """``[R, C, H, ...]`` -> ``[R, H, C, ...]`` in the state's dtype, contiguous."""
        x = x.transpose(1, 2).to(self.dtype, memory_format=torch.contiguous_format)
        return x.contiguous()  # ``to`` leaves a transposed view alone where the dtype is the same

    def uniform(
        self, q: Tensor, streams: Streams, state: MemoryState | None, return_state: bool
    ) -> tuple[Tensor, MemoryState | None]:
        """Rows of one length and one pending length: chunks are slices of ``[R, T, H, ...]``."""
        num_rows, size, memory = q.shape[0], self.chunk_size, self.start(state, q.shape[0])
        old = int(state.pending_length[0]) if state is not None and num_rows else 0
        if state is not None and old:
            held = (x[:, :old] for x in state.pending())
            streams = tuple(torch.cat(pair, 1) for pair in zip(held, streams, strict=True))
        full, rest = divmod(old + q.shape[1], size)
        # split, not slices: the gradient of a slice is a tensor of the whole sequence
        pieces = [x.split([size] * full + [rest], 1) for x in streams]
        reads = q.split([size - old, *[size] * (full - 1), rest] if full else [q.shape[1]], 1)
        out = []
        for j in range(full):
            out.append(self.read(reads[j], memory))
            memory = self.write(tuple(piece[j] for piece in pieces), memory)
        out.append(self.read(reads[-1], memory))
        if not return_state:
            return torch.cat(out, 1), None
        rests = [piece[-1].clone() for piece in pieces]  # a view would keep all tokens alive
        return torch.cat(out, 1), MemoryState.of(memory, rests, [rest] * num_rows)

    def ragged(
        self, q: Tensor, streams: Streams, state: MemoryState | None, starts: list[int],
        pending: list[int], return_state: bool,
    ) -> tuple[Tensor, MemoryState | None]:  # fmt: skip
        """Rows of any lengths: tokens are ``[T, H, ...]``, row i's from ``starts[i]``.

        Chunks are gathered by index. Rows go in the order of their number of complete chunks, so
        that those still active at a step are the first ones.
        """
        slots = 0 if state is None else state.pending_k.shape[1]
        cut = _Cut.make(starts, pending, self.chunk_size, slots)
        if state is not None and slots:
            held = (x.flatten(0, 1) for x in state.pending())
            streams = tuple(torch.cat(pair) for pair in zip(held, streams, strict=True))

        def gather(x: Tensor, index: Tensor) -> Tensor:
            return x.index_select(0, index.flatten().to(x.device)).unflatten(0, index.shape)

        # what was read, and for which token (< 0: for none)
        out, read_tokens = [q[:0]], [torch.empty(0, dtype=torch.int64)]
        # rows without a complete chunk still hold W0 where no state came in: nobody needs copies
        known = len(pending) if return_state or state is not None else sum(map(bool, cut.full))
        memory = _take(self.start(state, len(pending)), cut.order[:known])
        index = cut.chunks()
        read_tokens.append(index.flatten() - cut.num_old)
        chunks = [gather(x, index).split(cut.active) for x in streams]
        q_chunks = gather(q, (index - cut.num_old).clamp(min=0)).split(cut.active)
        done: list[Memory] = []  # rows past their last complete chunk, the last ones first
        for j, active in enumerate(cut.active):
            if active < memory[0].shape[0]:
                done.insert(0, tuple(w[active:] for w in memory))
                memory = tuple(w[:active] for w in memory)
            out.append(self.read(q_chunks[j], memory).flatten(0, 1))
            memory = self.write(tuple(chunk[j] for chunk in chunks), memory)
        memory = tuple(torch.cat(rows) for rows in zip(memory, *done, strict=True))
        tails = list(cut.tails(state is None))
        read_tokens.extend(tokens.flatten() for tokens, _ in tails)
        of_output = torch.cat(read_tokens)
        q_tails = gather(q, of_output[index.numel() :].clamp(min=0))
        pieces = q_tails.split([tokens.numel() for tokens, _ in tails]) if tails else ()
        for (tokens, ranks), q_tail in zip(tails, pieces, strict=True):
            rows = tuple(w[None] for w in self.weights) if ranks is None else _take(memory, ranks)
            out.append(self.read(q_tail.unflatten(0, tokens.shape), rows).flatten(0, 1))
        (position,) = (of_output >= 0).nonzero(as_tuple=True)
        result = gather(torch.cat(out), position[of_output[position].argsort()])
        if not return_state:
            return result, None
        index = cut.rests()
        none = (index < 0).to(q.device)
        rests = [gather(x, index.clamp(min=0)) for x in streams]
        rests = [x.masked_fill(none.view(*none.shape, *[1] * (x.dim() - 2)), 0) for x in rests]
        return result, MemoryState.of(_take(memory, cut.ranks), rests, cut.rest)


def _take(memory: Memory, rows: list[int]) -> Memory:
    """Some rows of a memory; without a copy where they are all of it in order."""
    if rows == list(range(memory[0].shape[0])):
        return memory
    index = torch.tensor(rows, dtype=torch.int64).to(memory[0].device)
    return tuple(w.index_select(0, index) for w in memory)


class _Cut(NamedTuple):
    """Where each row's chunks lie; an index counts ``num_old`` pending slots, then new tokens."""

    starts: Tensor  # [R] index of a row's new tokens
    pending: Tensor  # [R] pending tokens before them
    slots: int  # P of the state that comes in
    num_old: int  # R * P
    size: int
    full: list[int]  # [R] complete chunks
    rest: list[int]  # [R] tokens left over, pending after this call
    order: list[int]  # [R] rows, most complete chunks first
    ranks: list[int]  # [R] place of each row in ``order``
    active: list[int]  # number of rows with a j-th complete chunk, for each j

    @classmethod
    def make(cls, starts: list[int], pending: list[int], size: int, slots: int) -> _Cut:
        """Cut rows whose new tokens go from ``starts[i]`` to ``starts[i + 1]``."""
        totals = [
            p + end - start for p, (start, end) in zip(pending, pairwise(starts), strict=True)
        ]
        full, rest = [n // size for n in totals], [n % size for n in totals]
        order = sorted(range(len(full)), key=lambda row: -full[row])
        ranks = sorted(range(len(full)), key=lambda place: order[place])
        active = [sum(n > step for n in full) for step in range(max(full))]
        num_old = len(full) * slots
        first = torch.tensor(starts[:-1]) + num_old
        shared = (slots, num_old, size, full, rest, order, ranks, active)
        return cls(first, torch.tensor(pending), *shared)

    def locate(self, rows: Tensor, position: Tensor) -> Tensor:
        """Index of the tokens at ``position`` of ``rows``, pending tokens counted."""
        pending = self.pending[rows]
        new = self.starts[rows] + position - pending
        return torch.where(position < pending, rows * self.slots + position, new)

    def chunks(self) -> Tensor:
        """Index ``[sum(active), C]`` of the complete chunks, step by step."""
        rows = [row for active in self.active for row in self.order[:active]]
        steps = [step for step, active in enumerate(self.active) for _ in range(active)]
        first = torch.tensor(steps, dtype=torch.int64)[:, None] * self.size
        rows_index = torch.tensor(rows, dtype=torch.int64)[:, None]
        return self.locate(rows_index, first + torch.arange(self.size))

    def rests(self) -> Tensor:
        """Index ``[R, max(rest)]`` of the tokens left pending, -1 where a row has fewer."""
        rows, slot = torch.arange(len(self.full))[:, None], torch.arange(max(self.rest))
        index = self.locate(rows, torch.tensor(self.full)[:, None] * self.size + slot)
        return index.masked_fill(slot >= torch.tensor(self.rest)[:, None], -1)

    def tails(self, fresh: bool) -> Iterator[tuple[Tensor, list[int] | None]]:
        """New tokens ``[G, L]`` of incomplete chunks and their rows' places in ``order``.

        A group's rows differ in length by less than a factor of 2 (-1 where one is shorter). Where
        no state came in (``fresh``), all rows that never wrote are one row, with places None.
        """
        groups: dict[int, list[tuple[int, int, int]]] = {}
        for row, (full, rest) in enumerate(zip(self.full, self.rest, strict=True)):
            begin = int(self.starts[row]) - self.num_old - int(self.pending[row])
            end = begin + full * self.size + rest
            length = min(rest, end - begin - int(self.pending[row]))
            key = 0 if fresh and not full else length.bit_length()
            if length:
                groups.setdefault(key, []).append((self.ranks[row], end - length, end))
        for key, rows in groups.items():
            ranges = [torch.arange(begin, end) for _, begin, end in rows]
            if key == 0:
                yield torch.cat(ranges)[None], None
            else:
                padded = torch.nn.utils.rnn.pad_sequence(ranges, True, -1)
                yield padded, [rank for rank, _, _ in rows]
