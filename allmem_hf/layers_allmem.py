"""Layers of an AllMem decoder: window or full attention, MLP, RMSNorm, RoPE.

B sequences, T tokens (B = 1 and T = S where a layout packs), R rows, D model width, n_q and n_kv
heads of width h.

Equation numbers are those of AllMem (arXiv 2602.13680) as the project's documentation numbers them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from allmem_hf.cache_allmem import AllMemLayerCache
from allmem_hf.configuration_allmem import AllMemConfig
from allmem_hf.layout_allmem import RowLayout
from kernels.swa import (
    attention_with_positions,
    causal_attention,
    continued_attention,
    sliding_window_attention,
)

_MAX_SCORES = 2**24  # attention scores held at once when many tokens go on from a cache
_LEAST_BLOCK = 64  # queries: smaller blocks only cost calls
_Keys = tuple[Tensor, Tensor, Tensor]  # keys and values [R, slots, n_kv, h], positions [R, slots]


class AllMemRMSNorm(nn.Module):
    """RMSNorm over the last dimension, computed in float32 and scaled in the input's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class AllMemRotaryEmbedding(nn.Module):
    """RoPE tables for the frequencies that the base model's `rope_parameters` describe."""

    inv_freq: Tensor

    def __init__(self, config: AllMemConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_type = (config.rope_parameters or {}).get("rope_type", "default")
        inv_freq, self.scaling = self.frequencies(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    @staticmethod
    def frequencies(config: AllMemConfig) -> tuple[Tensor, float]:
        """Inverse frequencies `[h / 2]` and the factor on cos and sin."""
        rope = config.rope_parameters or {}
        rope_type = rope.get("rope_type", "default")
        if rope_type != "default":
            return ROPE_INIT_FUNCTIONS[rope_type](config)
        exponent = torch.arange(0, config.head_width, 2, dtype=torch.float) / config.head_width
        return 1.0 / (rope["rope_theta"] ** exponent), 1.0

    @torch.no_grad()
    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin `[B, T, 1, h]` at positions `[B, T]`."""
        angles = positions[..., None].float() * self.inv_freq.float().to(positions.device)
        angles = torch.cat([angles, angles], dim=-1)[..., None, :]
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on `[B, T, heads, h]`, first half against second half."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class AllMemAttention(nn.Module):
    """The base model's attention under the window + sink mask, SWA of equation (1)."""

    def __init__(self, config: AllMemConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.head_width
        width, h = config.hidden_size, self.head_dim
        q_size, kv_size = config.num_attention_heads * h, config.kv_heads * h
        self.q_proj = nn.Linear(width, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, width, bias=False)
        norm = config.qk_norm
        self.q_norm = AllMemRMSNorm(h, config.rms_norm_eps) if norm else nn.Identity()
        self.k_norm = AllMemRMSNorm(h, config.rms_norm_eps) if norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        layout: RowLayout,
        cache: AllMemLayerCache | None,
        seen: int,
    ) -> Tensor:
        """`[B, T, D]` -> `[B, T, D]`; `seen` columns are in the cache before this call."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(heads)), *cos_sin)
        k = rotate(self.k_norm(self.k_proj(x).view(heads)), *cos_sin)
        v = self.v_proj(x).view(heads)
        if cache is None or seen == 0:
            out = self._fresh(q, k, v, layout)
        elif layout.is_step:
            cache.write(k, v, layout)  # the slot that it overwrites has just left the window
            out = self._step(q, layout, cache)
        elif layout.is_uniform:
            out = self._continued(q, k, v, layout.host_past[0], cache)
        else:
            out = self._ragged(q, k, v, layout, cache)
        if cache is not None and (seen == 0 or not layout.is_step):
            cache.write(k, v, layout)
        return self.o_proj(out.flatten(2))

    def _fresh(self, q: Tensor, k: Tensor, v: Tensor, layout: RowLayout) -> Tensor:
        """Rows from their first token on."""
        window = self.config.attention_window
        if window is None:
            return causal_attention(q, k, v, cu_seqlens=layout.cu_seqlens)
        return sliding_window_attention(
            q,
            k,
            v,
            window_size=window,
            num_sinks=self.config.num_sinks,
            cu_seqlens=layout.cu_seqlens,
        )

    def _step(self, q: Tensor, layout: RowLayout, cache: AllMemLayerCache) -> Tensor:
        """One query a row, `[R, 1, n_q, h]`: it sees every slot that is filled.

        The query heads of a group go as queries of their key-value head, so that keys and values
        are read once and never repeated.
        """
        keys, values = (cache.tensors[name] for name in ("keys", "values"))
        num_slots = min(keys.shape[1], max(layout.host_lengths))
        mask = None
        if min(layout.host_lengths) < num_slots:
            slot = torch.arange(num_slots, device=q.device)
            mask = (slot < layout.lengths[:, None])[:, None, None]  # [R, 1, 1, slots]
        grouped = q[:, 0].unflatten(1, (keys.shape[2], -1))  # [R, n_kv, n_q / n_kv, h]
        out = F.scaled_dot_product_attention(
            grouped,
            keys[:, :num_slots].transpose(1, 2),
            values[:, :num_slots].transpose(1, 2),
            attn_mask=mask,
        )
        return out.flatten(1, 2)[:, None]

    def _continued(
        self, q: Tensor, k: Tensor, v: Tensor, position: int, cache: AllMemLayerCache
    ) -> Tensor:
        """Several tokens of rows that all begin at `position`; `[B, T, heads, h]`."""
        window, device = self.config.attention_window, q.device
        reach = position if window is None else min(position, window - 1)
        near = cache.slots_of(torch.arange(position - reach, position, device=device))
        sinks = 0 if window is None else min(self.config.num_sinks, position - reach)
        held_k, held_v = cache.tensors["keys"], cache.tensors["values"]
        return continued_attention(
            q,
            torch.cat([held_k.index_select(1, near), k], 1),
            torch.cat([held_v.index_select(1, near), v], 1),
            position=position,
            window_size=window,
            num_sinks=self.config.num_sinks,
            sinks=(held_k[:, :sinks], held_v[:, :sinks]) if sinks else None,
        )

    def _ragged(
        self, q: Tensor, k: Tensor, v: Tensor, layout: RowLayout, cache: AllMemLayerCache
    ) -> Tensor:
        """New tokens of rows at different positions, or with padding; shapes `[B, T, heads, h]`."""
        q_rows, q_positions = layout.to_rows(q), layout.to_rows(layout.positions)
        new_positions = layout.to_rows(layout.positions, fill=-1)
        new = (layout.to_rows(k), layout.to_rows(v), new_positions)
        old = (cache.tensors["keys"], cache.tensors["values"], cache.positions(layout.past))
        return layout.from_rows(self._blocks(q_rows, q_positions, old, new))

    def _blocks(self, q: Tensor, q_positions: Tensor, old: _Keys, new: _Keys) -> Tensor:
        """Many queries `[R, T, n_q, h]`, in blocks that each get the keys in reach: linear in T."""
        window, sinks = self.config.attention_window, self.config.num_sinks
        if window is None:
            window = q.shape[1] + max(old[2].shape[1], 1)  # reaches everything
        reach = old[2].shape[1] + min(sinks + window, q.shape[1])
        block = min(max(window, _LEAST_BLOCK), _MAX_SCORES // (q.shape[0] * q.shape[2] * reach) + 1)
        out = []
        for start in range(0, q.shape[1], block):
            end, low = start + block, max(0, start - window + 1)
            cached = old if start < window else tuple(x[:, :sinks] for x in old)
            pieces = zip(cached, new, strict=True)
            keys, values, positions = (
                torch.cat([x, y[:, : min(sinks, low)], y[:, low:end]], 1) for x, y in pieces
            )
            out.append(
                attention_with_positions(
                    q[:, start:end],
                    keys,
                    values,
                    q_positions=q_positions[:, start:end],
                    k_positions=positions,
                    window_size=self.config.attention_window,
                    num_sinks=sinks,
                )
            )
        return torch.cat(out, dim=1)


class AllMemMLP(nn.Module):
    """The base model's SwiGLU."""

    def __init__(self, config: AllMemConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
