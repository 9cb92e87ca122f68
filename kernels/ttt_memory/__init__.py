"""The online-learned memory of AllMem (arXiv 2602.13680): one call, several backends.

``backend`` takes ``"reference"`` (plain PyTorch, any device and float dtype), ``"triton"`` (not
built yet: an error that says so) or ``"auto"`` (the fastest one that computes the same function
here). One that cannot run is an error, never another function in silence. ``README.md`` beside
this file has the derivation.
"""

from __future__ import annotations

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
    if backend == "triton":
        raise ValueError(
            "backend='triton' cannot run: the memory has no Triton kernel yet; "
            "set backend='reference' or 'auto'"
        )
    check_inputs(q, k, v, eta, mu, weights, state, chunk_size, clip, decay)
    return reference.memory_scan(
        q, k, v, eta, mu, weights, state,
        chunk_size=chunk_size, cu_seqlens=cu_seqlens, clip=clip, decay=decay,
        return_state=return_state,
    )  # fmt: skip
