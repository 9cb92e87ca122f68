"""The scan as one node of autograd; `forward.py` has the layout, `backward.py` the parts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.ttt_memory.triton_backend import backward as bwd
from kernels.ttt_memory.triton_backend import forward as fwd
from kernels.ttt_memory.triton_backend.blocks import tiles
from kernels.ttt_memory.triton_backend.launch import Call, shares, steps_of, write_chunks
from kernels.ttt_memory.triton_backend.plan import ScanPlan


class Scan(torch.autograd.Function):
    """Inputs that fit each other -> out, and W and M of each row after its last complete chunk."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, eta: Tensor, mu: Tensor, w: Tensor, m: Tensor,
        norms: Tensor, decay: Tensor, plan: ScanPlan, call: Call, keep: bool, want_state: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        q, k, v, eta, mu, norms = (x.contiguous() for x in (q, k, v, eta, mu, norms))
        states = write_chunks(k, v, eta, mu, w, m, norms, plan, call)
        sizes = call.sizes
        out = torch.empty_like(q)
        if len(plan.blocks):
            fwd.read_kernel[(len(plan.blocks), sizes.heads)](
                q, states[0], plan.blocks, out, *sizes.all, **sizes.options("read_kernel", q)
            )  # fmt: skip
        ctx.plan, ctx.call, ctx.want_state = plan, call, want_state
        ctx.save_for_backward(q, k, v, eta, mu, w, m, norms, *(states if keep else ()))
        if want_state:
            return out, states[0][plan.final_slots], states[1][plan.final_slots]
        empty = q.new_empty(0, dtype=torch.float32)
        return out, empty, empty.clone()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_w_last: Tensor, grad_m_last: Tensor) -> Any:  # type: ignore[override]
        q, k, v, eta, mu, w, m, norms, *states = ctx.saved_tensors
        plan, call = ctx.plan, ctx.call
        if not states:
            states = list(write_chunks(k, v, eta, mu, w, m, norms, plan, call))
        grads = _Gradients(plan, call, states, (q, k, v, eta, mu, norms))
        d_q = grads.reads(grad_out.contiguous())
        if ctx.want_state:
            grads.final(grad_w_last, grad_m_last)
        d_mu, d_norms = grads.writes()
        d_k, d_v, d_eta = grads.tokens()
        count = len(plan.initial_rows)
        return (
            d_q, d_k, d_v, d_eta, d_mu, grads.w[:count], grads.m[:count], d_norms,
            None, None, None, None, None,
        )  # fmt: skip


