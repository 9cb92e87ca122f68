"""Triton kernels of what stands around the scan: equations (2), (3) and (12) of arXiv 2602.13680.

Shape letters: B sequences, R rows (documents), T tokens, H heads, K head width, C = H K channels.
All of it is bound by memory, so each kernel reads its inputs once and writes its outputs once; what
lies between is made again in the backward pass rather than kept. Arithmetic is float32. Sums over
tokens (the gradients of weights) leave a program as one row of partial sums: no atomics.

A block is some positions of one row: blocks [P, 5] hold row, sequence, the row's first token in the
sequence, the first position and the row's length. Positions below 0 are the row's tail.
"""

from __future__ import annotations

import triton
import triton.language as tl

L2_EPS = tl.constexpr(1e-12)  # as in kernels.ttt_memory.branch


@triton.jit
def load_positions(
    x, x_token, tail, position, length, offs_k, C, K: tl.constexpr,
    REACH: tl.constexpr, HAS_TAIL: tl.constexpr,
):  # fmt: skip
    """[BT, BK] of a row in float32, the tail before position 0, zero elsewhere."""
    inside = ((position >= 0) & (position < length))[:, None] & (offs_k < K)[None, :]
    at = position.to(tl.int64)[:, None] * x_token + offs_k[None, :]
    found = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_TAIL:
        before = ((position < 0) & (position >= -REACH))[:, None] & (offs_k < K)[None, :]
        at = (position + REACH)[:, None] * C + offs_k[None, :]
        found += tl.load(tail + at, mask=before, other=0.0).to(tl.float32)
    return found


@triton.jit
def convolved(
    x, x_token, tail, weight, position, length, offs_k, C, K: tl.constexpr,
    TAPS: tl.constexpr, HAS_TAIL: tl.constexpr,
):  # fmt: skip
    """y of equation (2), [BT, BK]; weight [C, TAPS] from this head's channels on."""
    y = tl.zeros((position.shape[0], offs_k.shape[0]), tl.float32)
    for tap in tl.static_range(TAPS):
        w = tl.load(weight + offs_k * TAPS + tap, mask=offs_k < K, other=0.0).to(tl.float32)
        earlier = position - (TAPS - 1) + tap
        y += w[None, :] * load_positions(
            x, x_token, tail, earlier, length, offs_k, C, K, TAPS - 1, HAS_TAIL
        )
    return y


@triton.jit
def unit(y, scale, eps, K: tl.constexpr):
    """Equation (3): RMSNorm's factor and its output without weight, then l2's factor, [BT]."""
    rms = tl.rsqrt(tl.sum(y * y, 1) / K + eps)
    normed = y * rms[:, None]
    weighted = normed * scale[None, :]
    return rms, normed, tl.rsqrt(tl.sum(weighted * weighted, 1) + L2_EPS)


