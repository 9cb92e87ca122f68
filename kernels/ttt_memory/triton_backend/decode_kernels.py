"""Triton kernels of a decode step around the products with weights; `kernels.ttt_memory.decode`.

Shape letters: R rows (one new token each), H memory heads, K head width, F hidden width, C = H K
channels, P pending slots (the chunk length), D model width. A program has a whole (row, head), or a
whole row, to itself, so a layer's state is read and written in one launch. Arithmetic is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

L2_EPS = tl.constexpr(1e-12)  # as in kernels.ttt_memory.branch


@triton.jit
def load_taps(
    x, tail, weight, offs_k, offs_t, C: tl.constexpr, K: tl.constexpr, TAPS: tl.constexpr
):
    """Of a head: y [BK] of equation (2), the inputs before the new one [BT, BK], and the new one.

    x, tail, weight: from the head's first channel on; tail [TAPS - 1, C], weight [C, TAPS].
    """
    here = offs_k < K
    new = tl.load(x + offs_k, mask=here, other=0.0)
    before = (offs_t < TAPS - 1)[:, None] & here[None, :]
    old = tl.load(tail + offs_t[:, None] * C + offs_k[None, :], mask=before, other=0.0)
    at = offs_k[None, :] * TAPS + offs_t[:, None]
    w = tl.load(weight + at, mask=before, other=0.0).to(tl.float32)
    last = tl.load(weight + offs_k * TAPS + TAPS - 1, mask=here, other=0.0).to(tl.float32)
    y = tl.sum(w * old.to(tl.float32), 0) + last * new.to(tl.float32)
    return y, old, new


@triton.jit
def store_taps(
    tail, old, new, offs_k, offs_t, C: tl.constexpr, K: tl.constexpr, TAPS: tl.constexpr
):
    """The tail one token later."""
    here = offs_k < K
    moved = ((offs_t > 0) & (offs_t < TAPS - 1))[:, None] & here[None, :]
    tl.store(tail + (offs_t - 1)[:, None] * C + offs_k[None, :], old, mask=moved)
    if TAPS > 1:
        tl.store(tail + (TAPS - 2) * C + offs_k, new, mask=here)


@triton.jit
def unit_head(y, scale, eps, K: tl.constexpr):
    """Equation (3) for one head's y [BK]."""
    weighted = y * tl.rsqrt(tl.sum(y * y, 0) / K + eps) * scale
    return weighted * tl.rsqrt(tl.sum(weighted * weighted, 0) + L2_EPS)


@triton.jit
def softplus(x):
    """Without overflow, and exact for very negative x."""
    small = tl.exp(-tl.abs(x))
    # log(1 + e) loses a small e: there it is e - e²/2
    return tl.maximum(x, 0.0) + tl.where(
        small < 1e-3, small - 0.5 * small * small, tl.log(1 + small)
    )


