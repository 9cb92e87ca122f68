"""The token mixer of a layer from the kernels' own parts: equation (1) of arXiv 2602.13680.

TokenMixer(x) = SWA(x) + alpha * AllMem(x), the projections included. Shape letters: B sequences,
T tokens, D model width, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import Function, Leaves
from benchmarks.shapes import Shape
from kernels.ttt_memory import branch, fused

EPS = 1e-6
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def frozen_names(shape: Shape) -> tuple[str, ...]:
    """Weights of the base model, which conversion does not train."""
    return ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")


def mixer_leaves(shape: Shape, draw: Any, dtype: torch.dtype) -> Leaves:
    """Random weights of the base's attention and of the branch, by name."""
    width, heads, head = shape.hidden_size, shape.memory_heads, shape.memory_head_dim
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    hidden = shape.expansion * head

    def matrix(rows: int, columns: int) -> Tensor:
        return (draw(rows, columns) * columns**-0.5).to(dtype)

    conv = torch.tensor([0.0, 0.0, 0.0, 1.0])
    leaves = {
        "q_proj": matrix(q_size, width),
        "k_proj": matrix(kv_size, width),
        "v_proj": matrix(kv_size, width),
        "o_proj": matrix(width, q_size),
        "q_norm": (1 + 0.1 * draw(shape.head_dim)).to(dtype),
        "k_norm": (1 + 0.1 * draw(shape.head_dim)).to(dtype),
        "memory.o_proj": matrix(width, shape.memory_size),
        "memory.q_norm": (1 + 0.1 * draw(head)).to(dtype),
        "memory.k_norm": (1 + 0.1 * draw(head)).to(dtype),
        "memory.o_norm": (1 + 0.1 * draw(head)).to(dtype),
        "memory.rates": 0.1 * matrix(4 * heads, width),
        "memory.gate_proj": matrix(heads, width),
        "memory.alpha": (0.3 * draw(width)).to(dtype),
        "memory.gate": draw(heads, hidden, head) * head**-0.5,
        "memory.up": draw(heads, hidden, head) * head**-0.5,
        "memory.down": draw(heads, head, hidden) * hidden**-0.5,
    }
    for name in ("q", "k", "v"):
        leaves[f"memory.{name}_proj"] = matrix(shape.memory_size, width)
        taps = 0.1 * draw(shape.memory_size, 4)
        leaves[f"memory.{name}_conv"] = (taps + conv.to(taps)).to(dtype)
    return leaves


def token_mixer(
    leaves: Leaves,
    *,
    shape: Shape,
    attend: Attend,
    scan: Function | None,
    pieces: str = "eager",
) -> Tensor:
    """`[B, T, D]` -> `[B, T, D]`.

    Args:
        leaves: x, already normalised, and the weights of `mixer_leaves`.
        shape: sizes.
        attend: the base's attention, q, k, v `[B, T, heads, K]`.
        scan: the memory; None leaves the branch out.
        pieces: what stands before and after attention and scan: "eager", "compiled" (by
            torch.compile), or "fused" (the branch's by the kernels behind
            `kernels.ttt_memory.fused`).
    """
    before, inputs, after = _pieces(pieces)
    q, k, v = before(leaves, shape.head_dim)
    out = attend(q, k, v).flatten(2) @ leaves["o_proj"].mT
    if scan is None:
        return out
    streams = inputs(leaves, shape.memory_heads, 8 / shape.chunk_size)
    streams |= {name: leaves[f"memory.{name}"] for name in ("gate", "up", "down")}
    return after(leaves, scan(streams), out)


def _attention_inputs(leaves: Leaves, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q and k after norm and RoPE, and v: `[B, T, heads, K]`."""
    x = leaves["x"]
    q, k, v = (
        (x @ leaves[f"{name}_proj"].mT).unflatten(-1, (-1, head_dim)) for name in ("q", "k", "v")
    )
    wide = torch.promote_types(x.dtype, torch.float32)
    positions = torch.arange(x.shape[1], device=x.device, dtype=wide)
    steps = torch.arange(0, head_dim, 2, device=x.device, dtype=wide) / head_dim
    angles = (positions[:, None] * 1e6**-steps)[:, None, :]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def turned(part: Tensor, norm: Tensor) -> Tensor:
        first, second = branch.head_norm(part, norm, EPS).chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    return turned(q, leaves["q_norm"]), turned(k, leaves["k_norm"]), v


def _memory_inputs(
    leaves: Leaves, heads: int, eta_init: float, backend: str = "reference"
) -> Leaves:
    """Equations (2) to (5): q, k, v, eta and mu."""
    x = leaves["x"]
    streams = {}
    for name in ("q", "k", "v"):
        projected = x @ leaves[f"memory.{name}_proj"].mT
        norm = None if name == "v" else leaves[f"memory.{name}_norm"]
        conv = leaves[f"memory.{name}_conv"]
        streams[name] = fused.conv_heads(
            projected, conv, heads, norm=norm, eps=EPS, backend=backend
        )
    logits = x @ leaves["memory.rates"].mT
    eta, mu = logits.split([3 * heads, heads], -1)
    bias = branch.eta_bias(eta_init)
    wide = torch.promote_types(x.dtype, torch.float32)
    streams["eta"] = branch.eta_from(eta.to(wide) + bias).unflatten(-1, (heads, 3))
    streams["mu"] = branch.mu_from(mu)
    return streams


def _add_output(
    leaves: Leaves, v_hat: Tensor, attended: Tensor, backend: str = "reference"
) -> Tensor:
    """Equations (12) and (1)."""
    gate = leaves["x"] @ leaves["memory.gate_proj"].mT
    mixed = fused.gated_output(v_hat, leaves["memory.o_norm"], gate, EPS, backend=backend)
    out = mixed @ leaves["memory.o_proj"].mT
    return fused.add_scaled(attended, leaves["memory.alpha"], out, backend=backend)


@cache
def _pieces(kind: str) -> tuple[Callable[..., Any], ...]:
    pieces = (_attention_inputs, _memory_inputs, _add_output)
    if kind == "eager":
        return pieces
    if kind == "fused":
        by_triton = (partial(piece, backend="triton") for piece in pieces[1:])
        return (_attention_inputs, *by_triton)
    return tuple(torch.compile(piece, dynamic=False) for piece in pieces)
