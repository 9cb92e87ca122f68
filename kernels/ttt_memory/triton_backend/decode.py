"""A decode step around the products with weights: the launches of `decode_kernels.py`.

Shape letters: R rows (one new token each), H memory heads, K head width, F hidden width, C = H K
channels, P chunk length, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
from torch import Tensor

from kernels.ttt_memory.triton_backend import decode_kernels as kernels
from kernels.ttt_memory.triton_backend.blocks import padded

_ELEMENTS = 8192
"""Numbers of a tile of W: 32 a thread."""
_SPREAD = 1024
"""Numbers of a program of the MLP's activation."""
_STREAMS = ("pending_k", "pending_v", "pending_eta", "pending_mu")
_TAILS = ("tail_q", "tail_k", "tail_v")
_WEIGHTS = ("weights_gate", "weights_up", "weights_down")


def memory_blocks(width: int, hidden: int, taps: int) -> dict[str, int]:
    """Keyword arguments of a launch of `memory_step_kernel`."""
    wide = padded(width)
    return {
        "BT": triton.next_power_of_2(max(1, taps - 1)),
        "BK": wide,
        "BF": min(padded(hidden), max(16, _ELEMENTS // wide)),
        "num_warps": 8,
    }


def norm_blocks(size: int) -> dict[str, int]:
    """Keyword arguments of a launch of `sum_norm_kernel`."""
    return {"BD": triton.next_power_of_2(size), "num_warps": 4 if size <= 1024 else 8}


def memory_step(
    x: Tensor,
    bias: Tensor,
    past: Tensor,
    state: Mapping[str, Tensor],
    convs: tuple[Tensor, Tensor, Tensor],
    norms: tuple[Tensor, Tensor, Tensor],
    *,
    first: int,
    rates: int,
    qk_eps: float,
    out_eps: float,
) -> Tensor:
    """Equations (2) to (5), (8) and (12) before W_o for one token a row; one launch.

    Args:
        x: ``[R, N]``, contiguous: the projections, without biases. From column `first` on q, k and
            v ``[C each]``, from column `rates` on the logits of gate ``[H]``, eta ``[H, 3]`` and mu
            ``[H]``.
        bias: ``[N]``, added to the logits of gate, eta and mu.
        past: int64 ``[R]`` tokens that each row has seen before.
        state: ``tail_q``, ``tail_k``, ``tail_v`` ``[R, taps - 1, C]``, ``weights_gate``,
            ``weights_up`` ``[R, H, F, K]``, ``weights_down`` ``[R, H, K, F]``, ``pending_k``,
            ``pending_v`` ``[R, P, H, K]``, ``pending_eta`` ``[R, P, H, 3]``, ``pending_mu``
            ``[R, P, H]``, as `AllMemLayerCache` holds them. Tails move on and the token is written
            to slot past mod P, in place.
        convs: weights ``[C, taps]`` of q, k, v.
        norms: weights ``[K]`` of q, k and the output.
        first: see x.
        rates: see x.
        qk_eps: of the norms of q and k.
        out_eps: of the output's norm.

    Returns:
        ``[R, C]`` in x's dtype.

    Raises:
        ValueError: a tensor of the state that is not contiguous.
    """
    held = {name: state[name] for name in (*_TAILS, *_WEIGHTS, *_STREAMS)}
    loose = [name for name, value in held.items() if not value.is_contiguous()]
    if loose or not x.is_contiguous():
        raise ValueError(f"{loose or 'x'} must be contiguous; make it so by .contiguous()")
    rows, heads, hidden, width = held["weights_gate"].shape
    taps = convs[0].shape[1]
    out = x.new_empty(rows, heads * width)
    kernels.memory_step_kernel[(rows * heads,)](
        x, bias, past, *(held[name] for name in _TAILS), *(w.contiguous() for w in convs), *norms,
        *(held[name] for name in _WEIGHTS), *(held[name] for name in _STREAMS), out,
        x.stride(0), first, rates, out.stride(0), qk_eps, out_eps,
        heads, width, hidden, held["pending_k"].shape[1], taps,
        **memory_blocks(width, hidden, taps),
    )  # fmt: skip
    return out


def sum_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    y: Tensor | None = None,
    z: Tensor | None = None,
    alpha: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``total = x + y + alpha * z`` (what is given) and ``RMSNorm(total) * weight``; one launch.

    Args:
        x: ``[R, D]``.
        weight: ``[D]``.
        eps: of the norm.
        y: ``[R, D]`` or None: total is x.
        z: ``[R, D]``, together with y only.
        alpha: ``[D]``, of equation (1), with z.

    Returns:
        total and the norm, each ``[R, D]`` in x's dtype; the norm is that of the rounded total.
    """
    x = x.contiguous()
    y, z = (None if part is None else part.contiguous() for part in (y, z))
    out = torch.empty_like(x)
    total = x if y is None else torch.empty_like(x)
    size = x.shape[1]
    kernels.sum_norm_kernel[(x.shape[0],)](
        x, x if y is None else y, x if z is None else z, weight if alpha is None else alpha,
        weight, total, out, eps, size, ADDS=y is not None, SCALED=z is not None,
        **norm_blocks(size),
    )  # fmt: skip
    return total, out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``SiLU(gate) * up`` of tensors of one shape; one launch."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    count = gate.numel()
    kernels.swiglu_kernel[(triton.cdiv(count, _SPREAD),)](gate, up, out, count, BN=_SPREAD)
    return out


__all__ = ["memory_step", "sum_norm", "swiglu"]
