"""Triton kernels of the loss over the vocabulary: softmax statistics, and KL, CE and gradient.

Shape letters: S tokens of a slice, V vocabulary of this rank. A program has one token and walks
over its logits, in float32; nothing of size S x V is written but the gradient, over the logits that
it came from. Each sum is inside one program: two runs are equal bit by bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)
"""In place of logits beyond the vocabulary: finite, so that differences of two are numbers."""


@triton.jit(do_not_specialize=["V"])
def statistics_kernel(logits, largest, total, V, stride, BV: tl.constexpr):
    """largest [S]: the largest logit; total [S]: the sum of exp(logit - largest)."""
    row = tl.program_id(0)
    offs = tl.arange(0, BV)
    base = logits + row.to(tl.int64) * stride
    most = tl.full((BV,), LOWEST, tl.float32)
    sums = tl.zeros((BV,), tl.float32)
    for start in range(0, V, BV):
        x = tl.load(base + start + offs, mask=start + offs < V, other=LOWEST).to(tl.float32)
        new = tl.maximum(most, x)
        sums = sums * tl.exp(most - new) + tl.exp(x - new)
        most = new
    found = tl.max(most, 0)
    tl.store(largest + row, found)
    tl.store(total + row, tl.sum(sums * tl.exp(most - found), 0))


@triton.jit(do_not_specialize=["V", "first"])
def loss_kernel(
    student, teacher, log_student, log_teacher, targets, kl, ce,
    V, stride, first, kl_weight, ce_weight,
    TEACHER: tl.constexpr, TARGETS: tl.constexpr, GRADIENT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """This rank's part of KL(teacher || student) and of the cross-entropy, per token.

    log_student, log_teacher [2, S]: over the whole vocabulary the largest logit, and the logarithm
    of the sum of exp(logit - largest), apart, for large logits' sake. targets [S] in the whole
    vocabulary, of which this rank's part begins at `first`. GRADIENT: the student's logits are
    overwritten with that of kl_weight KL + ce_weight CE.
    """
    row = tl.program_id(0)
    offs = tl.arange(0, BV)
    base = student + row.to(tl.int64) * stride
    other_base = teacher + row.to(tl.int64) * stride
    num_rows = tl.num_programs(0)
    top, shift = tl.load(log_student + row), tl.load(log_student + num_rows + row)
    top_p = tl.load(log_teacher + row) if TEACHER else 0.0
    shift_p = tl.load(log_teacher + num_rows + row) if TEACHER else 0.0
    target = tl.load(targets + row) - first if TARGETS else -1
    divergence = tl.zeros((BV,), tl.float32)
    surprise = tl.zeros((BV,), tl.float32)
    for start in range(0, V, BV):
        at = start + offs
        valid = at < V
        log_q = tl.load(base + at, mask=valid, other=LOWEST).to(tl.float32) - top - shift
        grad = tl.exp(log_q) * ce_weight
        if TEACHER:
            grad += tl.exp(log_q) * kl_weight
            log_p = tl.load(other_base + at, mask=valid, other=LOWEST).to(tl.float32)
            log_p = log_p - top_p - shift_p
            p = tl.exp(log_p)
            divergence += tl.where(valid, p * (log_p - log_q), 0.0)
            grad -= kl_weight * p
        if TARGETS:
            here = valid & (at == target)
            surprise -= tl.where(here, log_q, 0.0)
            grad -= tl.where(here, ce_weight, 0.0)
        if GRADIENT:
            tl.store(base + at, grad.to(student.dtype.element_ty), mask=valid)
    tl.store(kl + row, tl.sum(divergence, 0))
    tl.store(ce + row, tl.sum(surprise, 0))
