"""The scan as one node of autograd; `forward.py` has the layout, `backward.py` the parts."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.ttt_memory.triton_backend import backward as bwd
from kernels.ttt_memory.triton_backend import backward_reads as reads
from kernels.ttt_memory.triton_backend import forward as fwd
from kernels.ttt_memory.triton_backend.blocks import rows, tiles
from kernels.ttt_memory.triton_backend.launch import (
    Call,
    Step,
    in_shares,
    low_weights,
    mean_mu,
    shares_buffer,
    spare,
    steps_in_shares,
    steps_of,
    write_chunks,
)
from kernels.ttt_memory.triton_backend.plan import ScanPlan


class Scan(torch.autograd.Function):
    """Inputs that fit each other -> out, and W and M of each row after its last complete chunk.

    q [N, H, K]; k, v [M, H, K], eta [M, H, 3], mu [M, H] of the stream, eta and mu in float32; w, m
    [I, H, 3, F, K] and norms [H, 2 F + K] in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, eta: Tensor, mu: Tensor, w: Tensor, m: Tensor,
        norms: Tensor, plan: ScanPlan, call: Call, keep: bool, want_state: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        q, k, v, eta, mu, norms = (x.contiguous() for x in (q, k, v, eta, mu, norms))
        mean, share = mean_mu(mu, eta, plan, call)
        states = write_chunks(k, v, eta, mean, w, m, norms, plan, call)
        sizes = call.sizes
        out = torch.empty_like(q)
        if len(plan.blocks):
            low = low_weights(states[0], states[2], plan, call, q, normalised=False)
            fwd.read_kernel[(len(plan.blocks), sizes.heads)](
                q, low, plan.blocks, out, *sizes.all, **sizes.options("read_kernel")
            )  # fmt: skip
        ctx.plan, ctx.call, ctx.want_state = plan, call, want_state
        kept = states if keep else ()
        ctx.save_for_backward(q, k, v, eta, mean, share, w, m, norms, *kept)
        if want_state:
            return out, states[0][plan.final_slots], states[1][plan.final_slots]
        empty = q.new_empty(0, dtype=torch.float32)
        return out, empty, empty.clone()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_w_last: Tensor, grad_m_last: Tensor) -> Any:  # type: ignore[override]
        q, k, v, eta, mean, share, w, m, norms, *states = ctx.saved_tensors
        plan, call = ctx.plan, ctx.call
        if not states:
            states = list(write_chunks(k, v, eta, mean, w, m, norms, plan, call))
        grads = _Gradients(plan, call, states, (q, k, v, eta, mean, share))
        d_q = grads.reads(grad_out.contiguous())
        if ctx.want_state:
            grads.final(grad_w_last, grad_m_last)
        d_mean, d_norms = grads.writes()
        d_k, d_v, d_eta, d_mu = grads.tokens(d_mean)
        count = len(plan.initial_rows)
        return (
            d_q, d_k, d_v, d_eta, d_mu, grads.w[:count], grads.m[:count], d_norms,
            None, None, None, None,
        )  # fmt: skip


