"""Sliding-window attention with sinks: equation (1) of AllMem (arXiv 2602.13680).

``backend`` takes ``"reference"`` (blocked, plain PyTorch, any device), ``"flex"`` (FlexAttention;
gradients on CUDA devices only) or ``"auto"`` (the fastest one that computes the same function
here). See ``README.md`` beside this file.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kernels.swa import reference
from kernels.swa.reference import attention_with_positions

__all__ = [
    "BACKENDS",
    "attention_with_positions",
    "auto_backend",
    "causal_attention",
    "continued_attention",
    "sliding_window_attention",
]

BACKENDS = ("auto", "reference", "flex")
MANY_DOCUMENTS = 16
"""Above this, one launch with a mask is taken for a packed sequence rather than one a document."""
FEW_QUERIES = 16
"""Below this, a mask of blocks of 128 queries is not worth making."""


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
    reference.check_shapes(q, k, v)
    reference.check_window(window_size, num_sinks)
    if backend == "auto" and _longest(q, cu_seqlens) <= window_size:
        return causal_attention(q, k, v, cu_seqlens=cu_seqlens, scale=scale)
    attend = _of(backend, q).sliding_window_attention
    out: Tensor = attend(
        q, k, v, window_size=window_size, num_sinks=num_sinks, cu_seqlens=cu_seqlens, scale=scale
    )
    return out


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Full causal attention, the teacher's; arguments as in ``sliding_window_attention``.

    ``"auto"`` takes PyTorch's own attention, document by document, and FlexAttention on a CUDA
    device for more than `MANY_DOCUMENTS`.
    """
    reference.check_shapes(q, k, v)
    if backend == "auto" and (cu_seqlens is None or len(cu_seqlens) - 1 <= MANY_DOCUMENTS):
        backend = "reference"
    out: Tensor = _of(backend, q).causal_attention(q, k, v, cu_seqlens=cu_seqlens, scale=scale)
    return out


def continued_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    position: int,
    window_size: int | None,
    num_sinks: int,
    sinks: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Queries that begin inside a document; arguments as in ``kernels.swa.reference``."""
    reference.check_continued(q, k, v, position, window_size, num_sinks, sinks)
    if backend == "auto" and q.shape[1] < FEW_QUERIES:
        backend = "reference"
    attend = _of(backend, q).continued_attention
    out: Tensor = attend(
        q, k, v, position=position, window_size=window_size, num_sinks=num_sinks, sinks=sinks,
        scale=scale,
    )  # fmt: skip
    return out


def auto_backend(q: Tensor) -> str:
    """What ``backend="auto"`` takes for many queries like q: ``"flex"`` or ``"reference"``."""
    return "flex" if q.is_cuda and q.dtype != torch.float64 else "reference"


def _longest(q: Tensor, cu_seqlens: Tensor | None) -> int:
    """Tokens of the longest document."""
    if cu_seqlens is None:
        return q.shape[1]
    starts = reference.document_starts(q, cu_seqlens)
    return max((stop - start for start, stop in pairwise(starts)), default=0)


def _of(backend: str, q: Tensor) -> Any:
    """The module that computes; a ValueError for an unknown one."""
    if backend not in BACKENDS:
        raise ValueError(
            f"backend={backend!r} is not one of {', '.join(BACKENDS)}; set backend='auto'"
        )
    if backend == "auto":
        backend = auto_backend(q)
    if backend == "reference":
        return reference
    from kernels.swa import flex  # a second to import

    return flex
