"""Sliced losses against dense float64 ones; no logits of the whole sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.losses import distillation_loss, next_token_loss

N, D, V = 37, 8, 29


def dense(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    targets: Tensor,
    kl_weight: float,
    ce_weight: float,
) -> Tensor:
    """The same loss with all logits at once, by PyTorch's own functions."""
    log_q = F.log_softmax(student @ weight.T, dim=-1)
    p = F.softmax(teacher @ weight.T, dim=-1)
    kl = F.kl_div(log_q, p, reduction="sum")
    ce = F.nll_loss(log_q, targets, reduction="sum")
    return kl_weight * kl + ce_weight * ce


def inputs(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(N, D, generator=generator, dtype=dtype) for _ in range(2))
    weight = torch.randn(V, D, generator=generator, dtype=dtype)
    return student, teacher, weight, torch.randint(0, V, (N,), generator=generator)


@pytest.mark.parametrize("elements", [1, V, 5 * V + 3, 10**6])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.7, 0.3), (0.0, 1.0)])
def test_distillation_equals_dense_in_value_and_gradient(
    elements: int, weights: tuple[float, float]
):
    student, teacher, weight, targets = inputs(torch.float64)
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    sums = distillation_loss(
        ours,
        teacher,
        weight,
        targets,
        kl_weight=weights[0],
        ce_weight=weights[1],
        max_elements=elements,
    )
    wanted = dense(theirs, teacher, weight, targets, *weights)
    torch.testing.assert_close(sums.total, wanted, rtol=1e-12, atol=1e-12)
    (3.0 * sums.total).backward()
    (3.0 * wanted).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_next_token_loss_equals_dense_with_a_trained_output_weight():
    hidden, _, weight, targets = inputs(torch.float64)
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    sums = next_token_loss(ours[0], ours[1], targets, max_elements=4 * V)
    wanted = F.cross_entropy(theirs[0] @ theirs[1].T, targets, reduction="sum")
    torch.testing.assert_close(sums.total, wanted, rtol=1e-12, atol=1e-12)
    sums.total.backward()
    wanted.backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-12)


def test_float32_is_near_float64():
    student, teacher, weight, targets = inputs(torch.float64)
    single = [x.float() for x in (student, teacher, weight)]
    sums = distillation_loss(single[0].requires_grad_(), single[1], single[2])
    wanted = dense(student, teacher, weight, targets, 1.0, 0.0)
    assert float(sums.total) == pytest.approx(float(wanted), rel=1e-5)


def test_bfloat16_sums_in_float32():
    student, teacher, weight, targets = (
        x.bfloat16() if x.is_floating_point() else x for x in inputs(torch.float64)
    )
    student.requires_grad_()
    sums = distillation_loss(student, teacher, weight, targets)
    assert sums.total.dtype == torch.float32
    sums.total.backward()
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16


def test_equal_student_and_teacher_have_no_divergence_and_no_gradient():
    student, _, weight, _ = inputs(torch.float64)
    student.requires_grad_()
    sums = distillation_loss(student, student.detach(), weight)
    sums.total.backward()
    assert float(sums.kl) == pytest.approx(0.0, abs=1e-12)
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-12


def test_teacher_gets_no_gradient_and_evaluation_keeps_none():
    student, teacher, weight, _ = inputs(torch.float64)
    student.requires_grad_()
    teacher.requires_grad_()
    distillation_loss(student, teacher, weight).total.backward()
    assert teacher.grad is None
    with torch.no_grad():
        assert not distillation_loss(student, teacher, weight).total.requires_grad


def test_cross_entropy_without_targets_is_refused():
    student, teacher, weight, _ = inputs(torch.float64)
    with pytest.raises(ValueError, match=r"ce_weight=0\.5 needs targets"):
        distillation_loss(student, teacher, weight, ce_weight=0.5)


class _LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_tensor_is_as_large_as_the_logits_of_the_sequence():
    tokens, vocabulary, width = 512, 1000, 4
    student, teacher = torch.randn(2, tokens, width)
    weight = torch.randn(vocabulary, width)
    with _LargestTensor() as largest:
        student.requires_grad_()
        sums = distillation_loss(student, teacher, weight, max_elements=16 * vocabulary)
        sums.total.backward()
    assert largest.numel == 16 * vocabulary
