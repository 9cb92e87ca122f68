"""Tensors of several shapes and dtypes in one buffer of bytes, the form in which they travel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Spec = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of one tensor of a message."""

_ALIGN = 16  # bytes: every tensor of a buffer starts where its dtype may start


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Copies of all tensors, which lie on one device, in a new uint8 buffer."""
    specs = [(tuple(t.shape), t.dtype) for t in tensors]
    buffer = torch.empty(num_bytes(specs), dtype=torch.uint8, device=tensors[0].device)
    with torch.no_grad():
        for slot, tensor in zip(unpack(buffer, specs), tensors, strict=True):
            slot.copy_(tensor)
    return buffer


def unpack(buffer: Tensor, specs: Sequence[Spec]) -> tuple[Tensor, ...]:
    """The tensors in a buffer, as views of it."""
    return tuple(
        buffer[at : at + size].view(dtype).view(shape)
        for (at, size), (shape, dtype) in zip(_slots(specs), specs, strict=True)
    )


def num_bytes(specs: Sequence[Spec]) -> int:
    """Bytes of the buffer that holds tensors of these shapes."""
    return sum(-(-size // _ALIGN) * _ALIGN for _, size in _slots(specs))


def _slots(specs: Sequence[Spec]) -> list[tuple[int, int]]:
    """(first byte, bytes) of each tensor."""
    slots, at = [], 0
    for shape, dtype in specs:
        size = torch.Size(shape).numel() * dtype.itemsize
        slots.append((at, size))
        at += -(-size // _ALIGN) * _ALIGN
    return slots
