"""Branches beside the window attention: the memory, and Mamba-2 in its place.

B sequences, T tokens (B = 1 and T = S where a layout packs), R rows, D model width; n memory heads
of width d_h, d = n d_h, f hidden width of a memory head, c chunk length.

Equation numbers are those of AllMem (arXiv 2602.13680) as the project's documentation numbers them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allmem_hf.cache_allmem import AllMemLayerCache
from allmem_hf.configuration_allmem import AllMemConfig
from allmem_hf.layers_allmem import AllMemRMSNorm
from allmem_hf.layout_allmem import RowLayout
from kernels.ssd.reference import ssd_scan
from kernels.ttt_memory import memory_scan
from kernels.ttt_memory.branch import (
    causal_conv,
    eta_from,
    memory_output,
    memory_qk,
    mu_from,
)
from kernels.ttt_memory.reference import FastWeights
from kernels.ttt_memory.reference import read as read_memory

_OTHER_CACHE = "the cache holds a {} of another branch; use a cache only with its own model"


class AllMemConv(nn.Module):
    """Weight `[d, kernel]` of the depthwise causal convolution of equation (2)."""

    def __init__(self, size: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(self.identity(size, kernel))

    @staticmethod
    def identity(size: int, kernel: int) -> Tensor:
        """Weights that pass each token through unchanged."""
        return torch.cat([torch.zeros(size, kernel - 1), torch.ones(size, 1)], dim=1)


class AllMemBranch(nn.Module):
    """What both branches have: projections, convolutions, gate, output projection, alpha.

    Args:
        config: the model's configuration.
        qk_head_dim: width of one head of q and k.
    """

    def __init__(self, config: AllMemConfig, *, qk_head_dim: int) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.memory_heads
        width, v_size = config.hidden_size, config.memory_size
        qk_size, taps = self.num_heads * qk_head_dim, config.conv_kernel
        self.q_proj = nn.Linear(width, qk_size, bias=False)
        self.k_proj = nn.Linear(width, qk_size, bias=False)
        self.v_proj = nn.Linear(width, v_size, bias=False)
        self.q_conv = AllMemConv(qk_size, taps)
        self.k_conv = AllMemConv(qk_size, taps)
        self.v_conv = AllMemConv(v_size, taps)
        self.gate_proj = nn.Linear(width, self.num_heads, bias=True)
        self.o_norm = AllMemRMSNorm(config.memory_head_dim, config.rms_norm_eps)
        self.o_proj = nn.Linear(v_size, width, bias=False)
        self.alpha = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, layout: RowLayout, cache: AllMemLayerCache | None) -> Tensor:
        """`alpha * branch(x)`, `[B, T, D]` (after the pre-attention norm) -> `[B, T, D]`.

        Reads and moves on the convolution tails and the state in `cache`, where one is given.
        """
        q, k, v = (
            self._convolved(x, proj, conv, f"tail_{name}", layout, cache)
            for name, proj, conv in (
                ("q", self.q_proj, self.q_conv),
                ("k", self.k_proj, self.k_conv),
                ("v", self.v_proj, self.v_conv),
            )
        )
        read = self.scan(x, q, k, v, layout, cache)
        mixed = memory_output(read, self.o_norm.weight, self.gate_proj(x), self.o_norm.eps)
        return self.alpha * self.o_proj(mixed)  # equations (12) and (1)

    def _convolved(
        self,
        x: Tensor,
        proj: nn.Linear,
        conv: AllMemConv,
        name: str,
        layout: RowLayout,
        cache: AllMemLayerCache | None,
    ) -> Tensor:
        """Equation (2): `[B, T, n, width]`; keeps the new tail `[R, conv_kernel - 1, n width]`."""
        tail = None if cache is None else cache.tensors.get(name)
        out, tail = causal_conv(proj(x), conv.weight, tail=tail, cu_seqlens=layout.cu_seqlens)
        if cache is not None:
            cache.keep(name, tail)
        return out.unflatten(-1, (self.num_heads, -1))

    def scan(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: RowLayout,
        cache: AllMemLayerCache | None,
    ) -> Tensor:
        """What the branch reads, `[B, T, n, d_h]`; moves its state in `cache` on."""
        raise NotImplementedError(f"{type(self).__name__} must define scan")

    def finish_chunk(self, cache: AllMemLayerCache, rows: list[int]) -> None:
        """Writes the complete chunks of `rows` after a decode step; nothing where none are kept."""
        del cache, rows


class AllMemMemory(AllMemBranch):
    """The memory: a SwiGLU network per head that learns from the tokens it reads."""

    def __init__(self, config: AllMemConfig) -> None:
        n, head, eps = config.memory_heads, config.memory_head_dim, config.rms_norm_eps
        super().__init__(config, qk_head_dim=head)
        hidden = config.expansion * head
        self.q_norm = AllMemRMSNorm(head, eps)
        self.k_norm = AllMemRMSNorm(head, eps)
        self.eta_proj = nn.Linear(config.hidden_size, n * 3, bias=True)
        self.mu_proj = nn.Linear(config.hidden_size, n, bias=True)
        self.fast_gate = nn.Parameter(torch.empty(n, hidden, head))
        self.fast_up = nn.Parameter(torch.empty(n, hidden, head))
        self.fast_down = nn.Parameter(torch.empty(n, head, hidden))

    def scan(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: RowLayout,
        cache: AllMemLayerCache | None,
    ) -> Tensor:
        """Equations (3) to (11); a decode step only reads and keeps its token (`finish_chunk`)."""
        if cache is not None and "recurrent" in cache.tensors:
            raise ValueError(_OTHER_CACHE.format("Mamba-2 state"))
        q = memory_qk(q, self.q_norm.weight, self.q_norm.eps)
        k = memory_qk(k, self.k_norm.weight, self.k_norm.eps)
        eta = eta_from(self.eta_proj(x)).unflatten(-1, (self.num_heads, 3))
        mu = mu_from(self.mu_proj(x))
        if self.config.write_off:
            cache = None
        if cache is not None and layout.is_step and "weights_gate" in cache.tensors:
            return self._step(q, (k, v, eta, mu), layout, cache)
        size = self.config.chunk_size
        if self.config.write_off:  # a chunk that never fills: not even (9) changes the weights
            size = x.shape[1] + 1
        pending = [length % size for length in layout.host_past]
        read, state = memory_scan(
            q,
            k,
            v,
            eta,
            mu,
            FastWeights(self.fast_gate, self.fast_up, self.fast_down),
            None if cache is None else cache.memory_state(pending),
            chunk_size=size,
            cu_seqlens=layout.cu_seqlens,
            clip=self.config.clip,
            decay=self.config.decay or None,
            return_state=cache is not None,
        )
        if cache is not None and state is not None:
            cache.keep_memory(state)
        return read

    def _step(
        self, q: Tensor, streams: tuple[Tensor, ...], layout: RowLayout, cache: AllMemLayerCache
    ) -> Tensor:
        """Equation (8) for one token a row `[R, 1, n, d_h]`, which joins its unfinished chunk."""
        held = cache.tensors
        slots = layout.past % self.config.chunk_size
        rows = layout.rows[:, 0]
        for name, new in zip(("k", "v", "eta", "mu"), streams, strict=True):
            pending = held[f"pending_{name}"]
            pending[rows, slots] = new[:, 0].detach().to(pending.dtype)
        weights = FastWeights(*(held[f"weights_{name}"] for name in FastWeights._fields))
        wide = q.transpose(1, 2).to(weights.gate.dtype)  # [R, n, 1, d_h]
        return read_memory(wide, weights).transpose(1, 2).to(q.dtype)

    @torch.no_grad()
    def finish_chunk(self, cache: AllMemLayerCache, rows: list[int]) -> None:
        """Equations (9) to (11) for the complete chunks of `rows`."""
        if self.config.write_off:
            return
        held = cache.tensors
        index = torch.tensor(rows, device=held["pending_k"].device)
        k, v, eta, mu = (
            held[f"pending_{name}"].index_select(0, index) for name in ("k", "v", "eta", "mu")
        )
        before = cache.memory_state([0] * cache.tensors["pending_k"].shape[0])
        assert before is not None
        _, after = memory_scan(
            k,  # what is read here is not used
            k,
            v,
            eta,
            mu,
            FastWeights(self.fast_gate, self.fast_up, self.fast_down),
            before.select(rows),
            chunk_size=self.config.chunk_size,
            clip=self.config.clip,
            decay=self.config.decay or None,
        )
        assert after is not None
        for kind, new in (("weights", after.weights), ("momentum", after.momentum)):
            for name, matrix in zip(FastWeights._fields, new, strict=True):
                held[f"{kind}_{name}"].index_copy_(0, index, matrix)


class AllMemMamba2(AllMemBranch):
    """The paper's baseline: a Mamba-2 recurrence in the memory's place; q is C, k is B, v is x."""

    def __init__(self, config: AllMemConfig) -> None:
        super().__init__(config, qk_head_dim=config.state_size or config.memory_head_dim)
        self.dt_proj = nn.Linear(config.hidden_size, self.num_heads, bias=True)
        self.a_log = nn.Parameter(torch.zeros(self.num_heads))
        self.d_skip = nn.Parameter(torch.ones(self.num_heads))

    def scan(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: RowLayout,
        cache: AllMemLayerCache | None,
    ) -> Tensor:
        """The recurrence of Mamba-2 (arXiv 2405.21060), SiLU after the convolutions."""
        if cache is not None and "weights_gate" in cache.tensors:
            raise ValueError(_OTHER_CACHE.format("memory"))
        q, k, v = F.silu(q), F.silu(k), F.silu(v)
        dt = F.softplus(self.dt_proj(x).float())
        if self.config.write_off:
            dt = torch.zeros_like(dt)
        state = None if cache is None else cache.tensors.get("recurrent")
        read, state = ssd_scan(v, dt, self.a_log, k, q, state=state, cu_seqlens=layout.cu_seqlens)
        if cache is not None:
            cache.keep("recurrent", state)
        return read + self.d_skip[:, None] * v
