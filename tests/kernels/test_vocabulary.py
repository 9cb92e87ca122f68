"""The loss kernels over the vocabulary against float64: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import vocabulary

pytest.importorskip("triton", reason="pip install triton (Linux) to test the Triton kernels")
ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def exact(
    student: Tensor, teacher: Tensor | None, targets: Tensor | None, kl_weight: float, ce: float
) -> tuple[Tensor, Tensor, Tensor]:
    """KL and CE of each token and the gradient of their weighted sum, by autograd in float64."""
    logits = student.double().cpu().requires_grad_()
    log_q = torch.log_softmax(logits, -1)
    kl = surprise = torch.zeros(len(logits), dtype=torch.float64)
    if teacher is not None:
        log_p = torch.log_softmax(teacher.double().cpu(), -1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    if targets is not None:
        surprise = -log_q.gather(1, targets.cpu()[:, None])[:, 0]
    (grad,) = torch.autograd.grad((kl_weight * kl + ce * surprise).sum(), logits)
    return kl.detach(), surprise.detach(), grad


def close(found: Tensor, wanted: Tensor, bound: float) -> None:
    assert (found.double().cpu() - wanted).norm() <= bound * wanted.norm() + 1e-9


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("size", [1, 7, 16, 5000])
@pytest.mark.parametrize(("has_teacher", "ce"), [(True, 0.0), (True, 0.3), (False, 1.0)])
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
def test_sums_and_gradient_equal_float64(
    size: int, has_teacher: bool, ce: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(size)
    student, teacher = ((5 * torch.randn(3, size, generator=generator)).to(dtype) for _ in range(2))
    student[0] += 500  # softmax must not overflow
    targets = torch.randint(0, size, (3,), generator=generator)
    target = targets if ce else None
    wanted = exact(student, teacher if has_teacher else None, target, 0.7, ce)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    # as two tensor-parallel ranks see it, and as one
    for cuts in ([0, size], [0, size // 2, size]):
        kl = surprise = torch.zeros(3, dtype=torch.float64)
        parts = [slice(a, b) for a, b in pairwise(cuts) if b > a]
        held = [[x[:, part].clone().to(DEVICE) for part in parts] for x in (student, teacher)]
        sums = []
        for pieces in held:
            found = [vocabulary.statistics(piece) for piece in pieces]
            largest = torch.stack([top for top, _ in found]).amax(0)
            total = sum(s * (top - largest).exp() for top, s in found)
            sums.append(torch.stack((largest, total.log())))
        grads = []
        for part, ours, theirs in zip(parts, *held, strict=True):
            kls, ces = vocabulary.loss_and_gradient(
                ours, theirs if has_teacher else None, sums[0], sums[1] if has_teacher else None,
                targets.to(DEVICE) if ce else None, first=part.start, kl_weight=0.7, ce_weight=ce,
                gradient=True,
            )  # fmt: skip
            kl, surprise = kl + kls.double().cpu(), surprise + ces.double().cpu()
            grads.append(ours)
        close(kl, wanted[0], bound)
        close(surprise, wanted[1], bound)
        close(torch.cat(grads, 1), wanted[2], bound)


def test_without_a_gradient_the_logits_stay_as_they_are() -> None:
    logits = torch.randn(2, 40).to(DEVICE)
    before = logits.clone()
    largest, total = vocabulary.statistics(logits)
    sums = torch.stack((largest, total.log()))
    vocabulary.loss_and_gradient(
        logits, None, sums, None, torch.tensor([3, 5]).to(DEVICE), first=0,
        kl_weight=0.0, ce_weight=1.0, gradient=False,
    )  # fmt: skip
    assert torch.equal(logits, before)


@pytest.mark.parametrize("kl_weight", [0.0, 1.0])
def test_a_slice_is_the_same_fused_and_not(kl_weight: float) -> None:
    losses = pytest.importorskip("pipeline.losses")
    generator = torch.Generator().manual_seed(1)
    logits = [torch.randn(4, 300, generator=generator).to(DEVICE) for _ in range(2)]
    if not kl_weight:
        logits.pop()
    targets = torch.randint(0, 300, (4,), generator=generator).to(DEVICE)
    results = [
        losses.slice_loss(
            [x.clone() for x in logits], targets, kl_weight, 0.5, True, None, fused=fused
        )
        for fused in (True, False)
    ]
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_what_the_sanitizer_is_given_runs_every_kernel() -> None:
    worker = [sys.executable, "-m", "tests.kernels.sanitize", "--run"]
    done = subprocess.run(worker, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("every kernel ran\n"), done.stderr
