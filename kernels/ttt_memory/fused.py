"""What stands around the scan, fused where that pays: equations (2), (3) and (12) and alpha.

The formulas are those of `branch.py`, which is the reference; ``backend`` as for ``memory_scan``.
Everything here is bound by memory: README.md counts the bytes.

Shape letters: B sequences, R rows (documents), T tokens, H heads, K head width, C = H K channels,
D model width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernels import ttt_memory
from kernels.ttt_memory import branch

__all__ = ["add_scaled", "conv_heads", "gated_output"]


def conv_heads(
    x: Tensor,
    weight: Tensor,
    num_heads: int,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    tail: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Queries, keys or values of the memory from their projection: equations (2) and (3).

    Args:
        x: ``[B, T, C]``, any strides of the first two dimensions.
        weight: ``[C, width]`` of the depthwise convolution, the current token's weight last.
        num_heads: H.
        norm: ``[K]`` for queries and keys, which are normalised; None for values.
        eps: of the RMSNorm.
        tail: the last ``width - 1`` inputs of each row before this call ``[R, width - 1, C]``;
            None: 0. they are kept by the caller.
        cu_seqlens: int ``[N + 1]`` document starts and T of a packed sequence (B = 1, R = N), on
            the CPU, or the call waits for the GPU.
        backend: ``"auto"``, ``"reference"`` or ``"triton"``.

    Returns:
        ``[B, T, H, K]`` in x's dtype.

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot run here.
    """
    if ttt_memory.backend_of(backend, x) == "reference":
        y, _ = branch.causal_conv(x, weight, tail=tail, cu_seqlens=cu_seqlens)
        heads = y.unflatten(-1, (num_heads, -1))
        return heads if norm is None else branch.memory_qk(heads, norm, eps)
    branch.check_conv(x, weight, tail, cu_seqlens)
    from kernels.ttt_memory.triton_backend.branch import ConvHeads

    bounds = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
    # by nodes of their own: their gradients are then accumulated in one order on every rank
    weight, norm = weight.view_as(weight), None if norm is None else norm.view_as(norm)
    return _apply(ConvHeads, x, weight, norm, tail, num_heads, eps, bounds)


def gated_output(
    v_hat: Tensor, norm: Tensor, gate_logits: Tensor, eps: float, *, backend: str = "auto"
) -> Tensor:
    """Equation (12) before W_o, as `branch.memory_output`.

    Returns:
        ``[B, T, H K]``; by Triton a view of contiguous ``[T, B, H K]``, Megatron's order.

    Raises:
        ValueError: a backend that cannot run here.
    """
    if ttt_memory.backend_of(backend, v_hat) == "reference":
        return branch.memory_output(v_hat, norm, gate_logits, eps)
    from kernels.ttt_memory.triton_backend.branch import GateNorm

    return _apply(GateNorm, v_hat, norm, gate_logits, eps).transpose(0, 1)


def add_scaled(base: Tensor, alpha: Tensor, x: Tensor, *, backend: str = "auto") -> Tensor:
    """``base + alpha * x`` of equation (1), for base and x ``[..., D]`` and alpha ``[D]``.

    Raises:
        ValueError: a backend that cannot run here.
    """
    if ttt_memory.backend_of(backend, x) == "reference" or base.dtype != x.dtype:
        return base + alpha * x
    from kernels.ttt_memory.triton_backend.branch import AddScaled

    return _apply(AddScaled, base, alpha, x)


def _apply(function: Any, *inputs: Any) -> Tensor:
    out: Tensor = function.apply(*inputs)
    return out
