"""KL and cross-entropy of a slice's logits, and their gradient, in two passes over the logits.

`pipeline.losses` has the formula in plain PyTorch, what is done with slices and over ranks, and the
rule for when these kernels are taken; ``README.md`` beside this file counts the bytes.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

__all__ = ["available", "loss_and_gradient", "statistics"]


@cache
def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run on tensors of this device and dtype."""
    fits = dtype in (torch.float32, torch.bfloat16, torch.float16)
    return device.type == "cuda" and fits and importlib.util.find_spec("triton") is not None


def statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit and the sum of exp(logit - largest) of each token, over these logits.

    Args:
        logits: ``[S, V]``, contiguous.

    Returns:
        two of ``[S]`` in float32.
    """
    from kernels.vocabulary import triton_kernels

    num_tokens, size = logits.shape
    largest = logits.new_empty(num_tokens, dtype=torch.float32)
    total = torch.empty_like(largest)
    if num_tokens:
        triton_kernels.statistics_kernel[(num_tokens,)](
            logits, largest, total, size, logits.stride(0), BV=_block(size), num_warps=8
        )
    return largest, total


def loss_and_gradient(
    student: Tensor,
    teacher: Tensor | None,
    log_student: Tensor,
    log_teacher: Tensor | None,
    targets: Tensor | None,
    *,
    first: int,
    kl_weight: float,
    ce_weight: float,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """This rank's part of KL(teacher || student) and of the cross-entropy of each token.

    Args:
        student: ``[S, V]`` logits, contiguous; with `gradient` overwritten with the gradient of
            ``kl_weight KL + ce_weight CE`` (KL only if there is a teacher).
        teacher: as `student`, or None.
        log_student: ``[2, S]`` float32, over the whole vocabulary the largest logit, and the log
            of the sum of exp(logit - largest).
        log_teacher: likewise.
        targets: ``[S]`` int64 next tokens, in the whole vocabulary, or None.
        first: where this rank's part of the vocabulary begins.
        kl_weight: of the KL in the gradient.
        ce_weight: of the cross-entropy in the gradient.
        gradient: whether it is wanted.

    Returns:
        two of ``[S]`` in float32; 0 where there is no teacher, or no targets.
    """
    from kernels.vocabulary import triton_kernels

    num_tokens, size = student.shape
    kl, ce = torch.empty_like(log_student[0]), torch.empty_like(log_student[0])
    if num_tokens:
        triton_kernels.loss_kernel[(num_tokens,)](
            student,
            student if teacher is None else teacher,
            log_student.contiguous(),
            log_student if log_teacher is None else log_teacher.contiguous(),
            log_student if targets is None else targets.contiguous(),
            kl, ce, size, student.stride(0), first, float(kl_weight), float(ce_weight),
            TEACHER=teacher is not None, TARGETS=targets is not None, GRADIENT=gradient,
            BV=_block(size), num_warps=8,
        )  # fmt: skip
    return kl, ce


def _block(size: int) -> int:
    """Logits at a time: a power of two, 16 a thread at most."""
    return max(16, min(4096, 1 << (size - 1).bit_length()))
