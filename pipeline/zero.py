"""Choices about ZeRO that both the engine makes and a plan foresees."""

from __future__ import annotations

import torch

REDUCE_BUCKET = 500_000_000
"""The most numbers of DeepSpeed's buffer for gradients, its own default."""


def reduce_bucket(trained: int) -> int:
    """Numbers of the buffer in which ranks reduce gradients.

    DeepSpeed's default alone takes 1 to 4 GB of a GPU; a conversion trains far fewer numbers.

    Args:
        trained: trained numbers on this rank.
    """
    return max(min(trained, REDUCE_BUCKET), 1)


def check_zero(zero_stage: int, dtype: torch.dtype) -> None:
    """Refuse what ZeRO has no float32 weights for.

    Raises:
        ValueError: stage 0 with bfloat16.
    """
    if zero_stage == 0 and dtype != torch.float32:
        raise ValueError(
            f"parallel.zero_stage=0 keeps no float32 weights beside {dtype}; "
            "set parallel.zero_stage=1 or parallel.dtype=float32"
        )
