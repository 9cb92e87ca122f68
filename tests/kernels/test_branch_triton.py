"""The fused kernels around the scan against the float64 formulas: outputs and gradients.

Interpreted on a CPU, compiled on a GPU; what the kernels are to fill is NaN before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.ttt_memory import fused

pytest.importorskip("triton", reason="pip install triton (Linux) to test the Triton kernels")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = 1e-5
"""‖out − ref‖ / ‖ref‖ in float32; 1e-2 in bfloat16."""


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def check(
    run: Callable[..., Tensor], tensors: list[Tensor], dtype: torch.dtype, bound: float
) -> None:
    """Output and gradients of one random linear loss, by Triton and by the formulas in float64."""
    results = []
    for backend, kind, device in (("reference", torch.float64, "cpu"), ("triton", dtype, DEVICE)):
        leaves = [x.to(dtype).to(device, kind).requires_grad_() for x in tensors]
        out = run(*leaves, backend=backend)
        loss = (out * random(*out.shape, seed=5).to(device, kind)).sum()
        results.append([out, *torch.autograd.grad(loss, leaves)])
    for expected, actual in zip(*results, strict=True):
        assert actual.shape == expected.shape
        error = (actual.cpu().double() - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error <= bound


CONV = {
    "rows": {"rows": 2, "tokens": 9},
    "one-token": {"rows": 1, "tokens": 1},
    "values": {"rows": 2, "tokens": 7, "norm": False},
    "tail": {"rows": 2, "tokens": 5, "tail": 2},
    "tail-of-values": {"rows": 2, "tokens": 2, "tail": 2, "norm": False},
    "packed": {"rows": 1, "tokens": 23, "bounds": [0, 1, 1, 3, 20, 23]},
    "packed-with-tails": {"rows": 1, "tokens": 23, "bounds": [0, 1, 1, 3, 20, 23], "tail": 5},
    "blocks": {"rows": 1, "tokens": 70, "heads": 1, "width": 64},
    "width-24": {"rows": 2, "tokens": 4, "width": 24},
    "two-taps": {"rows": 2, "tokens": 4, "taps": 2},
}


def convolve(case: dict[str, Any], sequence_first: bool) -> tuple[Callable[..., Tensor], Any]:
    """What to run, and its tensors: x, weight, then norm and tail where the case has them."""
    settings = {"heads": 2, "width": 16, "taps": 4, "norm": True, "bounds": None, **case}
    channels = settings["heads"] * settings["width"]
    shape = (settings["rows"], settings["tokens"], channels)
    x = random(shape[1], shape[0], channels).transpose(0, 1) if sequence_first else random(*shape)
    tensors = [x, random(channels, settings["taps"])]
    if settings["norm"]:
        tensors.append(1 + 0.3 * random(settings["width"]))
    if "tail" in settings:
        tensors.append(random(settings["tail"], settings["taps"] - 1, channels))
    bounds = None if settings["bounds"] is None else torch.tensor(settings["bounds"])

    def run(x: Tensor, weight: Tensor, *rest: Tensor, backend: str) -> Tensor:
        left = list(rest)
        # as a part of a wider product gives it
        x = torch.cat([x, x[..., :3]], -1)[..., : x.shape[-1]]
        norm = left.pop(0) if settings["norm"] else None
        return fused.conv_heads(
            x, weight, settings["heads"], norm=norm, eps=1e-6, tail=left[0] if left else None,
            cu_seqlens=bounds, backend=backend,
        )  # fmt: skip

    return run, tensors


@pytest.mark.parametrize("case", CONV)
@pytest.mark.usefixtures("nan_memory")
def test_convolution_and_norms_equal_the_formulas(case: str) -> None:
    check(*convolve(CONV[case], sequence_first=len(case) % 2 == 0), torch.float32, BOUND)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize(("rows", "tokens", "heads", "width"), [(2, 5, 3, 16), (1, 41, 2, 24)])
def test_gate_and_norm_equal_the_formulas(rows: int, tokens: int, heads: int, width: int) -> None:
    def run(v_hat: Tensor, norm: Tensor, gate: Tensor, *, backend: str) -> Tensor:
        # as a projection in Megatron's order gives them
        return fused.gated_output(v_hat, norm, gate.transpose(0, 1), 1e-6, backend=backend)

    tensors = [random(rows, tokens, heads, width), random(width), random(tokens, rows, heads)]
    check(run, tensors, torch.float32, BOUND)


@pytest.mark.usefixtures("nan_memory")
def test_scaling_and_adding_equal_the_formula() -> None:
    tensors = [random(37, 2, 130), random(130), random(37, 2, 130, seed=1)]
    check(fused.add_scaled, tensors, torch.float32, BOUND)


def test_the_output_lies_in_megatrons_order() -> None:
    v_hat, gate = random(2, 5, 3, 16).float().to(DEVICE), random(2, 5, 3).float().to(DEVICE)
    norm = torch.ones(16, device=DEVICE)
    out = fused.gated_output(v_hat, norm, gate, 1e-6, backend="triton")
    assert out.transpose(0, 1).is_contiguous()


def test_an_unknown_backend_and_a_tail_that_does_not_fit_are_refused() -> None:
    x, weight = random(1, 4, 8).float().to(DEVICE), random(8, 4).float().to(DEVICE)
    with pytest.raises(ValueError, match="backend='cuda' is not one of"):
        fused.conv_heads(x, weight, 2, backend="cuda")
    with pytest.raises(ValueError, match=r"tail of shape \[1, 2, 8\] does not fit; give it \[1, 3"):
        fused.conv_heads(x, weight, 2, tail=x[:, :2], backend="triton")
    with pytest.raises(ValueError, match="does not rise from 0 to T=4"):
        fused.conv_heads(x, weight, 2, cu_seqlens=torch.tensor([0, 3]), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("width", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("tokens", [1, 63, 1000])
def test_bfloat16_on_a_gpu_is_within_one_per_cent(width: int, tokens: int) -> None:
    bounds = sorted({0, 1, tokens // 3, tokens // 2, tokens})
    for case in ({"rows": 2, "tail": 2}, {"rows": 1, "bounds": bounds}, {"rows": 2, "norm": False}):
        settings = {**case, "tokens": tokens, "heads": max(1, 512 // width), "width": width}
        check(*convolve(settings, sequence_first=True), torch.bfloat16, 1e-2)

    def run(v_hat: Tensor, norm: Tensor, gate: Tensor, *, backend: str) -> Tensor:
        return fused.gated_output(v_hat, norm, gate, 1e-6, backend=backend)

    heads = max(1, 512 // width)
    tensors = [random(2, tokens, heads, width), random(width), random(2, tokens, heads)]
    check(run, tensors, torch.bfloat16, 1e-2)
    base, alpha = random(tokens, 1, 1024), random(1024)
    check(fused.add_scaled, [base, alpha, random(tokens, 1, 1024, seed=1)], torch.bfloat16, 1e-2)
