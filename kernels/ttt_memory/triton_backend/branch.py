"""What stands around the scan as nodes of autograd: the launches of `branch_kernels.py`.

Shape letters: B sequences, R rows (documents), T tokens, H heads, K head width, C = H K channels,
D model width.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from kernels.ttt_memory.triton_backend import branch_kernels as kernels
from kernels.ttt_memory.triton_backend.blocks import padded

ELEMENTS = 4096
"""Numbers of a program's tile: 32 a thread."""
TILES = 8
"""Tiles of a program of the convolution's gradient, each of 1/8 of ELEMENTS: what it remakes for
every tap fills the registers."""


def tile(width: int) -> dict[str, int]:
    """Tokens and channels of a program for heads of some width, and its warps."""
    wide = padded(width)
    return {"rows": max(1, ELEMENTS // wide), "BK": wide, "num_warps": 4}


def gradient_tile(width: int, taps: int) -> dict[str, int]:
    """Keyword arguments of a launch of the convolution's gradient, for blocks of `tile`'s rows."""
    sizes = tile(width)
    return {
        "TILES": TILES,
        "SUMS": triton.next_power_of_2(taps + 1),
        "BT": max(1, sizes["rows"] // TILES),
        "BK": sizes["BK"],
        "num_warps": sizes["num_warps"],
    }


@lru_cache(maxsize=32)
def conv_blocks(
    bounds: tuple[int, ...] | None, batch: int, num_tokens: int, reach: int, size: int,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """[P, 5] int64: row, sequence, the row's first token there, first position, length.

    Args:
        bounds: document starts and T of a packed sequence; None: each sequence is a row.
        batch: B.
        num_tokens: T.
        reach: positions before 0 that get blocks too.
        size: positions of a block.
        device: of the result.
    """
    if bounds is None:
        rows = [(row, row, 0, num_tokens) for row in range(batch)]
    else:
        rows = [(row, 0, start, stop - start) for row, (start, stop) in enumerate(pairwise(bounds))]
    table = np.asarray(rows, dtype=np.int64).reshape(-1, 4)
    counts = -(-(table[:, 3] + reach) // size)
    each = np.repeat(table, counts, axis=0)
    place = np.arange(len(each)) - np.repeat(np.cumsum(counts) - counts, counts)
    blocks = np.concatenate([each[:, :3], (place * size - reach)[:, None], each[:, 3:]], 1)
    return torch.from_numpy(blocks).to(device)


class ConvHeads(torch.autograd.Function):
    """x [B, T, C], its last dimension contiguous -> [B, T, H, K]; `conv_kernel` has the formula."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, norm: Tensor | None, tail: Tensor | None,
        num_heads: int, eps: float, bounds: tuple[int, ...] | None,
    ) -> Tensor:  # fmt: skip
        if x.stride(-1) != 1:
            x = x.contiguous()
        weight = weight.contiguous()
        batch, num_tokens, channels = x.shape
        width = channels // num_heads
        sizes = tile(width)
        out = x.new_empty(batch, num_tokens, num_heads, width)
        blocks = conv_blocks(bounds, batch, num_tokens, 0, sizes["rows"], x.device)
        ctx.settings = (num_heads, width, eps, bounds)
        ctx.save_for_backward(x, weight, norm, tail)
        if len(blocks):
            kernels.conv_kernel[(len(blocks), num_heads)](
                x, _given(tail, x), weight, _given(norm, weight), blocks, out,
                x.stride(0), x.stride(1), out.stride(0), eps,
                num_heads, width, weight.shape[1], HAS_TAIL=tail is not None,
                NORM=norm is not None, BT=sizes["rows"], BK=sizes["BK"],
                num_warps=sizes["num_warps"],
            )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:  # type: ignore[override]
        x, weight, norm, tail = ctx.saved_tensors
        num_heads, width, eps, bounds = ctx.settings
        grad_out = grad_out.contiguous()
        taps, sizes = weight.shape[1], tile(width)
        reach = 0 if tail is None else taps - 1
        blocks = conv_blocks(bounds, *x.shape[:2], reach, sizes["rows"], x.device)
        grad_x = torch.empty_like(x)  # dense, its dimensions in x's order
        grad_tail = None if tail is None else torch.empty_like(tail, memory_format=_CONTIGUOUS)
        channels = num_heads * width
        grad_weight = x.new_empty(len(blocks), taps + 1, channels, dtype=torch.float32)
        if len(blocks):
            kernels.conv_gradient_kernel[(len(blocks), num_heads)](
                x, _given(tail, x), weight, _given(norm, weight), blocks, grad_out,
                grad_x, _given(grad_tail, grad_x), grad_weight,
                x.stride(0), x.stride(1), grad_x.stride(0), grad_x.stride(1),
                grad_out.stride(0), eps,
                num_heads, width, taps, HAS_TAIL=tail is not None,
                NORM=norm is not None, **gradient_tile(width, taps),
            )  # fmt: skip
        sums = grad_weight.sum(0)
        d_weight = sums[:taps].T.to(weight.dtype)
        d_norm = None
        if norm is not None:
            d_norm = sums[taps].unflatten(0, (num_heads, width)).sum(0).to(norm.dtype)
        return grad_x, d_weight, d_norm, grad_tail, None, None, None


_CONTIGUOUS = torch.contiguous_format


def _given(x: Tensor | None, other: Tensor) -> Tensor:
    """x, or any tensor in its place, which the kernel does not touch."""
    return other if x is None else x.contiguous()


class GateNorm(torch.autograd.Function):
    """v_hat [B, T, H, K], norm [K], gate logits [B, T, H] -> [T, B, H K], Megatron's order."""

    @staticmethod
    def forward(ctx: Any, v_hat: Tensor, norm: Tensor, gate: Tensor, eps: float) -> Tensor:
        v_hat = v_hat.contiguous()
        if gate.stride(-1) != 1:
            gate = gate.contiguous()
        batch, num_tokens, heads, width = v_hat.shape
        out = v_hat.new_empty(num_tokens, batch, heads * width)
        ctx.eps = eps
        ctx.save_for_backward(v_hat, norm, gate)
        count = batch * num_tokens * heads
        if count:
            sizes = tile(width)
            kernels.gate_norm_kernel[(triton.cdiv(count, sizes["rows"]),)](
                v_hat, norm, gate, out, num_tokens, batch, count, gate.stride(0), gate.stride(1),
                eps, heads, width, BR=sizes["rows"], BK=sizes["BK"], num_warps=sizes["num_warps"],
            )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:  # type: ignore[override]
        v_hat, norm, gate = ctx.saved_tensors
        batch, num_tokens, heads, width = v_hat.shape
        count, sizes = batch * num_tokens * heads, tile(width)
        programs = triton.cdiv(count, sizes["rows"])
        grad_v = torch.empty_like(v_hat)
        grad_gate = gate.new_empty(gate.shape)
        grad_norm = v_hat.new_empty(programs, width, dtype=torch.float32)
        if count:
            kernels.gate_norm_gradient_kernel[(programs,)](
                v_hat, norm, gate, grad_out.contiguous(), grad_v, grad_gate, grad_norm,
                num_tokens, batch, count, gate.stride(0), gate.stride(1), ctx.eps,
                heads, width, BR=sizes["rows"], BK=sizes["BK"], num_warps=sizes["num_warps"],
            )  # fmt: skip
        return grad_v, grad_norm.sum(0).to(norm.dtype), grad_gate, None


class AddScaled(torch.autograd.Function):
    """base + alpha ⊙ x of [..., D] in one pass, and one pass for both gradients of the product."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, alpha: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(alpha, x)
        return torch.addcmul(base, alpha.to(x.dtype), x)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:  # type: ignore[override]
        alpha, x = ctx.saved_tensors
        x, grad = x.contiguous(), grad_out.contiguous()
        size = x.shape[-1]
        count = x.numel() // size
        tokens, channels = 32, 128
        programs = triton.cdiv(count, tokens)
        grad_x = torch.empty_like(x)
        parts = x.new_empty(programs, size, dtype=torch.float32)
        if count:
            kernels.scale_gradient_kernel[(programs, triton.cdiv(size, channels))](
                x, alpha, grad, grad_x, parts, count, size, BT=tokens, BD=channels,
            )  # fmt: skip
        return grad_out, parts.sum(0).to(alpha.dtype), grad_x
