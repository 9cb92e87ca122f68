"""The forward launches of the memory's kernels, and what all launches of one call share."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.ttt_memory.reference import NORM_EPS
from kernels.ttt_memory.triton_backend import forward as fwd
from kernels.ttt_memory.triton_backend.blocks import (
    COLUMNS,
    ROWS,
    Blocks,
    blocks_of,
    options,
    tiles,
)
from kernels.ttt_memory.triton_backend.plan import ScanPlan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Sizes:
    """H, F and K, and what follows from them for the launches."""

    heads: int
    hidden: int
    width: int

    @property
    def all(self) -> tuple[int, int, int]:
        return self.heads, self.hidden, self.width

    @property
    def num_tiles(self) -> int:
        """Programs of an elementwise kernel for one head."""
        return 2 * triton.cdiv(self.hidden, ROWS) + triton.cdiv(self.width, COLUMNS)

    def blocks(self, kernel: str) -> Blocks:
        return blocks_of(kernel, self.width, self.hidden)

    def hidden_blocks(self, kernel: str) -> int:
        return triton.cdiv(self.hidden, self.blocks(kernel).hidden)

    def options(self, kernel: str, x: Tensor) -> dict[str, Any]:
        return options(kernel, self.width, self.hidden, x.dtype)


@dataclass(frozen=True)
class Call:
    """What all launches of one call share."""

    sizes: Sizes
    chunk_size: int
    clip: float | None
    decay: Tensor
    """[H] float32."""


def write_chunks(
    k: Tensor, v: Tensor, eta: Tensor, mu: Tensor, w: Tensor, m: Tensor, norms: Tensor,
    plan: ScanPlan, call: Call,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Equations (9) to (11) for all chunks: W, M [S, H, 3, F, K] and scales [S, H, 2 F + K]."""
    sizes = call.sizes
    count = len(plan.initial_rows)
    states = [x.new_empty(plan.num_slots, *x.shape[1:], dtype=torch.float32) for x in (w, m)]
    scale = norms.new_empty(plan.num_slots, *norms.shape)
    states[0][:count], states[1][:count] = w, m
    lengths = torch.cat(
        [
            torch.linalg.vector_norm(w[:, :, :2], dim=-1).flatten(2),
            torch.linalg.vector_norm(w[:, :, 2], dim=-2),
        ],
        -1,
    )
    scale[:count] = norms / (lengths + NORM_EPS)
    for begin, end in pairwise(plan.steps):
        chunks, active = plan.chunks[begin:end], end - begin
        steps, splits = steps_of(k, v, eta, states[0], scale, chunks, call)
        factor = clip_factor(steps.sum(0), call.clip) if call.clip is not None else mu
        fwd.update_kernel[(active * sizes.heads, sizes.num_tiles)](
            states[0], states[1], scale, norms, mu[begin:end], call.decay, factor, chunks, steps,
            splits, *sizes.all, CLIP=call.clip is not None, **tiles(sizes.width),
        )  # fmt: skip
    return states[0], states[1], scale


def steps_of(
    k: Tensor, v: Tensor, eta: Tensor, w: Tensor, scale: Tensor, chunks: Tensor, call: Call
) -> tuple[Tensor, int]:
    """S of equation (10) for chunks of one step, in shares [splits, active, H, 3, F, K]."""
    sizes, active = call.sizes, len(chunks)
    splits, share = shares(active, call, "steps_kernel")
    steps = w.new_empty(splits, active, *w.shape[1:])
    fwd.steps_kernel[(active * sizes.heads, sizes.hidden_blocks("steps_kernel"), splits)](
        k, v, eta, w, scale, chunks, steps,
        call.chunk_size, share, *sizes.all, **sizes.options("steps_kernel", k),
    )  # fmt: skip
    return steps, splits


def clip_factor(steps: Tensor, clip: float) -> Tensor:
    """min(1, clip / |S|_F) of each matrix, [A, H, 3]."""
    norm = torch.linalg.vector_norm(steps, dim=(-2, -1))
    return (clip / norm.clamp(min=clip)).contiguous()


def shares(active: int, call: Call, kernel: str) -> tuple[int, int]:
    """Into how many shares a chunk's tokens are split to occupy the GPU, and their size."""
    sizes = call.sizes
    programs = active * sizes.heads * sizes.hidden_blocks(kernel)
    if INTERPRETED:
        wanted = 2 * programs
    else:
        device = call.decay.device
        wanted = torch.cuda.get_device_properties(device).multi_processor_count
    tokens = sizes.blocks(kernel).tokens
    most = math.ceil(call.chunk_size / tokens)
    splits = max(1, min(most, wanted // programs))
    share = math.ceil(most / splits) * tokens
    return math.ceil(call.chunk_size / share), share
