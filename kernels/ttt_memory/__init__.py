"""The online-learned memory of AllMem (arXiv 2602.13680): one call, several backends.

``backend`` takes ``"reference"`` (plain PyTorch, any device and float dtype), ``"triton"`` (CUDA
devices, float32 and bfloat16) or ``"auto"`` (the fastest one that computes the same function here).
One that cannot run is an error, never another function in silence. ``README.md`` beside this file
has the derivation.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels.ttt_memory import reference
from kernels.ttt_memory.checks import check_inputs
from kernels.ttt_memory.reference import FastWeights, MemoryState, initial_state

__all__ = ["BACKENDS", "FastWeights", "MemoryState", "initial_state", "memory_scan"]

BACKENDS = ("auto", "reference", "triton")


def memory_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    mu: Tensor,
    weights: FastWeights,
    state: MemoryState | None = None,
    *,
    chunk_size: int,
    cu_seqlens: Tensor | None = None,
    clip: float | None = None,
    decay: float | Tensor | None = None,
    return_state: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, MemoryState | None]:
    """Run equations (8) to (11); arguments and results as in ``reference.memory_scan``.

    Args:
        backend: ``"auto"``, ``"reference"`` or ``"triton"``.

    Raises:
        ValueError: an unknown backend, one that cannot run here, or inputs of a wrong shape.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {BACKENDS}; set backend='auto'")
    check_inputs(q, k, v, eta, mu, weights, state, chunk_size, clip, decay)
    if backend == "auto":
        backend = auto_backend(q, decay)
    scan = _triton_scan() if backend == "triton" else reference.memory_scan
    return scan(
        q, k, v, eta, mu, weights, state,
        chunk_size=chunk_size, cu_seqlens=cu_seqlens, clip=clip, decay=decay,
        return_state=return_state,
    )  # fmt: skip


def auto_backend(q: Tensor, decay: float | Tensor | None = None) -> str:
    """What ``backend="auto"`` takes for these inputs: ``"triton"`` or ``"reference"``."""
    fast = q.is_cuda and q.dtype in (torch.float32, torch.bfloat16, torch.float16)
    learned = isinstance(decay, Tensor) and decay.requires_grad
    return "triton" if fast and not learned and _has_triton() else "reference"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def backend_of(backend: str, x: Tensor) -> str:
    """``"triton"`` or ``"reference"``: what `backend` means for what stands around the scan of x.

    Raises:
        ValueError: an unknown backend, or one that cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {BACKENDS}; set backend='auto'")
    if backend == "triton":
        _require_triton()
        from kernels.ttt_memory.triton_backend.scan import check_device

        check_device(x)
    return auto_backend(x) if backend == "auto" else backend


def _require_triton() -> None:
    if not _has_triton():
        raise ValueError(
            "backend='triton' cannot run: the package triton is not installed; "
            "pip install triton, or set backend='reference' or 'auto'"
        )


def _triton_scan() -> Callable[..., Any]:
    _require_triton()
    from kernels.ttt_memory.triton_backend.scan import memory_scan as scan

    return scan
