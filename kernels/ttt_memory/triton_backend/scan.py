"""The memory's scan on a GPU: the same function as `reference.memory_scan`, in Triton kernels.

Shape letters: B sequences, R rows (documents), T tokens, C chunk length, H memory heads, K head
width, F hidden width, S slots (states), A complete chunks of all rows. See `forward.py` for the
layout of a state.

Chunks are written one after the other, a pair of launches each; all tokens read in one launch
after that. What a backward pass needs is kept only while it is small: where the states of all
chunks would exceed `STATE_BYTES`, the sequence is cut into segments whose states are made again.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kernels.ttt_memory.reference import FastWeights, MemoryState, row_norms
from kernels.ttt_memory.triton_backend import launch
from kernels.ttt_memory.triton_backend.function import Scan
from kernels.ttt_memory.triton_backend.launch import Call, Sizes
from kernels.ttt_memory.triton_backend.plan import ScanPlan, make_plan

STATE_BYTES = 512 * 2**20
"""Most memory for the states (W, M) of one call's chunks."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_device(q: Tensor) -> None:
    """Refuses what the kernels cannot run on.

    Raises:
        ValueError: a device that is no CUDA device (unless Triton interprets), or a dtype.
    """
    if not q.is_cuda and not launch.INTERPRETED:
        raise ValueError(
            f"backend='triton' cannot run on {q.device}; move the tensors to a CUDA device, or set "
            "backend='reference' or 'auto'"
        )
    if q.dtype not in DTYPES:
        raise ValueError(
            f"backend='triton' cannot run: no kernel computes in {q.dtype}; give float32 or "
            "bfloat16, or set backend='reference'"
        )


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
    """Equations (8) to (11); arguments and results as in `reference.memory_scan`.

    Products of bfloat16 inputs are bfloat16 products summed in float32; states are float32.

    Raises:
        ValueError: a device or dtype that the kernels do not have, a decay that wants a gradient,
            or a state that does not fit.
    """
    check_device(q)
    if isinstance(decay, Tensor) and decay.requires_grad:
        raise ValueError(
            "backend='triton' gives decay no gradient; set backend='reference', or detach decay"
        )
    shape = q.shape
    batch, num_tokens, heads, width = shape
    if cu_seqlens is None:
        starts = [row * num_tokens for row in range(batch + 1)]
    else:
        starts = cu_seqlens.tolist()
    pending = [0] * (len(starts) - 1) if state is None else state.pending_length.tolist()
    if len(pending) != len(starts) - 1 or max(pending, default=0) >= chunk_size:
        raise ValueError(
            f"state of {len(pending)} rows with up to {max(pending, default=0)} pending tokens "
            f"does not fit {len(starts) - 1} rows and chunk_size={chunk_size}; keep the chunk_size "
            "of the call that made it, and select the rows that go on"
        )
    device = q.device
    if isinstance(decay, Tensor):
        rate = decay.to(device=device, dtype=torch.float32).expand(heads).contiguous()
    else:  # filled on the device: a copy would wait for it
        rate = torch.full((heads,), decay or 0.0, device=device)
    call = Call(
        sizes=Sizes(heads, weights.gate.shape[-2], width, chunk_size, _dtype(q, k, v)),
        chunk_size=chunk_size,
        clip=clip,
        decay=rate,
        processors=_processors(device),
    )
    cutter = _Cutter(call, FastWeights(*(w.float() for w in weights)))
    flat = tuple(x.reshape(batch * num_tokens, *x.shape[2:]) for x in (q, k, v, eta, mu))
    with torch.autocast(device.type, enabled=False):
        out, after = cutter.scan(flat, state, starts, pending, return_state)
    return out.reshape(shape), after


def _processors(device: torch.device) -> int:
    """Streaming multiprocessors; 0 where Triton interprets."""
    if launch.INTERPRETED:
        return 0
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    """In which tokens meet weights."""
    return torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)


Flat = tuple[Tensor, ...]  # q, k, v [N, H, K], eta [N, H, 3], mu [N, H]


