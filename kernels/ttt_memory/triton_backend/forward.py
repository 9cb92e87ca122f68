"""Triton kernels of the memory's forward pass: equations (8) to (11) of arXiv 2602.13680.

Shape letters: N tokens of the stream, C chunk length, H memory heads, K head width, F hidden width,
S slots (states of the memory: before the first and after each complete chunk of every row).

Layout. A state is one float32 tensor [S, H, 3, F, K]: gate, up, and down transposed, so that all
three products with tokens have one form, X [tokens, K] times W^T [K, F]. `scale` [S, H, 2 F + K]
holds what equation (9) multiplies W with: one number for each row of gate and up, one for each
*column* of the transposed down. Where tokens meet weights in a loop, the weights are a copy in the
tokens' dtype: half the bytes, and no registers to convert them in.

A write is separable over hidden units: H_g, H_u, P and the three steps of equation (10) of some
hidden units need those rows of the matrices only. So a program owns a block of hidden units of one
head and chunk, and walks over (part of) the chunk's tokens; programs never wait for each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

NORM_EPS = tl.constexpr(1e-5)  # of equation (9)


@triton.jit
def silu_parts(h):
    """SiLU(h), SiLU'(h)."""
    sigmoid = 1.0 / (1.0 + tl.exp(-h))
    silu = h * sigmoid
    return silu, sigmoid + silu * (1.0 - sigmoid)


@triton.jit
def load_tokens(base, first, count, head, H: tl.constexpr, K: tl.constexpr, offs_t, offs_k):
    """[BT, BK] of x [N, H, K]: tokens `first + offs_t`, zero from `count` on."""
    block = base + first * (H * K) + head * K
    at = offs_t[:, None] * (H * K) + offs_k[None, :]
    return tl.load(block + at, mask=(offs_t < count)[:, None] & (offs_k < K)[None, :], other=0.0)


@triton.jit
def load_rates(eta, first, count, head, H: tl.constexpr, offs_t):
    """eta of gate, up and down, [BT] each, zero from `count` on."""
    block = eta + first * (H * 3) + head * 3
    at = offs_t * (H * 3)
    valid = offs_t < count
    gate = tl.load(block + at, mask=valid, other=0.0)
    up = tl.load(block + at + 1, mask=valid, other=0.0)
    down = tl.load(block + at + 2, mask=valid, other=0.0)
    return gate, up, down


@triton.jit
def load_weights(w, slot, head, H: tl.constexpr, F: tl.constexpr, K: tl.constexpr, offs_f, offs_k):
    """Gate, up and transposed down of a state, [BF, BK] each."""
    matrix = w + (slot * H + head) * (3 * F * K)
    at = offs_f[:, None] * K + offs_k[None, :]
    valid = (offs_f < F)[:, None] & (offs_k < K)[None, :]
    gate = tl.load(matrix + at, mask=valid, other=0.0)
    up = tl.load(matrix + F * K + at, mask=valid, other=0.0)
    down = tl.load(matrix + 2 * F * K + at, mask=valid, other=0.0)
    return gate, up, down


@triton.jit
def load_scales(
    scale, slot, head, H: tl.constexpr, F: tl.constexpr, K: tl.constexpr, offs_f, offs_k
):
    """Factors of equation (9): [BF] of gate, [BF] of up, [BK] of down."""
    row = scale + (slot * H + head) * (2 * F + K)
    gate = tl.load(row + offs_f, mask=offs_f < F, other=0.0)
    up = tl.load(row + F + offs_f, mask=offs_f < F, other=0.0)
    down = tl.load(row + 2 * F + offs_k, mask=offs_k < K, other=0.0)
    return gate, up, down


@triton.jit
def load_normalised(
    w, scale, slot, head, H: tl.constexpr, F: tl.constexpr, K: tl.constexpr, offs_f, offs_k
):
    """W~ of equation (9), [BF, BK] each."""
    gate, up, down = load_weights(w, slot, head, H, F, K, offs_f, offs_k)
    s_gate, s_up, s_down = load_scales(scale, slot, head, H, F, K, offs_f, offs_k)
    return gate * s_gate[:, None], up * s_up[:, None], down * s_down[None, :]


