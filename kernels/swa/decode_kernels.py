"""Triton kernels of one query a row over the window's ring and the sinks; `kernels.swa.decode`.

Shape letters: R rows, N key-value heads, G query heads of each, K head width, S splits of the
slots. Position p lies in slot p while p < s + W, later ones go round the W slots behind the s
sinks: a row's filled slots are what its token sees.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def rotated(x, bias, norm, cos, sin, offs_k, eps, heads_at, K: tl.constexpr, NORM: tl.constexpr):
    """Heads [*, BK] of q or k in float32: bias, RMSNorm, RoPE (first half against second half).

    x, bias: from the first head on; heads_at: offsets [*, 1] of the heads; cos, sin [K].
    """
    here = offs_k < K
    other = tl.where(offs_k < K // 2, offs_k + K // 2, offs_k - K // 2)
    at, at_other = heads_at + offs_k[None, :], heads_at + other[None, :]
    a = tl.load(x + at, mask=here[None, :], other=0.0).to(tl.float32)
    b = tl.load(x + at_other, mask=here[None, :], other=0.0).to(tl.float32)
    a += tl.load(bias + at, mask=here[None, :], other=0.0).to(tl.float32)
    b += tl.load(bias + at_other, mask=here[None, :], other=0.0).to(tl.float32)
    if NORM:
        factor = tl.rsqrt(tl.sum(a * a, 1) / K + eps)[:, None]
        a *= factor * tl.load(norm + offs_k, mask=here, other=0.0).to(tl.float32)[None, :]
        b *= factor * tl.load(norm + other, mask=here, other=0.0).to(tl.float32)[None, :]
    c = tl.load(cos + offs_k, mask=here, other=0.0).to(tl.float32)
    s = tl.load(sin + offs_k, mask=here, other=0.0).to(tl.float32)
    s = tl.where(offs_k < K // 2, -s, s)
    return a * c[None, :] + b * s[None, :]


@triton.jit(do_not_specialize=["window", "sinks", "slots", "share"])
def window_step_kernel(
    x, bias, q_norm, k_norm, cos, sin, past, keys, values, parts, extremes,
    x_row, window, sinks, slots, share, scale, q_eps, k_eps,
    N: tl.constexpr, G: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr,
    BG: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of a group of query heads to a share of the slots, the new token's own included.

    x [R, x_row] holds q [N, G, K], k [N, K], v [N, K] without bias [x_row]. keys, values
    [R, slots, N, K]: the first split writes the new token's and attends to it; all others leave
    that slot out, so that no program waits for another one. cos, sin [R, K].
    parts [S, R, N, G, K] float32: sums of exp2(score - largest) v; extremes [S, 2, R, N, G]: the
    largest score (in powers of two) and the sum of exp2(score - largest).
    """
    pid, split = tl.program_id(0), tl.program_id(1)
    row, head = (pid // N).to(tl.int64), pid % N
    offs_k, offs_g = tl.arange(0, BK), tl.arange(0, BG)
    here = offs_k < K
    at_x, at_angle = x + row * x_row, row * K
    group = tl.where(offs_g < G, head * G + offs_g, head * G)
    q = rotated(
        at_x, bias, q_norm, cos + at_angle, sin + at_angle, offs_k, q_eps,
        group[:, None] * K, K, NORM,
    )  # fmt: skip
    low = keys.dtype.element_ty
    q = q.to(low)
    position = tl.load(past + row)
    slot = tl.where(position < sinks, position, sinks + (position - sinks) % window)
    count = tl.minimum(position + 1, sinks + window).to(tl.int32)

    largest = tl.full((BG,), float("-inf"), tl.float32)
    total = tl.zeros((BG,), tl.float32)
    sums = tl.zeros((BG, BK), tl.float32)
    to_head = row * slots * (N * K) + head * K
    if split == 0:
        at_k = N * G * K + head * K
        one = tl.zeros((1, 1), tl.int32)
        k_new = rotated(
            at_x + at_k, bias + at_k, k_norm, cos + at_angle, sin + at_angle, offs_k, k_eps,
            one, K, NORM,
        ).to(low)  # fmt: skip
        at_v = at_k + N * K + offs_k
        v_new = tl.load(at_x + at_v, mask=here, other=0.0).to(tl.float32)
        v_new = (v_new + tl.load(bias + at_v, mask=here, other=0.0).to(tl.float32)).to(low)
        k_row = tl.sum(k_new.to(tl.float32), 0)  # [1, BK] -> [BK]
        own = to_head + slot * (N * K) + offs_k
        tl.store(keys + own, k_row.to(low), mask=here)
        tl.store(values + own, v_new, mask=here)
        largest = tl.sum(q.to(tl.float32) * k_row[None, :], 1) * (scale * LOG2_E)
        total += 1.0
        sums += v_new.to(tl.float32)[None, :]
    first = split * share
    for start in range(first, tl.minimum(first + share, count), BN):
        at = start + tl.arange(0, BN)
        seen = (at < count) & (at != slot)
        where = to_head + at.to(tl.int64)[:, None] * (N * K) + offs_k[None, :]
        wanted = seen[:, None] & here[None, :]
        k = tl.load(keys + where, mask=wanted, other=0.0)
        v = tl.load(values + where, mask=wanted, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet
        shrink = tl.exp2(largest - safe)
        p = tl.exp2(scores - safe[:, None])
        total = total * shrink + tl.sum(p, 1)
        sums = sums * shrink[:, None] + tl.dot(p.to(low), v, input_precision=PRECISION)
        largest = new
    kept = offs_g < G
    rows = tl.num_programs(0).to(tl.int64) * G
    at_heads = pid.to(tl.int64) * G + offs_g
    at_parts = (split * rows + at_heads)[:, None] * K + offs_k[None, :]
    tl.store(parts + at_parts, sums, mask=kept[:, None] & here[None, :])
    tl.store(extremes + split * 2 * rows + at_heads, largest, mask=kept)
    tl.store(extremes + (split * 2 + 1) * rows + at_heads, total, mask=kept)


@triton.jit(do_not_specialize=["S"])
def join_splits_kernel(
    parts, extremes, out, S, K: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr
):
    """out [R N G, K] from what `window_step_kernel` left; a program has one query head."""
    pid, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    split, offs_k = tl.arange(0, BS), tl.arange(0, BK)
    at = split * 2 * rows + pid
    largest = tl.load(extremes + at, mask=split < S, other=float("-inf"))
    total = tl.load(extremes + at + rows, mask=split < S, other=0.0)
    weight = tl.exp2(largest - tl.max(largest, 0))
    here = (split < S)[:, None] & (offs_k < K)[None, :]
    where = (split * rows + pid)[:, None] * K + offs_k[None, :]
    sums = tl.load(parts + where, mask=here, other=0.0)
    found = tl.sum(sums * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + pid * K + offs_k, found.to(out.dtype.element_ty), mask=offs_k < K)
