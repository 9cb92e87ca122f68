"""Triton kernels of the memory's backward pass; letters and layout as in `forward.py`.

The states and the momenta before every chunk are known (kept, or made again). Three parts:

1. reads, all tokens at once (`backward_reads.py`): the queries' gradient, and the gradient of every
   state that was read;
2. writes, last chunk first: `steps_weights_kernel` and `normalise_gradient_kernel`, a pair a step;
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
def low_weights_kernel(
    w, scale, out, chunks,
    H: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    NORMALISED: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """W~ of equation (9) of every chunk in out's dtype, out [A, H, 3, F, K].

    Not NORMALISED: the states as they are, out [S, H, 3, F, K], `chunks` not read.
    """
    index, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    offs_f, offs_k = tl.program_id(1) * BF + tl.arange(0, BF), tl.arange(0, BK)
    if NORMALISED:
        slot = tl.load(chunks + index * 3)
        gate, up, down = load_normalised(w, scale, slot, head, H, F, K, offs_f, offs_k)
    else:
        gate, up, down = load_weights(w, index, head, H, F, K, offs_f, offs_k)
    store_weights(out, index, head, gate, up, down, H, F, K, offs_f, offs_k)


@triton.jit
def store_weights(
    out, index, head, gate, up, down,
    H: tl.constexpr, F: tl.constexpr, K: tl.constexpr, offs_f, offs_k,
):  # fmt: skip
    """The reverse of `load_weights`, in out's dtype."""
    matrix = out + (index * H + head) * (3 * F * K)
    at = offs_f[:, None] * K + offs_k[None, :]
    valid = (offs_f < F)[:, None] & (offs_k < K)[None, :]
    dtype = out.dtype.element_ty
    tl.store(matrix + at, gate.to(dtype), mask=valid)
    tl.store(matrix + F * K + at, up.to(dtype), mask=valid)
    tl.store(matrix + 2 * F * K + at, down.to(dtype), mask=valid)


