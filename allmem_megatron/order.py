"""Between Megatron's order of dimensions, [T, B, ...], and that of kernels and losses, [B, T, ...].

With B = 1 a transpose leaves strides that no longer say that the rows of a tensor lie one after the
other, and `contiguous` sees nothing to do. A linear layer then multiplies T times a single row, not
once T rows, which took up to nine tenths of a training step. A gradient has the strides of what it
is a gradient of, so it happens in backward too. Both functions therefore go by way of a flat
[T B, ...], whose strides are plain in both passes.
"""

from __future__ import annotations

from torch import Tensor


def tokens_first(x: Tensor) -> Tensor:
    """[B, T, D] -> [T, B, D], rows one after the other; without a copy where B = 1."""
    x = x.transpose(0, 1)
    return x.flatten(0, 1).unflatten(0, x.shape[:2])


def batch_first(x: Tensor) -> Tensor:
    """[T, B, ...] -> [B, T, ...]; its gradient arrives as a plain [T, B, ...]."""
    return x.flatten(0, 1).unflatten(0, x.shape[:2]).transpose(0, 1)
