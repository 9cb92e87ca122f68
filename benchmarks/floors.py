"""FLOPs that must be done and bytes that must be moved, by operation: floors of the benchmarks.

A multiply-add is two FLOPs. Bytes: every input read once, every output written once, nothing in
between. Forward and backward together do three times the forward's products (a product has two
gradients); what a version computes again instead of keeping is its own affair and not counted.

Symbols as in pipeline/costs.py: n memory heads of width d_h, f their hidden width, n_q and n_kv
attention heads of width h, W window, s sinks, e bytes of an element.
"""

from __future__ import annotations

from benchmarks.measure import Work
from benchmarks.shapes import Shape
from pipeline.costs import cache_bytes, flops_per_token

RATE = 4  # bytes: learning rates and momentum are float32


def memory_scan(shape: Shape, batch: int, tokens: int, element: int, *, backward: bool) -> Work:
    """18 n d_h f FLOPs a token (read 6, write 12); q, k, v, rates in, V^ out."""
    n, width = shape.memory_heads, shape.memory_head_dim
    flops = 18 * n * width * shape.expansion * width
    inputs = 3 * n * width * element + 4 * n * RATE
    out = n * width * element
    return _work(batch * tokens, flops, inputs, out, backward)


def piece(
    name: str, shape: Shape, batch: int, tokens: int, element: int, *, backward: bool
) -> Work:
    """What stands around the scan, bound by bytes: its tensors once, and the gradients once.

    `conv`: projected in, heads out, 4 taps. `gate`: V^ and a gate logit a head in, mixed out.
    `add`: base and branch in, their sum out; base's gradient is the output's own.
    """
    if name == "add":
        width = shape.hidden_size
        # forward x, base -> out; backward: the gradient in, x again (for alpha's), x's gradient out
        return Work(
            flops=(6 if backward else 2) * width * batch * tokens,
            bytes=(6 if backward else 3) * width * element * batch * tokens,
        )
    width = shape.memory_size
    inputs = width * element + (shape.memory_heads * element if name == "gate" else 0)
    return _work(
        batch * tokens, (16 if name == "conv" else 8) * width, inputs, width * element, backward
    )


def delta_rule(shape: Shape, batch: int, tokens: int, element: int, *, backward: bool) -> Work:
    """6 n d_h^2 FLOPs a token: S k, the outer product that is added, S q; a gate and a rate."""
    n, width = shape.memory_heads, shape.memory_head_dim
    inputs = 3 * n * width * element + 2 * n * RATE
    return _work(batch * tokens, 6 * n * width**2, inputs, n * width * element, backward)


def attention(
    shape: Shape, batch: int, tokens: int, element: int, *, backward: bool, window: bool
) -> Work:
    """4 n_q h FLOPs for every pair of query and key that is seen."""
    pairs = seen_pairs(tokens, shape.window_size, shape.num_sinks) if window else None
    pairs = tokens * (tokens + 1) // 2 if pairs is None else pairs
    flops = 4 * shape.num_heads * shape.head_dim * pairs / tokens
    inputs = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim * element
    out = shape.num_heads * shape.head_dim * element
    return _work(batch * tokens, flops, inputs, out, backward)


def seen_pairs(tokens: int, window: int, sinks: int) -> int:
    """Pairs (t, j) with j <= t and (t - j < W or j < s)."""
    inside = min(tokens, window)
    pairs = inside * (inside + 1) // 2 + (tokens - inside) * window
    # query t sees the sinks that lie before its window: min(s, t - W + 1) of them
    outside = max(0, tokens - window)
    rising = min(outside, sinks)
    return pairs + rising * (rising + 1) // 2 + (outside - rising) * sinks


def mixer(
    shape: Shape, batch: int, tokens: int, element: int, *, backward: bool, name: str
) -> Work:
    """The token mixer of a layer (pipeline/costs.py); x in, the mixed x out, the weights once.

    Backward with frozen base weights: a product with a frozen weight has one gradient, of its
    input; scores, branch and everything else have two.
    """
    forward = flops_per_token(name, shape.mixer, tokens)
    frozen = 4.0 * shape.hidden_size * shape.head_dim * (shape.num_heads + shape.num_kv_heads)
    flops = forward if not backward else 3 * forward - frozen
    branch = shape.branch_weights if name == "allmem" else 0
    weights = frozen / 2 + branch
    passes = 3 if backward else 1  # x and its gradient in, dx out: each as large as x
    moved = 2 * passes * shape.hidden_size * element * batch * tokens
    moved += (2 if backward else 1) * weights * element
    return Work(flops=flops * batch * tokens, bytes=moved)


def prefill(shape: Shape, name: str, batch: int, tokens: int, element: int) -> Work:
    """Mixer and MLP of all tokens, logits of the last one; weights once, the cache written once."""
    layer = flops_per_token(name, shape.mixer, tokens)
    layer += 6 * shape.hidden_size * shape.intermediate_size
    flops = shape.num_layers * layer * batch * tokens
    flops += 2 * shape.hidden_size * shape.vocab_size * batch
    moved = shape.num_weights(name) * element
    moved += batch * cache_bytes(name, shape.mixer, tokens, element_bytes=element)
    return Work(flops=flops, bytes=moved)


def decode(shape: Shape, name: str, batch: int, tokens: int, element: int) -> Work:
    """One token after `tokens` others: weights once for all rows, the cache once for each row.

    The memory only reads its weights then: 6 n d_h f FLOPs; W is half of the state, and the other
    half and the unfinished chunk are not touched but once in c tokens.
    """
    keys = tokens if name == "full" else min(tokens, shape.window_size + shape.num_sinks)
    flops = 2 * shape.num_weights(name) * batch
    flops += 4 * shape.num_heads * shape.head_dim * keys * shape.num_layers * batch
    key_values = 2 * shape.num_kv_heads * shape.head_dim * keys * element
    fast = shape.mixer.fast_weight_elements
    state = 4 * fast if name == "allmem" else 0
    if name == "allmem":
        flops += 2 * fast * shape.num_layers * batch
    if name == "mamba2":
        state = 8 * shape.mixer.recurrent_state_elements  # read and written
    moved = shape.num_weights(name) * element + batch * shape.num_layers * (key_values + state)
    return Work(flops=flops, bytes=moved)


def _work(tokens: int, flops: float, inputs: float, out: float, backward: bool) -> Work:
    moved = inputs + out
    if backward:  # the output's gradient in, the inputs read again, their gradients out
        moved += out + 2 * inputs
    return Work(flops=tokens * flops * (3 if backward else 1), bytes=tokens * moved)
