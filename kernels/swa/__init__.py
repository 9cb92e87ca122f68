"""Sliding-window attention with sinks: equation (1) of AllMem (arXiv 2602.13680).

``backend`` takes ``"reference"`` (blocked, plain PyTorch, any device), ``"flex"`` (FlexAttention;
gradients on CUDA devices only) or ``"auto"`` (the fastest one that computes the same function
here). See ``README.md`` beside this file.
"""

from __future__ import annotations

import torch
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
    "auto_backend",
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
    reference.check_shapes(q, k, v)
    reference.check_window(window_size, num_sinks)
    if backend == "auto":
        backend = auto_backend(q)
    attend = reference.sliding_window_attention
    if backend == "flex":
        from kernels.swa import flex  # a second to import

        attend = flex.sliding_window_attention
    return attend(
        q, k, v, window_size=window_size, num_sinks=num_sinks, cu_seqlens=cu_seqlens, scale=scale
    )


def auto_backend(q: Tensor) -> str:
    """What ``backend="auto"`` takes for queries like q: ``"flex"`` or ``"reference"``."""
    return "flex" if q.is_cuda and q.dtype != torch.float64 else "reference"