@triton.jit
def conv_kernel(
    x, tail, weight, norm, blocks, out,
    x_row, x_token, out_row, eps,
    H: tl.constexpr, K: tl.constexpr, TAPS: tl.constexpr,
    HAS_TAIL: tl.constexpr, NORM: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x [B, T, C] -> out [B, T, H, K]: equation (2), and with NORM equation (3).

    tail [R, TAPS - 1, C]; norm [K]. x_row, x_token: strides of x.
    """
    block, head = tl.program_id(0), tl.program_id(1)
    C: tl.constexpr = H * K
    row, sequence = tl.load(blocks + block * 5), tl.load(blocks + block * 5 + 1)
    start, first = tl.load(blocks + block * 5 + 2), tl.load(blocks + block * 5 + 3)
    length = tl.load(blocks + block * 5 + 4).to(tl.int32)
    offs_k = tl.arange(0, BK)
    position = first.to(tl.int32) + tl.arange(0, BT)
    y = convolved(
        x + sequence * x_row + start * x_token + head * K, x_token,
        tail + row * ((TAPS - 1) * C) + head * K, weight + head * (K * TAPS),
        position, length, offs_k, C, K, TAPS, HAS_TAIL,
    )  # fmt: skip
    if NORM:
        scale = tl.load(norm + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
        _, normed, length_one = unit(y, scale, eps, K)
        y = normed * scale[None, :] * length_one[:, None]
    at = position.to(tl.int64)[:, None] * C + offs_k[None, :]
    valid = (position < length)[:, None] & (offs_k < K)[None, :]
    out_block = out + sequence * out_row + start * C + head * K
    tl.store(out_block + at, y.to(out.dtype.element_ty), mask=valid)


@triton.jit
def conv_gradient_kernel(
    x, tail, weight, norm, blocks, grad_out, grad_x, grad_tail, grad_weight,
    x_row, x_token, grad_row, grad_token, out_row, eps,
    H: tl.constexpr, K: tl.constexpr, TAPS: tl.constexpr,
    HAS_TAIL: tl.constexpr, NORM: tl.constexpr, TILES: tl.constexpr, SUMS: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The gradients of `conv_kernel`. A block is TILES tiles of BT.

    Position p gets what the outputs at p … p + TAPS - 1 give it, so their y is made once for each
    of them: that costs arithmetic, of which there is plenty, and saves a tensor between two
    kernels. grad_weight [P, TAPS + 1, C]: partial sums of the taps, and of norm in the last row;
    SUMS: TAPS + 1, rounded up to a power of two.
    """
    block, head = tl.program_id(0), tl.program_id(1)
    C: tl.constexpr = H * K
    row, sequence = tl.load(blocks + block * 5), tl.load(blocks + block * 5 + 1)
    start, first = tl.load(blocks + block * 5 + 2), tl.load(blocks + block * 5 + 3)
    length = tl.load(blocks + block * 5 + 4).to(tl.int32)
    offs_k = tl.arange(0, BK)
    x_base = x + sequence * x_row + start * x_token + head * K
    tail_base = tail + row * ((TAPS - 1) * C) + head * K
    weight_base = weight + head * (K * TAPS)
    out_base = grad_out + sequence * out_row + start * C + head * K
    x_block = grad_x + sequence * grad_row + start * grad_token + head * K
    scale = tl.full((BK,), 1.0, tl.float32)
    if NORM:
        scale = tl.load(norm + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
    kind = tl.arange(0, SUMS)
    sums = tl.zeros((SUMS, BK), tl.float32)
    for tile in range(TILES):
        position = first.to(tl.int32) + tile * BT + tl.arange(0, BT)
        d_x = tl.zeros((BT, BK), tl.float32)
        for ahead in tl.static_range(TAPS):
            later = position + ahead
            # outputs outside of the row have no gradient
            d_y = load_positions(out_base, C, tail, later, length, offs_k, C, K, 0, False)
            if NORM:
                y = convolved(
                    x_base, x_token, tail_base, weight_base, later, length, offs_k, C, K, TAPS,
                    HAS_TAIL,
                )  # fmt: skip
                rms, normed, length_one = unit(y, scale, eps, K)
                weighted = normed * scale[None, :]
                along = tl.sum(d_y * weighted, 1) * length_one * length_one
                d_u = length_one[:, None] * (d_y - weighted * along[:, None])
                if ahead == 0:
                    total = tl.sum(d_u * normed, 0)
                    sums += tl.where((kind == TAPS)[:, None], total[None, :], 0.0)
                d_n = d_u * scale[None, :]
                d_y = rms[:, None] * (d_n - normed * (tl.sum(d_n * normed, 1) / K)[:, None])
            if ahead == 0:
                for tap in tl.static_range(TAPS):
                    earlier = position - (TAPS - 1) + tap
                    value = load_positions(
                        x_base, x_token, tail_base, earlier, length, offs_k, C, K, TAPS - 1,
                        HAS_TAIL,
                    )  # fmt: skip
                    total = tl.sum(d_y * value, 0)
                    sums += tl.where((kind == tap)[:, None], total[None, :], 0.0)
            w = tl.load(weight_base + offs_k * TAPS + TAPS - 1 - ahead, mask=offs_k < K, other=0.0)
            d_x += w.to(tl.float32)[None, :] * d_y
        inside = ((position >= 0) & (position < length))[:, None] & (offs_k < K)[None, :]
        at = position.to(tl.int64)[:, None] * grad_token + offs_k[None, :]
        tl.store(x_block + at, d_x.to(grad_x.dtype.element_ty), mask=inside)
        if HAS_TAIL:
            before = ((position < 0) & (position >= 1 - TAPS))[:, None] & (offs_k < K)[None, :]
            at = (position + TAPS - 1)[:, None] * C + offs_k[None, :]
            tail_block = grad_tail + row * ((TAPS - 1) * C) + head * K
            tl.store(tail_block + at, d_x.to(grad_tail.dtype.element_ty), mask=before)
    part = grad_weight + (block.to(tl.int64) * (TAPS + 1) + kind)[:, None] * C + head * K
    valid = (kind <= TAPS)[:, None] & (offs_k < K)[None, :]
    tl.store(part + offs_k[None, :], sums, mask=valid)


@triton.jit
def head_rows(T, B, gate_row, gate_token, rows, H: tl.constexpr, K: tl.constexpr):
    """Where head rows (b T + t) H + h begin: in v_hat [B, T, H, K], gate, out [T, B, H K]."""
    head, token = rows % H, rows // H
    t, b = token % T, token // T
    gate = b * gate_row + t * gate_token + head
    return rows * K, gate, (t * B + b) * (H * K) + head * K


@triton.jit(do_not_specialize=["T", "B", "N"])
def gate_norm_kernel(
    v_hat, norm, gate, out,
    T, B, N, gate_row, gate_token, eps,
    H: tl.constexpr, K: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Equation (12) before W_o for N head rows: out = sigmoid(gate) RMSNorm(v_hat)."""
    rows = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    offs_k = tl.arange(0, BK)
    row, at_gate, at_out = head_rows(T, B, gate_row, gate_token, rows, H, K)
    valid = (rows < N)[:, None] & (offs_k < K)[None, :]
    v = tl.load(v_hat + row[:, None] + offs_k[None, :], mask=valid, other=0.0).to(tl.float32)
    opened = tl.sigmoid(tl.load(gate + at_gate, mask=rows < N, other=0.0).to(tl.float32))
    scale = tl.load(norm + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(v * v, 1) / K + eps) * opened
    found = (v * factor[:, None] * scale[None, :]).to(out.dtype.element_ty)
    tl.store(out + at_out[:, None] + offs_k[None, :], found, mask=valid)


@triton.jit(do_not_specialize=["T", "B", "N"])
def gate_norm_gradient_kernel(
    v_hat, norm, gate, grad_out, grad_v, grad_gate, grad_norm,
    T, B, N, gate_row, gate_token, eps,
    H: tl.constexpr, K: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The gradients of `gate_norm_kernel`; grad_gate [B, T, H], grad_norm [programs, K]."""
    rows = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    offs_k = tl.arange(0, BK)
    row, at_gate, at_out = head_rows(T, B, gate_row, gate_token, rows, H, K)
    valid = (rows < N)[:, None] & (offs_k < K)[None, :]
    v = tl.load(v_hat + row[:, None] + offs_k[None, :], mask=valid, other=0.0).to(tl.float32)
    g = tl.load(grad_out + at_out[:, None] + offs_k[None, :], mask=valid, other=0.0)
    g = g.to(tl.float32)
    opened = tl.sigmoid(tl.load(gate + at_gate, mask=rows < N, other=0.0).to(tl.float32))
    scale = tl.load(norm + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
    rms = tl.rsqrt(tl.sum(v * v, 1) / K + eps)
    normed = v * rms[:, None]
    along = g * normed
    d_gate = opened * (1.0 - opened) * tl.sum(along * scale[None, :], 1)
    tl.store(grad_gate + rows, d_gate.to(grad_gate.dtype.element_ty), mask=rows < N)
    d_scale = tl.sum(along * opened[:, None], 0)
    tl.store(grad_norm + tl.program_id(0).to(tl.int64) * K + offs_k, d_scale, mask=offs_k < K)
    d_n = g * scale[None, :] * opened[:, None]
    d_v = rms[:, None] * (d_n - normed * (tl.sum(d_n * normed, 1) / K)[:, None])
    found = d_v.to(grad_v.dtype.element_ty)
    tl.store(grad_v + row[:, None] + offs_k[None, :], found, mask=valid)


@triton.jit(do_not_specialize=["N"])
def scale_gradient_kernel(
    x, alpha, grad_out, grad_x, grad_alpha,
    N,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """alpha ⊙ x backward, x [N, D]: grad_x = alpha ⊙ grad_out; grad_alpha [programs, D] of parts.

    A program walks over BT tokens of BD channels.
    """
    channels = tl.program_id(1) * BD + tl.arange(0, BD)
    here = channels < D
    factor = tl.load(alpha + channels, mask=here, other=0.0).to(tl.float32)
    tokens = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    at = tokens[:, None] * D + channels[None, :]
    valid = (tokens < N)[:, None] & here[None, :]
    g = tl.load(grad_out + at, mask=valid, other=0.0).to(tl.float32)
    value = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    tl.store(grad_x + at, (g * factor[None, :]).to(grad_x.dtype.element_ty), mask=valid)
    part = grad_alpha + tl.program_id(0).to(tl.int64) * D + channels
    tl.store(part, tl.sum(g * value, 0), mask=here)