@triton.jit(do_not_specialize=["q_at", "rates_at", "out_row"])
def memory_step_kernel(
    x, bias, past, tail_q, tail_k, tail_v, conv_q, conv_k, conv_v, norm_q, norm_k, norm_out,
    w_gate, w_up, w_down, pending_k, pending_v, pending_eta, pending_mu, out,
    x_row, q_at, rates_at, out_row, qk_eps, out_eps,
    H: tl.constexpr, K: tl.constexpr, F: tl.constexpr, P: tl.constexpr, TAPS: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Equations (2) to (5), (8) and (12) before W_o for one token of (row, head).

    x [R, x_row] holds from column q_at on q, k, v [C each], and from column rates_at on the logits
    of gate [H], eta [H, 3] and mu [H], to all of which bias [x_row] is still to be added (it is
    zero for q, k, v). The tails move on by a token, and the token joins the unfinished chunk at
    slot past mod P. out [R, out_row] in x's dtype.
    """
    pid = tl.program_id(0)
    row, head = (pid // H).to(tl.int64), pid % H
    C: tl.constexpr = H * K
    offs_k, offs_t = tl.arange(0, BK), tl.arange(0, BT)
    here = offs_k < K
    at_tail = row * ((TAPS - 1) * C) + head * K
    at_x = x + row * x_row + q_at + head * K
    at_conv = head * (K * TAPS)
    y_q, old_q, new_q = load_taps(
        at_x, tail_q + at_tail, conv_q + at_conv, offs_k, offs_t, C, K, TAPS
    )
    y_k, old_k, new_k = load_taps(
        at_x + C, tail_k + at_tail, conv_k + at_conv, offs_k, offs_t, C, K, TAPS
    )
    y_v, old_v, new_v = load_taps(
        at_x + 2 * C, tail_v + at_tail, conv_v + at_conv, offs_k, offs_t, C, K, TAPS
    )
    tl.debug_barrier()  # a tail is read by threads that do not write it
    store_taps(tail_q + at_tail, old_q, new_q, offs_k, offs_t, C, K, TAPS)
    store_taps(tail_k + at_tail, old_k, new_k, offs_k, offs_t, C, K, TAPS)
    store_taps(tail_v + at_tail, old_v, new_v, offs_k, offs_t, C, K, TAPS)

    scale_q = tl.load(norm_q + offs_k, mask=here, other=0.0).to(tl.float32)
    scale_k = tl.load(norm_k + offs_k, mask=here, other=0.0).to(tl.float32)
    q = unit_head(y_q, scale_q, qk_eps, K)
    k = unit_head(y_k, scale_k, qk_eps, K)

    slot = (row * P + tl.load(past + row) % P) * H + head
    tl.store(pending_k + slot * K + offs_k, k.to(pending_k.dtype.element_ty), mask=here)
    tl.store(pending_v + slot * K + offs_k, y_v.to(pending_v.dtype.element_ty), mask=here)
    logits = x + row * x_row + rates_at
    gate = tl.load(logits + head).to(tl.float32) + tl.load(bias + rates_at + head).to(tl.float32)
    for matrix in tl.static_range(3):
        at = H + head * 3 + matrix
        eta = tl.load(logits + at).to(tl.float32) + tl.load(bias + rates_at + at).to(tl.float32)
        tl.store(pending_eta + slot * 3 + matrix, softplus(eta))
    at = 4 * H + head
    mu = tl.load(logits + at).to(tl.float32) + tl.load(bias + rates_at + at).to(tl.float32)
    tl.store(pending_mu + slot, tl.sigmoid(mu))

    weights = (row * H + head) * (F * K)
    read = q
    for first in range(0, F, BF):
        unit = first + tl.arange(0, BF)
        inside = (unit < F)[:, None] & here[None, :]
        at_up = weights + unit[:, None] * K + offs_k[None, :]
        g = tl.load(w_gate + at_up, mask=inside, other=0.0)
        u = tl.load(w_up + at_up, mask=inside, other=0.0)
        at_down = weights + offs_k[:, None] * F + unit[None, :]
        d = tl.load(w_down + at_down, mask=here[:, None] & (unit < F)[None, :], other=0.0)
        hidden = tl.sum(g * q[None, :], 1)
        hidden = hidden * tl.sigmoid(hidden) * tl.sum(u * q[None, :], 1)
        read += tl.sum(d * hidden[None, :], 1)

    scale = tl.load(norm_out + offs_k, mask=here, other=0.0).to(tl.float32)
    found = read * tl.rsqrt(tl.sum(read * read, 0) / K + out_eps) * scale * tl.sigmoid(gate)
    tl.store(out + row * out_row + head * K + offs_k, found.to(out.dtype.element_ty), mask=here)


@triton.jit
def sum_norm_kernel(
    x, y, z, alpha, weight, total, out,
    eps,
    D: tl.constexpr, ADDS: tl.constexpr, SCALED: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """total = x (+ y with ADDS) (+ alpha ⊙ z with SCALED); out = RMSNorm(total) weight; [R, D]."""
    channels = tl.arange(0, BD)
    here = channels < D
    at = tl.program_id(0).to(tl.int64) * D + channels
    value = tl.load(x + at, mask=here, other=0.0)
    if ADDS:
        wide = value.to(tl.float32) + tl.load(y + at, mask=here, other=0.0).to(tl.float32)
        if SCALED:
            factor = tl.load(alpha + channels, mask=here, other=0.0).to(tl.float32)
            wide += factor * tl.load(z + at, mask=here, other=0.0).to(tl.float32)
        value = wide.to(x.dtype.element_ty)
        tl.store(total + at, value, mask=here)
    wide = value.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
    scale = tl.load(weight + channels, mask=here, other=0.0).to(tl.float32)
    tl.store(out + at, (normed * scale).to(out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["N"])
def swiglu_kernel(gate, up, out, N, BN: tl.constexpr):
    """SiLU(gate) ⊙ up of N numbers."""
    at = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    here = at < N
    g = tl.load(gate + at, mask=here, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=here, other=0.0).to(tl.float32)
    tl.store(out + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=here)