@triton.jit(do_not_specialize=["C"])
def mean_mu_kernel(
    mu, eta, chunks, mean, share,
    C,
    H: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Equation (5): the mean of mu [N, H] over a chunk's tokens that are no padding.

    chunks [A, 3]. Written: mean and share [A, H], the share being 1 / their number (0 of none).
    """
    chunk = tl.program_id(0)
    first = tl.load(chunks + chunk * 3 + 2)
    offs_t, offs_h = tl.arange(0, BT), tl.arange(0, BH)
    total = tl.zeros((BH,), tl.float32)
    number = tl.zeros((BH,), tl.float32)
    for t in range(0, C, BT):
        at = (offs_t + t)[:, None] * H + offs_h[None, :]
        valid = (offs_t + t < C)[:, None] & (offs_h < H)[None, :]
        real = real_tokens(eta + first * (H * 3), at, valid)
        coefficient = tl.load(mu + first * H + at, mask=valid, other=0.0)
        total += tl.sum(tl.where(real, coefficient, 0.0), 0)
        number += tl.sum(real.to(tl.float32), 0)
    one = tl.where(number > 0, 1.0 / tl.maximum(number, 1.0), 0.0)
    tl.store(mean + chunk * H + offs_h, total * one, mask=offs_h < H)
    tl.store(share + chunk * H + offs_h, one, mask=offs_h < H)


@triton.jit
def real_tokens(eta, at, valid):
    """Which entries [.., H] of eta [.., H, 3] have a rate that is not 0."""
    gate = tl.load(eta + at * 3, mask=valid, other=0.0)
    up = tl.load(eta + at * 3 + 1, mask=valid, other=0.0)
    down = tl.load(eta + at * 3 + 2, mask=valid, other=0.0)
    return (gate != 0.0) | (up != 0.0) | (down != 0.0)


@triton.jit(do_not_specialize=["begin", "C"])
def steps_kernel(
    k, v, eta, w, scale, chunks, steps,
    begin, C, tokens_per_split,
    H: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S of equation (10) for some hidden units, summed over a share of the chunk's tokens.

    chunks [A, 3]: slot before, slot after, first token; a launch has those from `begin` on.
    steps [splits, chunks of the launch, H, 3, F, K].
    """
    chunk, head = tl.program_id(0) // H, tl.program_id(0) % H
    split = tl.program_id(2)
    slot = tl.load(chunks + (begin + chunk) * 3)
    first = tl.load(chunks + (begin + chunk) * 3 + 2)
    offs_t, offs_k = tl.arange(0, BT), tl.arange(0, BK)
    offs_f = tl.program_id(1) * BF + tl.arange(0, BF)
    gate, up, down = load_normalised(w, scale, slot, head, H, F, K, offs_f, offs_k)
    dtype = k.dtype.element_ty
    gate, up, down = gate.to(dtype), up.to(dtype), down.to(dtype)
    # [K, F] rather than [F, K]: the tensor cores want the long side first
    s_gate = tl.zeros((BK, BF), tl.float32)
    s_up = tl.zeros((BK, BF), tl.float32)
    s_down = tl.zeros((BK, BF), tl.float32)
    start = split * tokens_per_split
    end = tl.minimum(start + tokens_per_split, C)
    for t in range(start, end, BT):
        k_TK = load_tokens(k, first + t, end - t, head, H, K, offs_t, offs_k)
        v_TK = load_tokens(v, first + t, end - t, head, H, K, offs_t, offs_k)
        eta_gate, eta_up, eta_down = load_rates(eta, first + t, end - t, head, H, offs_t)
        h_gate = tl.dot(k_TK, tl.trans(gate), input_precision=PRECISION)
        h_up = tl.dot(k_TK, tl.trans(up), input_precision=PRECISION)
        p = tl.dot(v_TK, tl.trans(down), input_precision=PRECISION)
        silu, slope = silu_parts(h_gate)
        x_gate = (p * h_up * slope * eta_gate[:, None]).to(dtype)
        x_up = (p * silu * eta_up[:, None]).to(dtype)
        x_down = (silu * h_up * eta_down[:, None]).to(dtype)
        s_gate += tl.dot(tl.trans(k_TK), x_gate, input_precision=PRECISION)
        s_up += tl.dot(tl.trans(k_TK), x_up, input_precision=PRECISION)
        s_down += tl.dot(tl.trans(v_TK), x_down, input_precision=PRECISION)
    num_chunks = tl.num_programs(0) // H
    out = steps + ((split * num_chunks + chunk).to(tl.int64) * H + head) * (3 * F * K)
    at = offs_f[None, :] * K + offs_k[:, None]
    valid = (offs_f < F)[None, :] & (offs_k < K)[:, None]
    tl.store(out + at, s_gate, mask=valid)
    tl.store(out + F * K + at, s_up, mask=valid)
    tl.store(out + 2 * F * K + at, s_down, mask=valid)


@triton.jit
def tile_of(
    tile, F: tl.constexpr, K: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Which matrix and which norms a program of the elementwise kernels has.

    Programs 0 … 2 ceil(F / BR) - 1 have BR rows of gate or up, the others BC columns of down: what
    they own are whole rows, or columns, that equation (9) takes the norm of.

    Returns: the matrix (0, 1, 2), the first row or column, the index of its scale.
    """
    row_tiles = tl.cdiv(F, BR)
    matrix = tl.minimum(tile // row_tiles, 2)
    first = tl.where(matrix < 2, (tile - matrix * row_tiles) * BR, (tile - 2 * row_tiles) * BC)
    return matrix, first


@triton.jit(do_not_specialize=["begin", "splits"])
def update_kernel(
    w, m, scale, norms, mu, decay, clip_scale, chunks, steps,
    begin, splits,
    H: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    CLIP: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Equation (11): M_out = mu M_in + S, W_out = (1 - decay) W~ + M_out, and W_out's scales.

    norms [H, 2 F + K]: of the initial weights. mu [A, H], decay [H]; clip_scale [.., H, 3] and
    steps [splits, .., H, 3, F, K] of the launch's chunks, those from `begin` on.
    """
    chunk, head = tl.program_id(0) // H, tl.program_id(0) % H
    num_chunks = tl.num_programs(0) // H
    slot_in = tl.load(chunks + (begin + chunk) * 3)
    slot_out = tl.load(chunks + (begin + chunk) * 3 + 1)
    matrix, first = tile_of(tl.program_id(1), F, K, BR, BC)
    mu_chunk = tl.load(mu + (begin + chunk) * H + head)
    kept = 1.0 - tl.load(decay + head)
    if CLIP:  # noqa: SIM108
        factor = tl.load(clip_scale + (chunk * H + head) * 3 + matrix)
    else:
        factor = 1.0
    size = F * K
    base_in = (slot_in * H + head) * (3 * size) + matrix * size
    base_out = (slot_out * H + head) * (3 * size) + matrix * size
    base_step = (chunk.to(tl.int64) * H + head) * (3 * size) + matrix * size
    split_stride = num_chunks.to(tl.int64) * H * (3 * size)
    scale_in = scale + (slot_in * H + head) * (2 * F + K) + matrix * F
    scale_out = scale + (slot_out * H + head) * (2 * F + K) + matrix * F
    norm = norms + head * (2 * F + K) + matrix * F
    if matrix < 2:
        rows, columns = first + tl.arange(0, BR), tl.arange(0, BK)
        at = rows[:, None] * K + columns[None, :]
        valid = (rows < F)[:, None] & (columns < K)[None, :]
        step = tl.zeros((BR, BK), tl.float32)
        for split in range(splits):
            step += tl.load(steps + split * split_stride + base_step + at, mask=valid, other=0.0)
        base = tl.load(w + base_in + at, mask=valid, other=0.0)
        base = base * tl.load(scale_in + rows, mask=rows < F, other=0.0)[:, None]
        momentum = mu_chunk * tl.load(m + base_in + at, mask=valid, other=0.0) + factor * step
        new = kept * base + momentum
        tl.store(m + base_out + at, momentum, mask=valid)
        tl.store(w + base_out + at, new, mask=valid)
        length = tl.sqrt(tl.sum(new * new, 1))
        wanted = tl.load(norm + rows, mask=rows < F, other=0.0)
        tl.store(scale_out + rows, wanted / (length + NORM_EPS), mask=rows < F)
    else:
        columns_c = first + tl.arange(0, BC)
        column_scale = tl.load(scale_in + columns_c, mask=columns_c < K, other=0.0)
        squares = tl.zeros((BC,), tl.float32)
        for f in range(0, F, BF):
            rows_c = f + tl.arange(0, BF)
            at_c = rows_c[:, None] * K + columns_c[None, :]
            valid_c = (rows_c < F)[:, None] & (columns_c < K)[None, :]
            step_c = tl.zeros((BF, BC), tl.float32)
            for split in range(splits):
                part = steps + split * split_stride + base_step
                step_c += tl.load(part + at_c, mask=valid_c, other=0.0)
            base_c = tl.load(w + base_in + at_c, mask=valid_c, other=0.0) * column_scale[None, :]
            momentum_c = (
                mu_chunk * tl.load(m + base_in + at_c, mask=valid_c, other=0.0) + factor * step_c
            )
            new_c = kept * base_c + momentum_c
            tl.store(m + base_out + at_c, momentum_c, mask=valid_c)
            tl.store(w + base_out + at_c, new_c, mask=valid_c)
            squares += tl.sum(new_c * new_c, 0)
        wanted_c = tl.load(norm + columns_c, mask=columns_c < K, other=0.0)
        new_scale = wanted_c / (tl.sqrt(squares) + NORM_EPS)
        tl.store(scale_out + columns_c, new_scale, mask=columns_c < K)


@triton.jit
def read_kernel(
    q, w, blocks, out,
    H: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Equation (8) for all tokens at once, w in q's dtype.

    blocks [P, 3]: slot, first token, number of tokens.
    """
    block, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(blocks + block * 3)
    first, count = tl.load(blocks + block * 3 + 1), tl.load(blocks + block * 3 + 2)
    offs_t, offs_k = tl.arange(0, BT), tl.arange(0, BK)
    q_TK = load_tokens(q, first, count, head, H, K, offs_t, offs_k)
    dtype = q.dtype.element_ty
    total = q_TK.to(tl.float32)
    for f in range(0, F, BF):
        offs_f = f + tl.arange(0, BF)
        gate, up, down = load_weights(w, slot, head, H, F, K, offs_f, offs_k)
        h_gate = tl.dot(q_TK, tl.trans(gate), input_precision=PRECISION)
        h_up = tl.dot(q_TK, tl.trans(up), input_precision=PRECISION)
        silu, _ = silu_parts(h_gate)
        total += tl.dot((silu * h_up).to(dtype), down, input_precision=PRECISION)
    start = first * (H * K) + head * K
    at = offs_t[:, None] * (H * K) + offs_k[None, :]
    valid = (offs_t < count)[:, None] & (offs_k < K)[None, :]
    tl.store(out + start + at, total.to(dtype), mask=valid)
