"""Triton kernels of the memory's backward pass; letters and layout as in `forward.py`.

The states and the momenta before every chunk are known (kept, or made again). Three parts:

1. reads, all tokens at once: the queries' gradient, and the gradient of every state that was read;
2. writes, last chunk first: `state_gradient_kernel` and `steps_weights_kernel`, one pair a chunk;
3. the keys', values' and rates' gradients, all tokens at once, from the dS of part 2.

Sums over tokens and over hidden units are each inside one program: no atomics, so two runs are
equal bit by bit. The algebra is in README.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.ttt_memory.triton_backend.forward import (
    NORM_EPS,
    load_normalised,
    load_rates,
    load_tokens,
    load_weights,
    silu_parts,
    tile_of,
)


@triton.jit
def silu_curve(h):
    """SiLU(h), SiLU'(h), SiLU''(h)."""
    sigmoid = 1.0 / (1.0 + tl.exp(-h))
    silu = h * sigmoid
    slope = sigmoid + silu * (1.0 - sigmoid)
    bend = sigmoid * (1.0 - sigmoid) * (2.0 + h * (1.0 - 2.0 * sigmoid))
    return silu, slope, bend


@triton.jit
def read_tokens_kernel(
    q, w, blocks, grad_out, grad_q,
    H: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of equation (8). blocks [P, 3]: slot, first token, number of tokens."""
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
        gate, up, down = gate.to(dtype), up.to(dtype), down.to(dtype)
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
    q, w, blocks, block_range, grad_out, grad_w,
    H: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW of equation (8) for every state. block_range [S + 1]: the blocks that read each slot."""
    slot, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    offs_t, offs_k = tl.arange(0, BT), tl.arange(0, BK)
    offs_f = tl.program_id(1) * BF + tl.arange(0, BF)
    dtype = q.dtype.element_ty
    gate, up, down = load_weights(w, slot, head, H, F, K, offs_f, offs_k)
    gate, up, down = gate.to(dtype), up.to(dtype), down.to(dtype)
    d_gate = tl.zeros((BK, BF), tl.float32)
    d_up = tl.zeros((BK, BF), tl.float32)
    d_down = tl.zeros((BK, BF), tl.float32)
    for block in range(tl.load(block_range + slot), tl.load(block_range + slot + 1)):
        first, count = tl.load(blocks + block * 3 + 1), tl.load(blocks + block * 3 + 2)
        q_TK = load_tokens(q, first, count, head, H, K, offs_t, offs_k)
        g_TK = load_tokens(grad_out, first, count, head, H, K, offs_t, offs_k)
        h_gate = tl.dot(q_TK, tl.trans(gate), input_precision=PRECISION)
        h_up = tl.dot(q_TK, tl.trans(up), input_precision=PRECISION)
        d_a = tl.dot(g_TK, tl.trans(down), input_precision=PRECISION)
        silu, slope = silu_parts(h_gate)
        d_h_gate = (d_a * h_up * slope).to(dtype)
        d_gate += tl.dot(tl.trans(q_TK), d_h_gate, input_precision=PRECISION)
        d_up += tl.dot(tl.trans(q_TK), (d_a * silu).to(dtype), input_precision=PRECISION)
        d_down += tl.dot(tl.trans(g_TK), (silu * h_up).to(dtype), input_precision=PRECISION)
    out = grad_w + (slot * H + head) * (3 * F * K)
    at = offs_f[None, :] * K + offs_k[:, None]
    valid = (offs_f < F)[None, :] & (offs_k < K)[:, None]
    tl.store(out + at, d_gate, mask=valid)
    tl.store(out + F * K + at, d_up, mask=valid)
    tl.store(out + 2 * F * K + at, d_down, mask=valid)


@triton.jit
def momentum_gradient_kernel(
    m, mu, chunks, grad_w, grad_m, grad_steps, grad_mu,
    H: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Equation (11) backward of a matrix: dS = dM_out + dW_out, dM_in = mu dS, d mu = <dS, M_in>.

    grad_steps [A, H, 3, F, K] and grad_mu [A, H, 3] are written; grad_m[slot_in] is added to.
    """
    chunk, head, matrix = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(1)
    slot_in, slot_out = tl.load(chunks + chunk * 3), tl.load(chunks + chunk * 3 + 1)
    base_in = ((slot_in * H + head) * 3 + matrix) * SIZE
    base_out = ((slot_out * H + head) * 3 + matrix) * SIZE
    base_step = ((chunk.to(tl.int64) * H + head) * 3 + matrix) * SIZE
    mu_chunk = tl.load(mu + chunk * H + head)
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, SIZE, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        valid = at < SIZE
        grad = tl.load(grad_w + base_out + at, mask=valid, other=0.0)
        grad += tl.load(grad_m + base_out + at, mask=valid, other=0.0)
        total += grad * tl.load(m + base_in + at, mask=valid, other=0.0)
        before = tl.load(grad_m + base_in + at, mask=valid, other=0.0)
        tl.store(grad_m + base_in + at, before + mu_chunk * grad, mask=valid)
        tl.store(grad_steps + base_step + at, grad, mask=valid)
    tl.store(grad_mu + (chunk * H + head) * 3 + matrix, tl.sum(total, 0))


@triton.jit
def through_steps(
    k_TK, v_TK, eta_gate, eta_up, eta_down, gate, up, down, ds_gate, ds_up, ds_down,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Equation (10) backward, up to the hidden units.

    Returns: dP, dH_g, dH_u; what the steps took from each token without its rate (p h_u slope,
    p SiLU, SiLU h_u); and what each rate multiplies (x_gate, x_up, x_down), all [BT, BF].
    """
    h_gate = tl.dot(k_TK, tl.trans(gate), input_precision=PRECISION)
    h_up = tl.dot(k_TK, tl.trans(up), input_precision=PRECISION)
    p = tl.dot(v_TK, tl.trans(down), input_precision=PRECISION)
    x_gate = tl.dot(k_TK, tl.trans(ds_gate), input_precision=PRECISION)
    x_up = tl.dot(k_TK, tl.trans(ds_up), input_precision=PRECISION)
    x_down = tl.dot(v_TK, tl.trans(ds_down), input_precision=PRECISION)
    silu, slope, bend = silu_curve(h_gate)
    y_gate = eta_gate[:, None] * x_gate
    y_up = eta_up[:, None] * x_up
    y_down = eta_down[:, None] * x_down
    d_p = y_gate * h_up * slope + y_up * silu
    d_h_up = y_gate * p * slope + y_down * silu
    d_h_gate = y_gate * p * h_up * bend + (y_up * p + y_down * h_up) * slope
    return d_p, d_h_gate, d_h_up, p * h_up * slope, p * silu, silu * h_up, x_gate, x_up, x_down


@triton.jit
def steps_weights_kernel(
    k, v, eta, w, scale, chunks, grad_steps, grad_base,
    C, tokens_per_split,
    H: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW~ of equation (10), summed over a share of the chunk's tokens.

    grad_steps [A, H, 3, F, K]; grad_base [splits, A, H, 3, F, K] is written.
    """
    chunk, head = tl.program_id(0) // H, tl.program_id(0) % H
    split = tl.program_id(2)
    num_chunks = tl.num_programs(0) // H
    slot = tl.load(chunks + chunk * 3)
    first = tl.load(chunks + chunk * 3 + 2)
    offs_t, offs_k = tl.arange(0, BT), tl.arange(0, BK)
    offs_f = tl.program_id(1) * BF + tl.arange(0, BF)
    dtype = k.dtype.element_ty
    gate, up, down = load_normalised(w, scale, slot, head, H, F, K, offs_f, offs_k)
    gate, up, down = gate.to(dtype), up.to(dtype), down.to(dtype)
    index = chunk.to(tl.int64)
    ds_gate, ds_up, ds_down = load_weights(grad_steps, index, head, H, F, K, offs_f, offs_k)
    ds_gate, ds_up, ds_down = ds_gate.to(dtype), ds_up.to(dtype), ds_down.to(dtype)
    d_gate = tl.zeros((BK, BF), tl.float32)
    d_up = tl.zeros((BK, BF), tl.float32)
    d_down = tl.zeros((BK, BF), tl.float32)
    begin = split * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, C)
    for t in range(begin, end, BT):
        k_TK = load_tokens(k, first + t, end - t, head, H, K, offs_t, offs_k)
        v_TK = load_tokens(v, first + t, end - t, head, H, K, offs_t, offs_k)
        eta_gate, eta_up, eta_down = load_rates(eta, first + t, end - t, head, H, offs_t)
        d_p, d_h_gate, d_h_up, _, _, _, _, _, _ = through_steps(
            k_TK, v_TK, eta_gate, eta_up, eta_down, gate, up, down, ds_gate, ds_up, ds_down,
            PRECISION,
        )  # fmt: skip
        d_gate += tl.dot(tl.trans(k_TK), d_h_gate.to(dtype), input_precision=PRECISION)
        d_up += tl.dot(tl.trans(k_TK), d_h_up.to(dtype), input_precision=PRECISION)
        d_down += tl.dot(tl.trans(v_TK), d_p.to(dtype), input_precision=PRECISION)
    out = grad_base + ((split * num_chunks + index) * H + head) * (3 * F * K)
    at = offs_f[None, :] * K + offs_k[:, None]
    valid = (offs_f < F)[None, :] & (offs_k < K)[:, None]
    tl.store(out + at, d_gate, mask=valid)
    tl.store(out + F * K + at, d_up, mask=valid)
    tl.store(out + 2 * F * K + at, d_down, mask=valid)


@triton.jit
def normalise_gradient_kernel(
    w, scale, norms, decay, chunks, grad_base, grad_w, grad_norms,
    splits,
    H: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Equation (9) backward: adds to grad_w[slot_in], writes grad_norms [A, H, 2 F + K].

    dW~ = (1 - decay) dW_out + grad_base; with s = N / (n + eps) and r = <dW~, W> of a row,
    dW = s dW~ - r s / (n (n + eps)) W and dN = r / (n + eps).
    """
    chunk, head = tl.program_id(0) // H, tl.program_id(0) % H
    num_chunks = tl.num_programs(0) // H
    slot_in, slot_out = tl.load(chunks + chunk * 3), tl.load(chunks + chunk * 3 + 1)
    matrix, first = tile_of(tl.program_id(1), F, K, BR, BC)
    kept = 1.0 - tl.load(decay + head)
    size = F * K
    index = chunk.to(tl.int64)
    base_in = (slot_in * H + head) * (3 * size) + matrix * size
    base_out = (slot_out * H + head) * (3 * size) + matrix * size
    base_step = (index * H + head) * (3 * size) + matrix * size
    split_stride = num_chunks.to(tl.int64) * H * (3 * size)
    scale_in = scale + (slot_in * H + head) * (2 * F + K) + matrix * F
    norm_out = grad_norms + (index * H + head) * (2 * F + K) + matrix * F
    if matrix < 2:
        rows, columns = first + tl.arange(0, BR), tl.arange(0, BK)
        at = rows[:, None] * K + columns[None, :]
        valid = (rows < F)[:, None] & (columns < K)[None, :]
        grad = kept * tl.load(grad_w + base_out + at, mask=valid, other=0.0)
        for split in range(splits):
            part = grad_base + split * split_stride + base_step
            grad += tl.load(part + at, mask=valid, other=0.0)
        weight = tl.load(w + base_in + at, mask=valid, other=0.0)
        s = tl.load(scale_in + rows, mask=rows < F, other=0.0)
        length = tl.sqrt(tl.sum(weight * weight, 1))
        r = tl.sum(grad * weight, 1)
        slope = tl.where(length > 0, r * s / (length * (length + NORM_EPS) + 1e-37), 0.0)
        before = tl.load(grad_w + base_in + at, mask=valid, other=0.0)
        total = before + s[:, None] * grad - slope[:, None] * weight
        tl.store(grad_w + base_in + at, total, mask=valid)
        tl.store(norm_out + rows, r / (length + NORM_EPS), mask=rows < F)
    else:
        columns_c = first + tl.arange(0, BC)
        s_c = tl.load(scale_in + columns_c, mask=columns_c < K, other=0.0)
        squares = tl.zeros((BC,), tl.float32)
        r_c = tl.zeros((BC,), tl.float32)
        for f in range(0, F, BF):
            rows_c = f + tl.arange(0, BF)
            at_c = rows_c[:, None] * K + columns_c[None, :]
            valid_c = (rows_c < F)[:, None] & (columns_c < K)[None, :]
            grad_c = kept * tl.load(grad_w + base_out + at_c, mask=valid_c, other=0.0)
            for split in range(splits):
                part = grad_base + split * split_stride + base_step
                grad_c += tl.load(part + at_c, mask=valid_c, other=0.0)
            weight_c = tl.load(w + base_in + at_c, mask=valid_c, other=0.0)
            squares += tl.sum(weight_c * weight_c, 0)
            r_c += tl.sum(grad_c * weight_c, 0)
            # for the second walk, in place of the first share of the sum
            tl.store(grad_base + base_step + at_c, grad_c, mask=valid_c)
        length_c = tl.sqrt(squares)
        slope_c = tl.where(
            length_c > 0, r_c * s_c / (length_c * (length_c + NORM_EPS) + 1e-37), 0.0
        )
        tl.store(norm_out + columns_c, r_c / (length_c + NORM_EPS), mask=columns_c < K)
        tl.debug_barrier()
        for f in range(0, F, BF):
            rows_c = f + tl.arange(0, BF)
            at_c = rows_c[:, None] * K + columns_c[None, :]
            valid_c = (rows_c < F)[:, None] & (columns_c < K)[None, :]
            grad_c = tl.load(grad_base + base_step + at_c, mask=valid_c, other=0.0)
            weight_c = tl.load(w + base_in + at_c, mask=valid_c, other=0.0)
            before_c = tl.load(grad_w + base_in + at_c, mask=valid_c, other=0.0)
            total_c = before_c + s_c[None, :] * grad_c - slope_c[None, :] * weight_c
            tl.store(grad_w + base_in + at_c, total_c, mask=valid_c)


@triton.jit
def steps_tokens_kernel(
    k, v, eta, w, scale, chunks, grad_steps, grad_k, grad_v, grad_eta,
    C,
    H: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK, dV and d eta of equation (10) for a block of tokens of any chunk."""
    chunk, head = tl.program_id(0), tl.program_id(2)
    slot = tl.load(chunks + chunk * 3)
    begin = tl.program_id(1) * BT
    first, count = tl.load(chunks + chunk * 3 + 2) + begin, C - begin
    offs_t, offs_k = tl.arange(0, BT), tl.arange(0, BK)
    dtype = k.dtype.element_ty
    k_TK = load_tokens(k, first, count, head, H, K, offs_t, offs_k)
    v_TK = load_tokens(v, first, count, head, H, K, offs_t, offs_k)
    eta_gate, eta_up, eta_down = load_rates(eta, first, count, head, H, offs_t)
    d_k = tl.zeros((BT, BK), tl.float32)
    d_v = tl.zeros((BT, BK), tl.float32)
    d_eta_gate = tl.zeros((BT,), tl.float32)
    d_eta_up = tl.zeros((BT,), tl.float32)
    d_eta_down = tl.zeros((BT,), tl.float32)
    index = chunk.to(tl.int64)
    for f in range(0, F, BF):
        offs_f = f + tl.arange(0, BF)
        gate, up, down = load_normalised(w, scale, slot, head, H, F, K, offs_f, offs_k)
        gate, up, down = gate.to(dtype), up.to(dtype), down.to(dtype)
        ds_gate, ds_up, ds_down = load_weights(grad_steps, index, head, H, F, K, offs_f, offs_k)
        ds_gate, ds_up, ds_down = ds_gate.to(dtype), ds_up.to(dtype), ds_down.to(dtype)
        d_p, d_h_gate, d_h_up, b_gate, b_up, b_down, x_gate, x_up, x_down = through_steps(
            k_TK, v_TK, eta_gate, eta_up, eta_down, gate, up, down, ds_gate, ds_up, ds_down,
            PRECISION,
        )  # fmt: skip
        d_eta_gate += tl.sum(b_gate * x_gate, 1)
        d_eta_up += tl.sum(b_up * x_up, 1)
        d_eta_down += tl.sum(b_down * x_down, 1)
        d_k += tl.dot(d_h_gate.to(dtype), gate, input_precision=PRECISION)
        d_k += tl.dot(d_h_up.to(dtype), up, input_precision=PRECISION)
        rated = (b_gate * eta_gate[:, None]).to(dtype)
        d_k += tl.dot(rated, ds_gate, input_precision=PRECISION)
        rated = (b_up * eta_up[:, None]).to(dtype)
        d_k += tl.dot(rated, ds_up, input_precision=PRECISION)
        d_v += tl.dot(d_p.to(dtype), down, input_precision=PRECISION)
        rated = (b_down * eta_down[:, None]).to(dtype)
        d_v += tl.dot(rated, ds_down, input_precision=PRECISION)
    start = first * (H * K) + head * K
    at = offs_t[:, None] * (H * K) + offs_k[None, :]
    valid = (offs_t < count)[:, None] & (offs_k < K)[None, :]
    tl.store(grad_k + start + at, d_k.to(dtype), mask=valid)
    tl.store(grad_v + start + at, d_v.to(dtype), mask=valid)
    rates = grad_eta + first * (H * 3) + head * 3
    rate = offs_t * (H * 3)
    tl.store(rates + rate, d_eta_gate, mask=offs_t < count)
    tl.store(rates + rate + 1, d_eta_up, mask=offs_t < count)
    tl.store(rates + rate + 2, d_eta_down, mask=offs_t < count)
