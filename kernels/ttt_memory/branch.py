"""What stands before and after the memory scan: equations (2) to (5) and (12) of arXiv 2602.13680.

Shape letters: B sequences, R rows (R = B, or the N documents of one packed sequence), T tokens,
C = H * K channels, H memory heads, K head width. Functions of tensors only: the projections belong
to the module that calls them.

This file imports torch and the standard library only: exported models carry a copy of it.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

L2_EPS = 1e-12  # on the squared norm: keeps the gradient at a zero vector finite


def causal_conv(
    x: Tensor, weight: Tensor, *, tail: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution of equation (2): ``y_t = sum_i weight[:, i] x_{t-width+1+i}``.

    With ``weight[:, -1] = 1`` and 0 elsewhere it is the identity, to the bit. Tokens before the
    start of a document count as 0, so that nothing looks across documents; two calls over a split
    sequence equal one call.

    Args:
        x: ``[B, T, C]``.
        weight: ``[C, width]``, the current token's weight last.
        tail: the last ``width - 1`` inputs of each row before this call ``[R, width - 1, C]``;
            None: 0.
        cu_seqlens: int ``[N + 1]`` document starts and T of a packed sequence (B = 1, R = N);
            None: R = B.

    Returns:
        y ``[B, T, C]`` and the new tail ``[R, width - 1, C]``, both in x's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_conv(x, weight, tail, cu_seqlens)
    num_rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    reach = weight.shape[-1] - 1
    if tail is None:
        tail = x.new_zeros(num_rows, reach, x.shape[-1])
    tail = tail.to(x.dtype)
    if cu_seqlens is None:
        padded = torch.cat([tail, x], 1)
        return _taps(padded, weight, reach), padded[:, padded.shape[1] - reach :].clone()
    starts = cu_seqlens.tolist()
    # each document with its tail before it, one after the other; the tails' outputs are left out
    documents = x[0].split([end - start for start, end in pairwise(starts)])
    pieces = [piece for pair in zip(tail.unbind(0), documents, strict=True) for piece in pair]
    padded = torch.cat(pieces)
    ends = torch.tensor(starts[1:]) + reach * torch.arange(1, num_rows + 1)
    last = (ends[:, None] + torch.arange(-reach, 0)).to(x.device)
    first = torch.arange(x.shape[1]) + reach * torch.repeat_interleave(
        torch.arange(num_rows), torch.tensor([len(document) for document in documents])
    )
    y = _taps(padded[None], weight, reach).index_select(1, first.to(x.device))
    return y, padded[last]


def check_conv(x: Tensor, weight: Tensor, tail: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Refuses arguments of `causal_conv` that do not fit each other, by a ValueError."""
    num_rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"weight of shape {list(weight.shape)} does not fit x of shape {list(x.shape)}; "
            "give x [B, T, C] and weight [C, width]"
        )
    want = [num_rows, weight.shape[-1] - 1, x.shape[-1]]
    if tail is not None and list(tail.shape) != want:
        raise ValueError(
            f"tail of shape {list(tail.shape)} does not fit; give it {want}, or None at the start"
        )
    if cu_seqlens is None:
        return
    starts = cu_seqlens.tolist()
    if x.shape[0] != 1 or starts[0] != 0 or starts[-1] != x.shape[1] or sorted(starts) != starts:
        raise ValueError(
            f"cu_seqlens from {starts[0]} to {starts[-1]} does not rise from 0 to T={x.shape[1]} "
            f"in one packed sequence (B={x.shape[0]}); give the document starts and T, with B=1"
        )


def _taps(padded: Tensor, weight: Tensor, reach: int) -> Tensor:
    """The sum over taps, for inputs that start ``reach`` tokens early."""
    num_tokens = padded.shape[1] - reach
    weight = weight.to(padded.dtype)
    y = padded[:, reach:] * weight[:, reach]
    for tap in range(reach):
        y = torch.addcmul(y, padded[:, tap : tap + num_tokens], weight[:, tap])
    return y


def head_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, in float32 inside: x ``[..., K]``, weight ``[K]``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.to(wide.dtype)).to(x.dtype)


def l2_normalize(x: Tensor) -> Tensor:
    """x ``[..., K]`` over its L2 norm, in float32 inside; a zero vector stays zero."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + L2_EPS)).to(x.dtype)


def memory_qk(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Queries or keys, equation (3): ``l2(RMSNorm(x))``; x ``[..., K]``, weight ``[K]``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return l2_normalize(head_norm(wide, weight, eps)).to(x.dtype)


def eta_from(logits: Tensor) -> Tensor:
    """Learning rates of equation (4): ``softplus``, in float32 or wider. Any shape."""
    return F.softplus(logits.to(torch.promote_types(logits.dtype, torch.float32)))


def mu_from(logits: Tensor) -> Tensor:
    """Momentum coefficients per token of (5): ``sigmoid``, in float32 or wider. Any shape."""
    return torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))


def eta_bias(eta_init: float) -> float:
    """The bias at which ``eta_from`` gives ``eta_init``: the inverse of softplus.

    Raises:
        ValueError: ``eta_init`` not above 0.
    """
    if not eta_init > 0:
        raise ValueError(
            f"eta_init={eta_init} is not above 0, and softplus reaches positive rates only; "
            "set it to 1e-3 or so"
        )
    return eta_init + math.log(-math.expm1(-eta_init))


def memory_output(v_hat: Tensor, norm_weight: Tensor, gate_logits: Tensor, eps: float) -> Tensor:
    """Equation (12) before W_o: ``concat_heads(sigmoid(gate)_head * RMSNorm_head(v_hat))``.

    Args:
        v_hat: ``[B, T, H, K]``, the scan's output.
        norm_weight: ``[K]``, shared by the heads.
        gate_logits: ``[B, T, H]``.
        eps: of the RMSNorm.

    Returns:
        ``[B, T, H * K]`` in v_hat's dtype.
    """
    gate = torch.sigmoid(gate_logits.to(torch.promote_types(gate_logits.dtype, torch.float32)))
    return (gate[..., None].to(v_hat.dtype) * head_norm(v_hat, norm_weight, eps)).flatten(-2)