@dataclass(frozen=True)
class _Cutter:
    """One call of `memory_scan`, cut into parts whose states fit."""

    call: Call
    weights: FastWeights

    def scan(
        self,
        flat: Flat,
        state: MemoryState | None,
        starts: list[int],
        pending: list[int],
        return_state: bool,
    ) -> tuple[Tensor, MemoryState | None]:
        """All rows, cut into parts whose states fit `STATE_BYTES`."""
        sizes = self.call.sizes
        each = 2 * 4 * sizes.heads * 3 * sizes.hidden * sizes.width
        most = max(8, STATE_BYTES // each)
        chunks = [
            (p + stop - start) // self.call.chunk_size
            for p, (start, stop) in zip(pending, pairwise(starts), strict=True)
        ]
        if sum(chunks) + len(chunks) <= most:
            return self.part(flat, state, starts, pending, return_state, keep=True)
        if len(chunks) > 1:
            return self._rows(flat, state, starts, pending, return_state, chunks, most)
        # one long row: segments of complete chunks
        outs, position, end = [], starts[0], starts[1]
        held = pending[0]
        while position < end:
            stop = min(end, position + (most - 2) * self.call.chunk_size - held)
            part = tuple(x[position:stop] for x in flat)
            last = stop == end
            out, state = self.part(
                part, state, [0, stop - position], [held], return_state or not last, keep=False
            )
            outs.append(out)
            held = 0 if state is None else int(state.pending_length[0])
            position = stop
        return torch.cat(outs), state

    def _rows(
        self, flat: Flat, state: MemoryState | None, starts: list[int], pending: list[int],
        return_state: bool, chunks: list[int], most: int,
    ) -> tuple[Tensor, MemoryState | None]:  # fmt: skip
        """Groups of rows, one after the other."""
        groups: list[list[int]] = [[]]
        held = 0
        for row, number in enumerate(chunks):
            if groups[-1] and held + number + 1 > most:
                groups.append([])
                held = 0
            groups[-1].append(row)
            held += number + 1
        outs, states = [], []
        for rows in groups:
            first, last = starts[rows[0]], starts[rows[-1] + 1]
            out, after = self.scan(
                tuple(x[first:last] for x in flat),
                None if state is None else state.select(rows),
                [starts[row] - first for row in (*rows, rows[-1] + 1)],
                [pending[row] for row in rows],
                return_state,
            )
            outs.append(out)
            states.append(after)
        return torch.cat(outs), _joined(states) if return_state else None

    def part(
        self, flat: Flat, state: MemoryState | None, starts: list[int], pending: list[int],
        return_state: bool, *, keep: bool,
    ) -> tuple[Tensor, MemoryState | None]:  # fmt: skip
        """Rows whose states fit; `keep`: for the backward pass too."""
        q, k, v, eta, mu = flat
        dtype = self.call.sizes.dtype
        eta, mu = eta.float(), mu.float()
        slots = 0 if state is None else state.pending_k.shape[1]
        plan = make_plan(
            tuple(starts), tuple(pending), slots, self.call.chunk_size,
            self.call.sizes.read_tokens,
            return_state or state is not None, q.device,
        )  # fmt: skip
        if plan.stream is not None:
            assert state is not None
            streams = [
                torch.cat([old.flatten(0, 1).to(x.dtype), x]).index_select(0, plan.stream)
                for old, x in zip(state.pending(), (k, v, eta, mu), strict=True)
            ]
            k, v, eta, mu = streams
        norms = torch.cat([n.flatten(1) for n in row_norms(self.weights)], 1)
        first = _stacked(self.weights)
        w, m = self._initial(first, state, plan)
        out, w_last, m_last = Scan.apply(
            q.to(dtype), k.to(dtype), v.to(dtype), eta, mu, w, m, norms,
            plan, self.call, keep, return_state,
        )  # fmt: skip
        out = out.to(q.dtype)
        if not return_state:
            return out, None
        valid, rests = plan.rest_valid, []
        for x in (k, v, eta, mu):
            rest = x[plan.rest_tokens] if x.shape[0] else x.new_zeros(*valid.shape, *x.shape[1:])
            shape = (*valid.shape, *[1] * (rest.dim() - 2))
            rests.append(rest.masked_fill(~valid.view(shape), 0))
        memory = (*_unstacked(w_last), *_unstacked(m_last))
        return out, MemoryState.of(memory, rests, list(plan.rest))

    def _initial(
        self, first: Tensor, state: MemoryState | None, plan: ScanPlan
    ) -> tuple[Tensor, Tensor]:
        """W and M of the initial slots, [I, H, 3, F, K]."""
        count = len(plan.initial_rows)
        if state is None:
            return first.expand(count, *first.shape), first.new_zeros(count, *first.shape)
        rows = [_stacked(FastWeights(*(x.float() for x in part))) for part in (
            state.weights, state.momentum
        )]  # fmt: skip
        return rows[0], rows[1]  # every row brings its own


def _stacked(weights: FastWeights) -> Tensor:
    """[…, H, F, K] thrice -> [..., H, 3, F, K], down transposed."""
    return torch.stack([weights.gate, weights.up, weights.down.mT], -3)


def _unstacked(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate, up, down = x.unbind(-3)
    return gate, up, down.mT


def _joined(states: list[MemoryState | None]) -> MemoryState:
    """States of several groups of rows as one."""
    parts = [state for state in states if state is not None]
    room = max(state.pending_k.shape[1] for state in parts)

    def joined(tensors: list[Tensor]) -> Tensor:
        grown = []
        for x in tensors:
            missing = room - x.shape[1]
            grown.append(torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], 1))
        return torch.cat(grown)

    memory = [
        torch.cat(rows)
        for rows in zip(*((*state.weights, *state.momentum) for state in parts), strict=True)
    ]
    pending = [joined(list(xs)) for xs in zip(*(state.pending() for state in parts), strict=True)]
    lengths = [int(n) for state in parts for n in state.pending_length]
    return MemoryState.of(tuple(memory), pending, lengths)
