"""Losses over the vocabulary that never hold the logits of a whole sequence.

Shape letters: `N` loss tokens, `D` model width, `V` vocabulary, `S` tokens of one slice.

Hidden states are selected at the loss tokens first; then slices of `S` tokens go through the output
projection one after the other. A slice's gradient is formed while its logits are there: the loss is
a sum, so its gradient with respect to the hidden states, `[N, D]`, is all that the backward pass
needs (scaled by the incoming gradient), and no logits are computed twice or kept.

Over tensor-parallel ranks the vocabulary is split: each holds the logits of its own part and no
more. The softmax needs the largest logit and the sum of exponentials over all parts, two numbers a
token; the gradient with respect to the hidden states is summed over the ranks, once for all slices,
that with respect to the weights is each rank's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import vocabulary


class LossSums(NamedTuple):
    """Sums over the loss tokens, in nats; divide by the global number of loss tokens."""

    total: Tensor
    """[]: `kl_weight * kl + ce_weight * ce`; the one that carries a gradient."""
    kl: Tensor
    """[]: forward KL(teacher || student); 0 where no teacher was given."""
    ce: Tensor
    """[]: next-token cross-entropy; 0 where no targets were given."""


def slice_tokens(vocab_size: int, max_elements: int) -> int:
    """Tokens of a slice such that its logits have at most `max_elements` numbers (at least one)."""
    return max(1, max_elements // vocab_size)


def _log_softmax_(logits: list[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Log-softmax over the last dimension, which a group's ranks hold in parts.

    Args:
        logits: each [S, V / ranks], of the same shape; the list is emptied or its tensors are
            overwritten.
        group: the ranks in the vocabulary's order; None: the whole vocabulary is here.
    """
    if group is None:
        return [torch.log_softmax(logits.pop(0), dim=-1) for _ in range(len(logits))]
    largest = torch.stack([part.amax(dim=-1, keepdim=True) for part in logits])
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    shifted = [part.sub_(top) for part, top in zip(logits, largest, strict=True)]
    sums = torch.stack([part.exp().sum(dim=-1, keepdim=True) for part in shifted])
    dist.all_reduce(sums, group=group)
    return [part.sub_(total.log_()) for part, total in zip(shifted, sums, strict=True)]


class SliceLoss(NamedTuple):
    """Of one slice's tokens, summed, and of this rank's part of the vocabulary."""

    kl: Tensor
    """[]."""
    ce: Tensor
    """[]."""
    grad_logits: Tensor | None
    """[S, V / ranks] of the weighted sum, in the logits' dtype."""


def slice_loss(
    logits: list[Tensor],
    targets: Tensor | None,
    kl_weight: float,
    ce_weight: float,
    with_gradient: bool,
    group: dist.ProcessGroup | None,
    *,
    fused: bool | None = None,
) -> SliceLoss:
    """KL and cross-entropy of one slice.

    Args:
        logits: the student's [S, V / ranks], and the teacher's if there is one; the list is emptied
            or its tensors are overwritten.
        targets: [S] next tokens in the whole vocabulary.
        kl_weight: of the KL in the gradient.
        ce_weight: of the cross-entropy in the gradient.
        with_gradient: whether it is wanted.
        group: the ranks in the vocabulary's order; None: the whole vocabulary is here.
        fused: by the kernels of `kernels.vocabulary`; None: where they run.
    """
    if fused is None:
        fused = vocabulary.available(logits[0].device, logits[0].dtype)
    size = logits[0].shape[-1]
    first = 0 if group is None else dist.get_rank(group) * size
    if fused:
        return _fused_slice(logits, targets, kl_weight, ce_weight, with_gradient, group, first)
    dtype = logits[0].dtype
    accumulator = torch.promote_types(dtype, torch.float32)
    has_teacher = len(logits) > 1
    log_q, *log_ps = _log_softmax_([logits.pop(0).to(accumulator) for _ in list(logits)], group)
    kl = ce = torch.zeros((), dtype=accumulator, device=log_q.device)
    grad: Tensor | None = None
    index = is_here = None
    if targets is not None:
        index = targets.unsqueeze(1) - first
        is_here = (index >= 0) & (index < size)  # all of them with one rank
        index = index.clamp(0, size - 1)
        ce = ce - log_q.gather(1, index).masked_fill(~is_here, 0.0).sum()
    for log_p in log_ps:
        p = log_p.exp()
        kl = kl + torch.sum(p * log_p.sub_(log_q))
        if with_gradient:
            grad = p.mul_(-kl_weight)
    if not with_gradient:
        return SliceLoss(kl, ce, None)
    total_weight = (kl_weight if has_teacher else 0.0) + ce_weight
    q = log_q.exp_().mul_(total_weight)
    # d KL / d logits = q - p; d CE / d logits = q - onehot.
    grad = q if grad is None else grad.add_(q)
    if ce_weight and index is not None and is_here is not None:
        grad.scatter_add_(1, index, is_here.to(accumulator) * -ce_weight)
    return SliceLoss(kl, ce, grad.to(dtype))