class _Gradients:
    """The backward pass of one call; see `backward.py`."""

    def __init__(
        self, plan: ScanPlan, call: Call, states: list[Tensor], inputs: tuple[Tensor, ...]
    ) -> None:
        self.plan, self.call, self.sizes = plan, call, call.sizes
        self.states = states
        self.q, self.k, self.v, self.eta, self.mu, self.norms = inputs
        self.w = torch.empty_like(states[0])
        self.m = torch.zeros_like(states[0])
        count = len(plan.chunks)
        self.steps = states[0].new_empty(count, *states[0].shape[1:])

    def reads(self, grad_out: Tensor) -> Tensor:
        """Part 1: dQ; `self.w` is set."""
        plan, sizes = self.plan, self.sizes
        d_q = torch.empty_like(self.q)
        if len(plan.blocks):
            bwd.read_tokens_kernel[(len(plan.blocks), sizes.heads)](
                self.q, self.states[0], plan.blocks, grad_out, d_q,
                *sizes.all, **sizes.options("read_tokens_kernel", self.q),
            )  # fmt: skip
        grid = (plan.num_slots * sizes.heads, sizes.hidden_blocks("read_weights_kernel"))
        bwd.read_weights_kernel[grid](
            self.q, self.states[0], plan.blocks, plan.block_range, grad_out, self.w,
            *sizes.all, **sizes.options("read_weights_kernel", self.q),
        )  # fmt: skip
        return d_q

    def final(self, grad_w: Tensor, grad_m: Tensor) -> None:
        """Adds the gradients of the states that were given back."""
        # rows without a complete chunk may share a slot
        self.w.index_add_(0, self.plan.final_slots, grad_w)
        self.m.index_add_(0, self.plan.final_slots, grad_m)

    def writes(self) -> tuple[Tensor, Tensor]:
        """Part 2: d mu [A, H] and d norms [H, 2 F + K]; `self.w`, `self.m` and `self.steps` are
        complete after it."""
        plan, call, sizes = self.plan, self.call, self.sizes
        w, m, scale = self.states
        d_mu = torch.zeros(*self.mu.shape, 3, device=w.device)
        d_norms = torch.zeros(len(plan.chunks), *self.norms.shape, device=w.device)
        size = sizes.hidden * sizes.width
        for begin, end in reversed(list(pairwise(plan.steps))):
            chunks, active = plan.chunks[begin:end], end - begin
            steps = self.steps[begin:end]
            bwd.momentum_gradient_kernel[(active * sizes.heads, 3)](
                m, self.mu[begin:end], chunks, self.w, self.m, steps, d_mu[begin:end],
                sizes.heads, size, BLOCK=1024,
            )  # fmt: skip
            if call.clip is not None:
                self._through_clip(begin, end)
            kernel = "steps_weights_kernel"
            splits, share = shares(active, call, kernel)
            base = w.new_empty(splits, active, *w.shape[1:])
            grid = (active * sizes.heads, sizes.hidden_blocks(kernel), splits)
            bwd.steps_weights_kernel[grid](
                self.k, self.v, self.eta, w, scale, chunks, steps, base,
                call.chunk_size, share, *sizes.all, **sizes.options(kernel, self.k),
            )  # fmt: skip
            bwd.normalise_gradient_kernel[(active * sizes.heads, sizes.num_tiles)](
                w, scale, self.norms, call.decay, chunks, base, self.w, d_norms[begin:end],
                splits, *sizes.all, **tiles(sizes.width),
            )  # fmt: skip
        return d_mu.sum(-1), d_norms.sum(0)

    def _through_clip(self, begin: int, end: int) -> None:
        """dS of the step before clipping: S' = S min(1, clip / |S|)."""
        clip = self.call.clip
        assert clip is not None
        before, after = self.plan.chunks[begin:end, 0], self.plan.chunks[begin:end, 1]
        mu = self.mu[begin:end, :, None, None, None]
        clipped = self.states[1][after] - mu * self.states[1][before]
        squares = clipped.pow(2).sum((-2, -1), keepdim=True)
        # where the step was clipped its norm is the bound; how long it was, the step itself tells
        raw = self._raw_norms(begin, end)
        factor = clip / raw.clamp(min=clip)
        grad = self.steps[begin:end]
        along = (grad * clipped).sum((-2, -1), keepdim=True) / squares.clamp(min=1e-37)
        cut = (raw > clip).to(grad.dtype)
        grad.copy_(factor * (grad - cut * along * clipped))

    def _raw_norms(self, begin: int, end: int) -> Tensor:
        """|S|_F before clipping, [active, H, 3, 1, 1]: the steps are made again."""
        w, _, scale = self.states
        chunks = self.plan.chunks[begin:end]
        steps, _ = steps_of(self.k, self.v, self.eta, w, scale, chunks, self.call)
        return torch.linalg.vector_norm(steps.sum(0), dim=(-2, -1), keepdim=True)

    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Part 3: dK, dV and d eta; zero for tokens of incomplete chunks."""
        plan, call, sizes = self.plan, self.call, self.sizes
        d_k, d_v = torch.zeros_like(self.k), torch.zeros_like(self.v)
        d_eta = torch.zeros_like(self.eta)
        if len(plan.chunks):
            kernel = "steps_tokens_kernel"
            blocks = triton.cdiv(call.chunk_size, sizes.blocks(kernel).tokens)
            bwd.steps_tokens_kernel[(len(plan.chunks), blocks, sizes.heads)](
                self.k, self.v, self.eta, self.states[0], self.states[2], plan.chunks, self.steps,
                d_k, d_v, d_eta, call.chunk_size, *sizes.all, **sizes.options(kernel, self.k),
            )  # fmt: skip
        return d_k, d_v, d_eta
