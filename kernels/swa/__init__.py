"""Sliding-window attention with sinks: equation (1) of AllMem (arXiv 2602.13680).

``backend`` takes ``"reference"`` (blocked, plain PyTorch, any device), ``"flex"`` (FlexAttention,
not built yet: an error that says so) or ``"auto"`` (the fastest one that computes the same function
here). See ``README.md`` beside this file.
"""

from __future__ import annotations

from torch import Tensor

from kernels.swa import reference
from kernels.swa.reference import (
    attention_with_positions,
    causal_attention,
    continued_attention,
)

__all__ = [
    "BACKENDS",
    "attention_with_positions",
    "causal_attention",
    "continued_attention",
    "sliding_window_attention",
]

BACKENDS = ("auto", "reference", "flex")


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int,
    num_sinks: int,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention to the window and the sinks; arguments as in ``kernels.swa.reference``.

    Args:
        backend: ``"auto"``, ``"reference"`` or ``"flex"``; memory is linear in T on each.

    Raises:
        ValueError: an unknown backend, one that cannot run here, or inputs of a wrong shape.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f"backend={backend!r} is not one of {', '.join(BACKENDS)}; set backend='auto'"
        )
    if backend == "flex":
        raise ValueError(
            "backend='flex' cannot run: it is not built yet; set backend='reference' or 'auto'"
        )
    return reference.sliding_window_attention(
        q, k, v, window_size=window_size, num_sinks=num_sinks, cu_seqlens=cu_seqlens, scale=scale
    )