def _fused_slice(
    logits: list[Tensor],
    targets: Tensor | None,
    kl_weight: float,
    ce_weight: float,
    with_gradient: bool,
    group: dist.ProcessGroup | None,
    first: int,
) -> SliceLoss:
    """`slice_loss` in two passes over the logits, which stay in their dtype."""
    parts = [vocabulary.statistics(part) for part in logits]
    largest, sums = (torch.stack(list(numbers)) for numbers in zip(*parts, strict=True))
    if group is not None:
        own = largest.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        sums = sums * (own - largest).exp()
        dist.all_reduce(sums, group=group)
    log_sums = torch.stack((largest, sums.log()), 1)  # [models, 2, S]
    student, teacher = logits[0], (logits[1] if len(logits) > 1 else None)
    kl, ce = vocabulary.loss_and_gradient(
        student,
        teacher,
        log_sums[0],
        None if teacher is None else log_sums[1],
        targets,
        first=first,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        gradient=with_gradient,
    )
    return SliceLoss(kl.sum(), ce.sum(), student if with_gradient else None)


class _SlicedLoss(torch.autograd.Function):
    """Forward computes the sums and, where asked, the gradients; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D], or this rank's rows of it
        teacher: Tensor | None,  # [N, D]
        targets: Tensor | None,  # [N]
        kl_weight: float,
        ce_weight: float,
        size: int,
        with_gradient: bool,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_hidden = with_gradient and ctx.needs_input_grad[0]
        needs_weight = with_gradient and ctx.needs_input_grad[1]
        accumulator = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=accumulator) if needs_weight else None
        kl = torch.zeros((), dtype=accumulator, device=hidden.device)
        ce = torch.zeros_like(kl)
        for start in range(0, hidden.shape[0], size):
            part = slice(start, start + size)
            h_SD = hidden[part]
            states = [h_SD] if teacher is None else [h_SD, teacher[part]]
            logits = [state @ weight.T for state in states]
            index = None if targets is None else targets[part]
            passed = slice_loss(
                logits, index, kl_weight, ce_weight, needs_hidden or needs_weight, group
            )
            kl, ce = kl + passed.kl, ce + passed.ce
            if passed.grad_logits is not None:
                grad_logits = passed.grad_logits
                if grad_hidden is not None:
                    torch.matmul(grad_logits, weight, out=grad_hidden[part])
                if grad_weight is not None:
                    if grad_logits.dtype == accumulator:
                        grad_weight.addmm_(grad_logits.T, h_SD)
                    else:  # a product in the weights' own type, summed in float32
                        grad_weight.add_(grad_logits.T @ h_SD)
        if group is not None:
            kl, ce = _sum_over((kl, ce), group)
            if grad_hidden is not None:
                dist.all_reduce(grad_hidden, group=group)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        total = kl_weight * kl + ce_weight * ce
        ctx.mark_non_differentiable(kl, ce)
        return total, kl, ce

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        if grad_hidden is not None:
            grad_hidden = grad_hidden * scale.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, *[None] * 7


def _sum_over(values: Sequence[Tensor], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    total = torch.stack(list(values))
    dist.all_reduce(total, group=group)
    return total.unbind()


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    *,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    max_elements: int = 2**24,
    tp_group: dist.ProcessGroup | None = None,
) -> LossSums:
    """Forward KL(teacher || student) at temperature 1, and the cross-entropy, at the loss tokens.

    The target of conversion in AllMem (arXiv 2602.13680, conversion recipe).

    Args:
        student: [N, D] hidden states after the final norm at the loss tokens.
        teacher: [N, D] the full-attention model's at the same tokens; gets no gradient.
        weight: [V, D] output projection, one for both; with `tp_group` this rank's rows.
        targets: [N] int64 next tokens; needed where `ce_weight` is not 0, else only reported.
        kl_weight: weight of the KL in `total`.
        ce_weight: weight of the cross-entropy in `total`.
        max_elements: logits held at once on a rank.
        tp_group: ranks that hold equal parts of the vocabulary, in order, and the same N tokens.

    Raises:
        ValueError: `ce_weight` without targets.
    """
    if ce_weight and targets is None:
        raise ValueError(f"ce_weight={ce_weight} needs targets; give them or set ce_weight=0")
    size = slice_tokens(weight.shape[0], max_elements)
    parts = _SlicedLoss.apply(
        student,
        weight,
        teacher.detach(),
        targets,
        kl_weight,
        ce_weight,
        size,
        torch.is_grad_enabled(),
        tp_group,
    )
    return LossSums(*parts)


def next_token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    max_elements: int = 2**24,
    tp_group: dist.ProcessGroup | None = None,
) -> LossSums:
    """Cross-entropy of the next token at the loss tokens.

    Args:
        hidden: [N, D] hidden states after the final norm at the positions before the targets.
        weight: [V, D] output projection; with `tp_group` this rank's rows.
        targets: [N] int64 the tokens to predict.
        max_elements: logits held at once on a rank.
        tp_group: ranks that hold equal parts of the vocabulary, in order, and the same N tokens.
    """
    size = slice_tokens(weight.shape[0], max_elements)
    parts = _SlicedLoss.apply(
        hidden, weight, None, targets, 0.0, 1.0, size, torch.is_grad_enabled(), tp_group
    )
    return LossSums(*parts)
