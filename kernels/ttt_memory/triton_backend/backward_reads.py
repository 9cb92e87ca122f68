"""Gradients of the reads, equation (8): part 1 of the memory's backward pass (`backward.py`)."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.ttt_memory.triton_backend.forward import load_tokens, load_weights, silu_parts


@triton.jit
def read_tokens_kernel(
    q, w, blocks, grad_out, grad_q,
    H: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of equation (8), w in q's dtype. blocks [P, 3]: slot, first token, number of tokens."""
    block, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(blocks + block * 3)
    first, count = tl.load(blocks + block * 3 + 1), tl.load(blocks + block * 3 + 2)
    offs_t, offs_k = tl.arange(0, BT), tl.arange(0, BK)
    q_TK = load_tokens(q, first, count, head, H, K, offs_t, offs_k)
    g_TK = load_tokens(grad_out, first, count, head, H, K, offs_t, offs_k)
    dtype = q.dtype.element_ty
    total = g_TK.to(tl.float32)
    for f in range(0, F, BF):
        offs_f = f + tl.arange(0, BF)
        gate, up, down = load_weights(w, slot, head, H, F, K, offs_f, offs_k)
        h_gate = tl.dot(q_TK, tl.trans(gate), input_precision=PRECISION)
        h_up = tl.dot(q_TK, tl.trans(up), input_precision=PRECISION)
        d_a = tl.dot(g_TK, tl.trans(down), input_precision=PRECISION)
        silu, slope = silu_parts(h_gate)
        total += tl.dot((d_a * h_up * slope).to(dtype), gate, input_precision=PRECISION)
        total += tl.dot((d_a * silu).to(dtype), up, input_precision=PRECISION)
    start = first * (H * K) + head * K
    at = offs_t[:, None] * (H * K) + offs_k[None, :]
    valid = (offs_t < count)[:, None] & (offs_k < K)[None, :]
    tl.store(grad_q + start + at, total.to(dtype), mask=valid)


@triton.jit
def read_weights_kernel(
    q, w, spans, span_range, grad_out, grad_w,
    H: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW of equation (8) for every state, w in q's dtype, in shares of the tokens.

    spans [Q, 3]: slot, first token, number of tokens; span_range [S + 1]: those of each slot.
    grad_w [shares, S, H, 3, F, K] is written.
    """
    slot, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    share, shares = tl.program_id(2), tl.num_programs(2)
    offs_t, offs_k = tl.arange(0, BT), tl.arange(0, BK)
    offs_f = tl.program_id(1) * BF + tl.arange(0, BF)
    dtype = q.dtype.element_ty
    gate, up, down = load_weights(w, slot, head, H, F, K, offs_f, offs_k)
    d_gate = tl.zeros((BK, BF), tl.float32)
    d_up = tl.zeros((BK, BF), tl.float32)
    d_down = tl.zeros((BK, BF), tl.float32)
    for span in range(tl.load(span_range + slot), tl.load(span_range + slot + 1)):
        first, number = tl.load(spans + span * 3 + 1), tl.load(spans + span * 3 + 2).to(tl.int32)
        size = tl.cdiv(tl.cdiv(number, BT), shares) * BT
        end = tl.minimum((share + 1) * size, number)
        for t in range(share * size, end, BT):
            q_TK = load_tokens(q, first + t, end - t, head, H, K, offs_t, offs_k)
            g_TK = load_tokens(grad_out, first + t, end - t, head, H, K, offs_t, offs_k)
            h_gate = tl.dot(q_TK, tl.trans(gate), input_precision=PRECISION)
            h_up = tl.dot(q_TK, tl.trans(up), input_precision=PRECISION)
            d_a = tl.dot(g_TK, tl.trans(down), input_precision=PRECISION)
            silu, slope = silu_parts(h_gate)
            d_h_gate = (d_a * h_up * slope).to(dtype)
            d_gate += tl.dot(tl.trans(q_TK), d_h_gate, input_precision=PRECISION)
            d_up += tl.dot(tl.trans(q_TK), (d_a * silu).to(dtype), input_precision=PRECISION)
            d_down += tl.dot(tl.trans(g_TK), (silu * h_up).to(dtype), input_precision=PRECISION)
    slots = tl.num_programs(0) // H
    out = grad_w + ((share * slots + slot) * H + head) * (3 * F * K)
    at = offs_f[None, :] * K + offs_k[:, None]
    valid = (offs_f < F)[None, :] & (offs_k < K)[:, None]
    tl.store(out + at, d_gate, mask=valid)
    tl.store(out + F * K + at, d_up, mask=valid)
    tl.store(out + 2 * F * K + at, d_down, mask=valid)