class _Gradients:
    """The backward pass of one call; see `backward.py`."""

    def __init__(
        self, plan: ScanPlan, call: Call, states: list[Tensor], inputs: tuple[Tensor, ...]
    ) -> None:
        self.plan, self.call, self.sizes = plan, call, call.sizes
        self.states = states
        self.q, self.k, self.v, self.eta, self.mean, self.share = inputs
        self.w = torch.empty_like(states[0])
        self.m = torch.zeros_like(states[0])
        self.base = low_weights(states[0], states[2], plan, call, self.k, normalised=True)
        # between steps and their use by tokens; float32 where clipping goes on with them
        dtype = self.k.dtype if call.clip is None else torch.float32
        self.steps = torch.empty_like(self.base, dtype=dtype)

    def reads(self, grad_out: Tensor) -> Tensor:
        """Part 1: dQ; `self.w` is set."""
        plan, sizes = self.plan, self.sizes
        d_q = torch.empty_like(self.q)
        w, _, scale = self.states
        low = low_weights(w, scale, plan, self.call, self.q, normalised=False)
        if len(plan.blocks):
            reads.read_tokens_kernel[(len(plan.blocks), sizes.heads)](
                self.q, low, plan.blocks, grad_out, d_q,
                *sizes.all, **sizes.options("read_tokens_kernel"),
            )  # fmt: skip
        kernel = "read_weights_kernel"
        programs = plan.num_slots * sizes.heads
        splits = spare(programs * sizes.hidden_blocks(kernel), self.call)
        parts = w.new_empty(splits, *w.shape) if splits > 1 else self.w
        reads.read_weights_kernel[(programs, sizes.hidden_blocks(kernel), splits)](
            self.q, low, plan.spans, plan.span_range, grad_out, parts,
            *sizes.all, **sizes.options(kernel),
        )  # fmt: skip
        if splits > 1:
            torch.sum(parts, 0, out=self.w)
        return d_q

    def final(self, grad_w: Tensor, grad_m: Tensor) -> None:
        """Adds the gradients of the states that were given back: each row has a slot of its own."""
        self.w[self.plan.final_slots] += grad_w
        self.m[self.plan.final_slots] += grad_m

    def writes(self) -> tuple[Tensor, Tensor]:
        """Part 2: gradients of the means of mu [A, H] and of the norms [H, 2 F + K]; `self.w`,
        `self.m` and `self.steps` are complete after it."""
        plan, call, sizes = self.plan, self.call, self.sizes
        w, m, scale = self.states
        kernel = "steps_weights_kernel"
        clips = call.clip is not None
        parts = sizes.row_tiles if clips else sizes.hidden_blocks(kernel)
        d_mean = w.new_empty(*self.mean.shape, parts)
        d_norms = scale.new_empty(len(plan.chunks), *scale.shape[1:])
        walk = steps_in_shares(plan, call, kernel)
        base = shares_buffer(walk, w)
        momentum = (m, self.mean, plan.chunks, self.w, self.m, self.steps, d_mean)
        options, tile, row = sizes.options(kernel), tiles(sizes.width), rows(sizes.width)
        hidden_blocks = sizes.hidden_blocks(kernel)
        for index, step in reversed(list(enumerate(walk))):
            programs = step.active * sizes.heads
            if clips:
                bwd.momentum_gradient_kernel[(programs, parts)](
                    *momentum, step.begin, *sizes.all, WRITE=True, **row
                )  # fmt: skip
                self._through_clip(index, step)
            bwd.steps_weights_kernel[(programs, hidden_blocks, step.splits)](
                self.k, self.v, self.eta, self.base, *momentum, base,
                step.begin, call.chunk_size, step.share, *sizes.all, GIVEN=clips, **options,
            )  # fmt: skip
            bwd.normalise_gradient_kernel[(programs, sizes.num_tiles)](
                w, scale, call.decay, plan.chunks, base, self.w, d_norms,
                step.begin, step.splits, *sizes.all, **tile,
            )  # fmt: skip
        return d_mean.sum(-1), d_norms.sum(0)

    def _through_clip(self, index: int, step: Step) -> None:
        """dS of the step before clipping: S' = S min(1, clip / |S|)."""
        clip = self.call.clip
        assert clip is not None
        begin, end = step.begin, step.end
        before, after = self.plan.chunks[begin:end, 0], self.plan.chunks[begin:end, 1]
        mu = self.mean[begin:end, :, None, None, None]
        clipped = self.states[1][after] - mu * self.states[1][before]
        squares = clipped.pow(2).sum((-2, -1), keepdim=True)
        # where the step was clipped its norm is the bound; how long it was, the step itself tells
        raw = self._raw_norms(index)
        factor = clip / raw.clamp(min=clip)
        grad = self.steps[begin:end]
        along = (grad * clipped).sum((-2, -1), keepdim=True) / squares.clamp(min=1e-37)
        cut = (raw > clip).to(grad.dtype)
        grad.copy_(factor * (grad - cut * along * clipped))

    @cached_property
    def _walk(self) -> list[Step]:
        """The steps as the forward pass goes through them."""
        return steps_in_shares(self.plan, self.call, "steps_kernel")

    def _raw_norms(self, index: int) -> Tensor:
        """|S|_F before clipping, [active, H, 3, 1, 1]: the steps are made again."""
        w, _, scale = self.states
        step, steps = self._walk[index], shares_buffer(self._walk, w)
        steps_of(
            self.k, self.v, self.eta, w, scale, steps, self.plan, step, self.call,
            self.sizes.options("steps_kernel"),
        )  # fmt: skip
        whole = in_shares(steps, step).sum(0)
        return torch.linalg.vector_norm(whole, dim=(-2, -1), keepdim=True)

    def tokens(self, d_mean: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Part 3: dK, dV, d eta and d mu; zero for tokens of incomplete chunks."""
        plan, call, sizes = self.plan, self.call, self.sizes
        d_k, d_v = torch.zeros_like(self.k), torch.zeros_like(self.v)
        d_eta = torch.zeros_like(self.eta)
        d_mu = torch.zeros(self.eta.shape[:-1], device=self.eta.device)
        if len(plan.chunks):
            kernel = "steps_tokens_kernel"
            blocks = triton.cdiv(call.chunk_size, sizes.blocks(kernel).tokens)
            bwd.steps_tokens_kernel[(len(plan.chunks), blocks, sizes.heads)](
                self.k, self.v, self.eta, self.share, d_mean, self.base, plan.chunks,
                self.steps.to(self.k.dtype), d_k, d_v, d_eta, d_mu,
                call.chunk_size, *sizes.all, **sizes.options(kernel),
            )  # fmt: skip
        return d_k, d_v, d_eta, d_mu