@triton.jit(do_not_specialize=["begin"])
def momentum_gradient_kernel(
    m, mu, chunks, grad_w, grad_m, grad_steps, grad_mu,
    begin,
    H: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    WRITE: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`momentum_gradient` by itself, for steps that are clipped between it and what follows."""
    chunk, head = begin + tl.program_id(0) // H, tl.program_id(0) % H
    offs_f, offs_k = tl.program_id(1) * BF + tl.arange(0, BF), tl.arange(0, BK)
    momentum_gradient(
        m, mu, chunks, grad_w, grad_m, grad_steps, grad_mu, chunk, head, tl.program_id(1),
        tl.num_programs(1), H, F, K, WRITE, offs_f, offs_k,
    )  # fmt: skip


@triton.jit
def momentum_gradient(
    m, mu, chunks, grad_w, grad_m, grad_steps, grad_mu, chunk, head, part, parts,
    H: tl.constexpr, F: tl.constexpr, K: tl.constexpr, WRITE: tl.constexpr, offs_f, offs_k,
):  # fmt: skip
    """Equation (11) backward of some hidden units: dS = dM_out + dW_out, [BF, BK] thrice.

    WRITE: and dM_in += mu dS, grad_steps [A, H, 3, F, K] = dS, and this part of d mu = <dS, M_in>
    in grad_mu [A, H, parts].
    """
    slot_in, slot_out = tl.load(chunks + chunk * 3), tl.load(chunks + chunk * 3 + 1)
    gate, up, down = load_weights(grad_w, slot_out, head, H, F, K, offs_f, offs_k)
    m_gate, m_up, m_down = load_weights(grad_m, slot_out, head, H, F, K, offs_f, offs_k)
    gate, up, down = gate + m_gate, up + m_up, down + m_down
    if WRITE:
        m_gate, m_up, m_down = load_weights(m, slot_in, head, H, F, K, offs_f, offs_k)
        total = tl.sum(gate * m_gate + up * m_up + down * m_down)
        at = chunk * H + head
        tl.store(grad_mu + at * parts + part, total)
        factor = tl.load(mu + at)
        m_gate, m_up, m_down = load_weights(grad_m, slot_in, head, H, F, K, offs_f, offs_k)
        m_gate, m_up, m_down = m_gate + factor * gate, m_up + factor * up, m_down + factor * down
        store_weights(grad_m, slot_in, head, m_gate, m_up, m_down, H, F, K, offs_f, offs_k)
        index = chunk.to(tl.int64)
        store_weights(grad_steps, index, head, gate, up, down, H, F, K, offs_f, offs_k)
    return gate, up, down


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


@triton.jit(do_not_specialize=["begin", "C"])
def steps_weights_kernel(
    k, v, eta, base, m, mu, chunks, grad_w, grad_m, grad_steps, grad_mu, grad_base,
    begin, C, tokens_per_split,
    H: tl.constexpr, F: tl.constexpr, K: tl.constexpr, GIVEN: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW~ of equation (10), summed over a share of the chunk's tokens, after `momentum_gradient`.

    base [A, H, 3, F, K]: W~ in k's dtype. GIVEN: dS stands in grad_steps already. Written:
    grad_base [splits, chunks of the launch, H, 3, F, K], and what `momentum_gradient` writes.
    """
    chunk, head = begin + tl.program_id(0) // H, tl.program_id(0) % H
    split = tl.program_id(2)
    num_chunks = tl.num_programs(0) // H
    first = tl.load(chunks + chunk * 3 + 2)
    offs_t, offs_k = tl.arange(0, BT), tl.arange(0, BK)
    offs_f = tl.program_id(1) * BF + tl.arange(0, BF)
    dtype = k.dtype.element_ty
    index = chunk.to(tl.int64)
    if GIVEN:
        ds_gate, ds_up, ds_down = load_weights(grad_steps, index, head, H, F, K, offs_f, offs_k)
        ds_gate, ds_up, ds_down = ds_gate.to(dtype), ds_up.to(dtype), ds_down.to(dtype)
    else:
        ds_gate, ds_up, ds_down = momentum_gradient(
            m, mu, chunks, grad_w, grad_m, grad_steps, grad_mu, chunk, head, tl.program_id(1),
            tl.num_programs(1), H, F, K, False, offs_f, offs_k,
        )  # fmt: skip
        ds_gate, ds_up, ds_down = ds_gate.to(dtype), ds_up.to(dtype), ds_down.to(dtype)
        if split == 0:
            momentum_gradient(
                m, mu, chunks, grad_w, grad_m, grad_steps, grad_mu, chunk, head, tl.program_id(1),
                tl.num_programs(1), H, F, K, True, offs_f, offs_k,
            )  # fmt: skip
    gate, up, down = load_weights(base, index, head, H, F, K, offs_f, offs_k)
    d_gate = tl.zeros((BK, BF), tl.float32)
    d_up = tl.zeros((BK, BF), tl.float32)
    d_down = tl.zeros((BK, BF), tl.float32)
    start = split * tokens_per_split
    end = tl.minimum(start + tokens_per_split, C)
    for t in range(start, end, BT):
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
    out = grad_base + ((split * num_chunks + index - begin) * H + head) * (3 * F * K)
    at = offs_f[None, :] * K + offs_k[:, None]
    valid = (offs_f < F)[None, :] & (offs_k < K)[:, None]
    tl.store(out + at, d_gate, mask=valid)
    tl.store(out + F * K + at, d_up, mask=valid)
    tl.store(out + 2 * F * K + at, d_down, mask=valid)


@triton.jit(do_not_specialize=["begin", "splits"])
def normalise_gradient_kernel(
    w, scale, decay, chunks, grad_base, grad_w, grad_norms,
    begin, splits,
    H: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Equation (9) backward: adds to grad_w[slot_in], writes grad_norms [A, H, 2 F + K].

    dW~ = (1 - decay) dW_out + grad_base; with s = N / (n + eps) and r = <dW~, W> of a row,
    dW = s dW~ - r s / (n (n + eps)) W and dN = r / (n + eps).
    """
    chunk, head = tl.program_id(0) // H, tl.program_id(0) % H
    num_chunks = tl.num_programs(0) // H
    slot_in = tl.load(chunks + (begin + chunk) * 3)
    slot_out = tl.load(chunks + (begin + chunk) * 3 + 1)
    matrix, first = tile_of(tl.program_id(1), F, K, BR, BC)
    kept = 1.0 - tl.load(decay + head)
    size = F * K
    index = (begin + chunk).to(tl.int64)
    base_in = (slot_in * H + head) * (3 * size) + matrix * size
    base_out = (slot_out * H + head) * (3 * size) + matrix * size
    base_step = (chunk.to(tl.int64) * H + head) * (3 * size) + matrix * size
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


@triton.jit(do_not_specialize=["C"])
def steps_tokens_kernel(
    k, v, eta, mu_share, grad_mean, base, chunks, grad_steps, grad_k, grad_v, grad_eta, grad_mu,
    C,
    H: tl.constexpr, F: tl.constexpr, K: tl.constexpr, APART: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK, dV and d eta of equation (10), d mu of (5), for a block of tokens of any chunk.

    base and grad_steps [A, H, 3, F, K] in k's dtype; mu_share and grad_mean [A, H]. APART: dK and
    dV in two walks over the hidden units, where the registers of one cannot hold both.
    """
    chunk, head = tl.program_id(0), tl.program_id(2)
    begin = tl.program_id(1) * BT
    first, count = tl.load(chunks + chunk * 3 + 2) + begin, C - begin
    offs_t, offs_k = tl.arange(0, BT), tl.arange(0, BK)
    k_TK = load_tokens(k, first, count, head, H, K, offs_t, offs_k)
    v_TK = load_tokens(v, first, count, head, H, K, offs_t, offs_k)
    rates = load_rates(eta, first, count, head, H, offs_t)
    index = chunk.to(tl.int64)
    start = first * (H * K) + head * K
    at = offs_t[:, None] * (H * K) + offs_k[None, :]
    valid = (offs_t < count)[:, None] & (offs_k < K)[None, :]
    d_k, d_v, d_rates = token_gradients(
        k_TK, v_TK, rates, base, grad_steps, index, head, H, F, K, True, not APART, offs_k,
        BT, BF, BK, PRECISION,
    )  # fmt: skip
    tl.store(grad_k + start + at, d_k.to(k.dtype.element_ty), mask=valid)
    if APART:
        _, d_v, _ = token_gradients(
            k_TK, v_TK, rates, base, grad_steps, index, head, H, F, K, False, True, offs_k,
            BT, BF, BK, PRECISION,
        )  # fmt: skip
    tl.store(grad_v + start + at, d_v.to(k.dtype.element_ty), mask=valid)
    grad_rates = grad_eta + first * (H * 3) + head * 3 + offs_t * (H * 3)
    for matrix in tl.static_range(3):
        tl.store(grad_rates + matrix, d_rates[matrix], mask=offs_t < count)
    d_mean = tl.load(mu_share + chunk * H + head) * tl.load(grad_mean + chunk * H + head)
    real = (rates[0] != 0.0) | (rates[1] != 0.0) | (rates[2] != 0.0)
    tl.store(
        grad_mu + first * H + head + offs_t * H, tl.where(real, d_mean, 0.0), mask=offs_t < count
    )


@triton.jit
def token_gradients(
    k_TK, v_TK, rates, base, grad_steps, index, head,
    H: tl.constexpr, F: tl.constexpr, K: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    offs_k, BT: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A walk over the hidden units: dK and d eta of each matrix (KEYS), dV (VALUES)."""
    dtype = k_TK.dtype
    eta_gate, eta_up, eta_down = rates
    d_k = tl.zeros((BT, BK), tl.float32)
    d_v = tl.zeros((BT, BK), tl.float32)
    d_eta_gate = tl.zeros((BT,), tl.float32)
    d_eta_up = tl.zeros((BT,), tl.float32)
    d_eta_down = tl.zeros((BT,), tl.float32)
    for f in range(0, F, BF):
        offs_f = f + tl.arange(0, BF)
        gate, up, down = load_weights(base, index, head, H, F, K, offs_f, offs_k)
        ds_gate, ds_up, ds_down = load_weights(grad_steps, index, head, H, F, K, offs_f, offs_k)
        d_p, d_h_gate, d_h_up, b_gate, b_up, b_down, x_gate, x_up, x_down = through_steps(
            k_TK, v_TK, eta_gate, eta_up, eta_down, gate, up, down, ds_gate, ds_up, ds_down,
            PRECISION,
        )  # fmt: skip
        if KEYS:
            d_eta_gate += tl.sum(b_gate * x_gate, 1)
            d_eta_up += tl.sum(b_up * x_up, 1)
            d_eta_down += tl.sum(b_down * x_down, 1)
            d_k += tl.dot(d_h_gate.to(dtype), gate, input_precision=PRECISION)
            d_k += tl.dot(d_h_up.to(dtype), up, input_precision=PRECISION)
            rated = (b_gate * eta_gate[:, None]).to(dtype)
            d_k += tl.dot(rated, ds_gate, input_precision=PRECISION)
            rated = (b_up * eta_up[:, None]).to(dtype)
            d_k += tl.dot(rated, ds_up, input_precision=PRECISION)
        if VALUES:
            d_v += tl.dot(d_p.to(dtype), down, input_precision=PRECISION)
            rated = (b_down * eta_down[:, None]).to(dtype)
            d_v += tl.dot(rated, ds_down, input_precision=PRECISION)
    return d_k, d_v, (d_eta_gate, d_eta_up, d_eta_down)
