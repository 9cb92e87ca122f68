"""Kernels of a decode step: window attention against float64, and what compiles for Hopper.

The whole step is compared with the model's plain path in `tests/allmem_hf/test_decode_fused.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.swa import attention_with_positions

pytest.importorskip("triton", reason="pip install triton (Linux) to test the Triton kernels")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parents[2]
SHARED = 227 * 1024
"""Bytes of shared memory that a block may have on Hopper."""


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def formula(
    x: Tensor, heads: int, width: int, norm: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    """RMSNorm and RoPE of heads side by side, [R, heads width] -> [R, heads, width]."""
    y = x.unflatten(1, (heads, width))
    y = norm * y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    half = width // 2
    turned = torch.cat([-y[..., half:], y[..., :half]], -1)
    return y * cos[:, None] + turned * sin[:, None]


def check(
    lengths: list[int], heads: int, group: int, width: int, window: int, sinks: int,
    dtype: torch.dtype, bound: float,
) -> None:  # fmt: skip
    """One token more in rows that have seen `lengths` tokens; slots that are empty hold NaN."""
    from kernels.swa.decode import window_step

    rows, eps = len(lengths), 1e-6
    sizes = (heads * group * width, heads * width, heads * width)
    x, bias = random(rows, sum(sizes) + 5), 0.1 * random(sum(sizes) + 5)
    norms = (1 + 0.1 * random(width, seed=1), 1 + 0.1 * random(width, seed=2))
    angles = random(rows, width // 2, seed=3)
    cos, sin = (torch.cat([f(angles)] * 2, 1) for f in (torch.cos, torch.sin))
    num_slots = min(max(lengths) + 1, window + sinks)
    ring = random(2, rows, num_slots + 3, heads, width, seed=4)
    for row, length in enumerate(lengths):
        ring[:, row, min(length, window + sinks) :] = float("nan")
    low = [t.to(dtype) for t in (x, bias, *norms, cos, sin, ring)]
    x, bias, *norms_, cos, sin, ring = (t.double() for t in low)
    norms = (norms_[0], norms_[1])
    past = torch.tensor(lengths)

    there = [t.to(DEVICE) for t in low]
    keys, values = there[6][0].contiguous(), there[6][1].contiguous()
    found = window_step(
        there[0], there[1], (there[2], there[3]), there[4], there[5], past.to(DEVICE), keys, values,
        num_heads=heads * group, num_slots=num_slots, window_size=window, num_sinks=sinks,
        eps=(eps, eps),
    )  # fmt: skip

    q, k, v = (x + bias)[:, : sum(sizes)].split(sizes, 1)
    q = formula(q, heads * group, width, norms[0], cos, sin, eps)
    k = formula(k, heads, width, norms[1], cos, sin, eps)
    slots = torch.where(past < sinks, past, sinks + (past - sinks) % window)
    at = torch.arange(rows), slots
    ring[0][at], ring[1][at] = k, v.unflatten(1, (heads, width))
    place = torch.arange(ring.shape[2]).expand(rows, -1)
    last = past[:, None]
    positions = torch.where(place < sinks, place, last - (last - place) % window)
    positions = positions.masked_fill((place > last) | (place >= window + sinks), -1)
    wanted = attention_with_positions(
        q[:, None], ring[0].nan_to_num(), ring[1].nan_to_num(), q_positions=last,
        k_positions=positions, window_size=window, num_sinks=sinks,
    ).flatten(1)  # fmt: skip
    assert (found.cpu().double() - wanted).norm() <= bound * wanted.norm()
    for kept, new in ((keys, ring[0]), (values, ring[1])):
        torch.testing.assert_close(
            kept.cpu().double(), new, atol=10 * bound, rtol=10 * bound, equal_nan=True
        )


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize(("heads", "group", "width"), [(2, 3, 24), (1, 1, 16)])
def test_a_step_sees_window_and_sinks_in_rows_of_any_length(
    heads: int, group: int, width: int
) -> None:
    lengths = [0, 1, 3, 4, 39, 40, 44, 45, 200]  # around s, a split, W + s, and far beyond
    check(lengths, heads, group, width, 41, 4, torch.float32, 1e-5)


def test_splits_cover_all_slots_once() -> None:
    from kernels.swa.decode import splits

    for rows, heads, slots, block in ((1, 8, 4224, 64), (8, 8, 4224, 64), (1, 1, 1, 16)):
        count, share = splits(rows, heads, slots, block)
        assert (count - 1) * share < slots <= count * share
        assert share % block == 0
    assert splits(8, 8, 4224, 64) == (6, 704)  # all run at once, and end together


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 2, 4, 8, 20])
@pytest.mark.parametrize("width", [64, 80, 128, 256])
def test_bfloat16_on_a_gpu_is_within_one_per_cent(group: int, width: int) -> None:
    for window, sinks in ((4096, 128), (1000, 0)):
        check([0, 5, 127, 999, 1001, 5000], 4, group, width, window, sinks, torch.bfloat16, 1e-2)


def compiled(out: Path, dtypes: str, mixers: str) -> list[dict[str, Any]]:
    """In a process of its own, for here Triton may interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    worker = Path(__file__).with_name("hopper_decode.py")
    command = [sys.executable, str(worker), str(out), dtypes, mixers]
    subprocess.run(command, check=True, env=environment)
    found: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    assert len({row["kernel"] for row in found}) == 5
    assert not [row for row in found if row["spilled"] or row["shared"] > SHARED]
    return found


def test_kernels_of_a_decode_step_compile_for_hopper_without_spills(tmp_path: Path) -> None:
    found = compiled(tmp_path / "kernels.json", "bf16", "Qwen3-1.7B,widest")
    shared = {row["kernel"]: row["shared"] for row in found if row["shape"] == "Qwen3-1.7B"}
    assert 3 * shared["window_step_kernel"] <= SHARED  # three programs fit a processor


@pytest.mark.slow
def test_other_widths_and_float32_compile_without_spills_too(tmp_path: Path) -> None:
    compiled(tmp_path / "kernels.json", "bf16,fp32", "Qwen3-1.7B,wide,widest,small")
