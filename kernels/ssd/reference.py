"""The SSD recurrence of Mamba-2 (arXiv 2405.21060) in plain PyTorch: the ``mamba2`` baseline.

    h_t = exp(-exp(a_log) dt_t) h_{t-1} + dt_t x_t b_t^T,    y_t = h_t c_t

Shape letters: B sequences, R rows (R = B, or the documents of one packed sequence), T tokens,
H heads, K head width, N state width, C chunk length, J chunks. The recurrence is linear in h, so
that the chunk length changes speed only: inside a chunk the outputs are one masked matrix product,
and only the states at the chunks' ends follow one another.

This file imports torch and the standard library only: exported models carry a copy of it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

Inputs = tuple[Tensor, ...]


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    a_log: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    chunk_size: int = 64,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a sequence; two calls over a split sequence equal one call.

    Args:
        x: inputs ``[B, T, H, K]``, any float dtype; computed in float32 (float64 for float64).
        dt: step sizes ``[B, T, H]``, after the softplus; 0 marks padding, which changes nothing.
        a_log: ``[H]``.
        b: ``[B, T, H, N]``.
        c: ``[B, T, H, N]``.
        chunk_size: C in tokens.
        state: h of each row before the first token ``[R, H, K, N]``; None: 0.
        cu_seqlens: int ``[R + 1]`` document starts and T of a packed sequence (B = 1); None: R = B.

    Returns:
        y ``[B, T, H, K]`` in x's dtype, and the state after each row's last token
        ``[R, H, K, N]``, float32 or wider.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check(x, dt, a_log, b, c, chunk_size)
    starts = None if cu_seqlens is None else cu_seqlens.tolist()
    if starts is not None and (
        x.shape[0] != 1
        or len(starts) < 2
        or starts[0] != 0
        or starts[-1] != x.shape[1]
        or sorted(starts) != starts
    ):
        raise ValueError(
            f"cu_seqlens from {starts[0]} to {starts[-1]} does not rise from 0 to T={x.shape[1]} "
            f"in one packed sequence (B={x.shape[0]}); give the document starts and T, with B=1"
        )
    num_rows = x.shape[0] if starts is None else len(starts) - 1
    dtype = torch.promote_types(x.dtype, torch.float32)
    want = (num_rows, *x.shape[2:], b.shape[-1])
    if state is None:
        state = x.new_zeros(want, dtype=dtype)
    elif tuple(state.shape) != want:
        raise ValueError(
            f"state of shape {list(state.shape)} does not fit; give it {list(want)}, "
            "or None at the start"
        )
    state = state.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        log_decay = -torch.exp(a_log.to(dtype)) * dt.to(dtype)
        inputs: Inputs = (
            x.to(dtype) * dt.to(dtype)[..., None], log_decay, b.to(dtype), c.to(dtype)
        )  # fmt: skip
        if starts is None:
            y, state = _rows(inputs, state, chunk_size)
            return y.to(x.dtype), state
        lengths = [end - start for start, end in pairwise(starts)]
        if len(set(lengths)) == 1:
            rows = (z.reshape(num_rows, lengths[0], *z.shape[2:]) for z in inputs)
            y, state = _rows(tuple(rows), state, chunk_size)
            return y.reshape(x.shape).to(x.dtype), state
        documents = zip(*(z.split(lengths, 1) for z in inputs), strict=True)
        results = [_rows(d, h, chunk_size) for d, h in zip(documents, state.split(1), strict=True)]
        outputs, states = zip(*results, strict=True)
        return torch.cat(outputs, 1).to(x.dtype), torch.cat(states)


def _rows(inputs: Inputs, state: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Rows that are one document each: x times dt, the logarithm of the decay, b and c."""
    x, log_decay, b, c = inputs
    num_tokens = x.shape[1]
    if num_tokens == 0:
        return x, state
    size = min(chunk_size, num_tokens)
    padding = -num_tokens % size  # zero inputs with a decay of exp(0): the state stays as it is

    def chunks(z: Tensor) -> Tensor:
        """``[R, T, H, K]`` -> ``[R, J, H, C, K]``."""
        return F.pad(z, (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, size)).transpose(2, 3)

    x, b, c = chunks(x), chunks(b), chunks(c)
    total = chunks(log_decay[..., None])[..., 0].cumsum(
        -1
    )  # [R, J, H, C] log of the decay since the chunk's start
    causal = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    # masked before the exponential: above the diagonal the difference is positive and may overflow
    between = (total[..., :, None] - total[..., None, :]).masked_fill(~causal, -torch.inf).exp()
    y = ((c @ b.mT) * between) @ x  # the chunk's own tokens
    to_end = (total[..., -1:] - total).exp()[..., None]
    gained = (x * to_end).mT @ b  # [R, J, H, K, N] what each chunk adds to the state
    kept = total[..., -1, None, None].exp()
    entering = []
    for gained_j, kept_j in zip(gained.unbind(1), kept.unbind(1), strict=True):
        entering.append(state)
        state = torch.addcmul(gained_j, kept_j, state)
    y = y + (c * total.exp()[..., None]) @ torch.stack(entering, 1).mT  # what came before the chunk
    return y.transpose(2, 3).flatten(1, 2)[:, :num_tokens], state


def _check(x: Tensor, dt: Tensor, a_log: Tensor, b: Tensor, c: Tensor, chunk_size: int) -> None:
    if x.dim() != 4:
        raise ValueError(f"x of shape {list(x.shape)} is not [B, T, n, d_h]; reshape it to heads")
    shape = tuple(x.shape[:3])
    if tuple(dt.shape) != shape or tuple(a_log.shape) != shape[2:]:
        raise ValueError(
            f"dt {list(dt.shape)} and a_log {list(a_log.shape)} do not fit x {list(x.shape)}; "
            f"give them {list(shape)} and {list(shape[2:])}"
        )
    if b.dim() != 4 or tuple(b.shape[:3]) != shape or b.shape != c.shape:
        raise ValueError(
            f"b {list(b.shape)} and c {list(c.shape)} do not fit x {list(x.shape)}; "
            f"give both {list(shape)} and one state width"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} is not positive; set it to at least 1 token")
