"""One query a row over the ring of the window and the sinks: the launches of `decode_kernels.py`.

Shape letters: R rows, N key-value heads, G query heads of each, K head width.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels.swa import decode_kernels as kernels

_PROGRAMS = 3 * 132
"""Programs wanted at most, by splitting the slots: those that run at once on a Hopper GPU."""
_MOST_SPLITS = 64
JOIN_WARPS = 8


def step_blocks(width: int, group: int, item: int) -> dict[str, int]:
    """Keyword arguments of a launch of `window_step_kernel`; `item`: bytes of a number."""
    wide = max(16, triton.next_power_of_2(width))
    return {
        "BG": max(16, triton.next_power_of_2(group)),
        "BK": wide,
        "BN": (64 if wide <= 128 else 32) if item == 2 else 16,  # float32: no tensor cores
        "num_warps": 4 if item == 2 else 8,
        "num_stages": 3 if item == 2 else 2,
    }


def splits(rows: int, heads: int, slots: int, block: int) -> tuple[int, int]:
    """Splits of the slots, and slots of each: a multiple of the block."""
    most = min(_MOST_SPLITS, triton.cdiv(slots, block))
    count = max(1, min(most, _PROGRAMS // (rows * heads)))
    share = triton.cdiv(triton.cdiv(slots, count), block) * block
    return triton.cdiv(slots, share), share


def window_step(
    x: Tensor,
    bias: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    past: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    num_heads: int,
    num_slots: int,
    window_size: int,
    num_sinks: int,
    eps: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """Bias, q/k norm, RoPE, the new token's slot, and attention to window and sinks; two launches.

    Args:
        x: ``[R, at least (N G + 2 N) K]``, contiguous rows: q, k and v of the new token, without
            biases.
        bias: as many as x has columns.
        norms: weights ``[K]`` of the norms of q and k, or None without.
        cos: ``[R, K]``.
        sin: ``[R, K]``.
        past: int64 ``[R]`` tokens that each row has seen before: the new one's position.
        keys: ``[R, slots, N, K]``, contiguous, after RoPE; the new token's key is written in place.
        values: likewise.
        num_heads: N G query heads.
        num_slots: slots that some row fills with the new token, known to the host; no row more.
        window_size: W.
        num_sinks: s.
        eps: of the norms of q and k.

    Returns:
        ``[R, N G K]`` in x's dtype.

    Raises:
        ValueError: a ring that is not contiguous, or has fewer slots than `num_slots`.
    """
    rows, slots, heads, width = keys.shape
    if not (keys.is_contiguous() and values.is_contiguous() and x.is_contiguous()):
        raise ValueError("keys, values and x must be contiguous; make them so by .contiguous()")
    if num_slots > slots:
        raise ValueError(f"num_slots={num_slots} exceeds the ring's {slots} slots; make it larger")
    group = num_heads // heads
    blocks = step_blocks(width, group, keys.element_size())
    count, share = splits(rows, heads, num_slots, blocks["BN"])
    parts = x.new_empty(count, rows, heads, group, width, dtype=torch.float32)
    extremes = x.new_empty(count, 2, rows, heads, group, dtype=torch.float32)
    out = x.new_empty(rows, num_heads * width)
    kernels.window_step_kernel[(rows * heads, count)](
        x, bias, *(norms or (bias, bias)), cos, sin, past, keys, values, parts, extremes,
        x.stride(0), window_size, num_sinks, slots, share, width**-0.5, *eps,
        heads, group, width, NORM=norms is not None,
        PRECISION="ieee" if keys.element_size() == 4 else "tf32", **blocks,
    )  # fmt: skip
    kernels.join_splits_kernel[(rows * num_heads,)](
        parts, extremes, out, count, width, BS=triton.next_power_of_2(count), BK=blocks["BK"],
        num_warps=JOIN_WARPS,
    )  # fmt: skip
    return out


__all__ = ["splits", "window_step"]
