"""The launches that write the memory, and what all launches of one call share."""

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
from kernels.ttt_memory.triton_backend import backward as bwd
from kernels.ttt_memory.triton_backend import forward as fwd
from kernels.ttt_memory.triton_backend.blocks import (
    COLUMNS,
    ROWS,
    Blocks,
    blocks_of,
    options,
    rows,
    tiles,
)
from kernels.ttt_memory.triton_backend.plan import ScanPlan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Sizes:
    """H, F, K, C and the tokens' dtype, and what follows from them for the launches."""

    heads: int
    hidden: int
    width: int
    chunk_size: int
    dtype: torch.dtype

    @property
    def all(self) -> tuple[int, int, int]:
        return self.heads, self.hidden, self.width

    @property
    def row_tiles(self) -> int:
        """Blocks of hidden units of an elementwise kernel."""
        return triton.cdiv(self.hidden, ROWS)

    @property
    def num_tiles(self) -> int:
        """Programs of an elementwise kernel for one head."""
        return 2 * self.row_tiles + triton.cdiv(self.width, COLUMNS)

    def blocks(self, kernel: str) -> Blocks:
        return blocks_of(kernel, self.width, self.hidden, self.chunk_size, self.dtype)

    def hidden_blocks(self, kernel: str) -> int:
        return triton.cdiv(self.hidden, self.blocks(kernel).hidden)

    @property
    def read_tokens(self) -> int:
        """Tokens of a block that the reading kernels can take whole."""
        return min(self.blocks(name).tokens for name in ("read_kernel", "read_tokens_kernel"))

    def options(self, kernel: str) -> dict[str, Any]:
        return options(kernel, self.width, self.hidden, self.chunk_size, self.dtype)


@dataclass(frozen=True)
class Call:
    """What all launches of one call share."""

    sizes: Sizes
    chunk_size: int
    clip: float | None
    decay: Tensor
    """[H] float32."""


def mean_mu(mu: Tensor, eta: Tensor, plan: ScanPlan, call: Call) -> tuple[Tensor, Tensor]:
    """Equation (5) for every chunk: the mean, and 1 / the number of its tokens, each [A, H]."""
    heads, count = call.sizes.heads, len(plan.chunks)
    mean, share = mu.new_empty(count, heads), mu.new_empty(count, heads)
    if count:
        fwd.mean_mu_kernel[(count,)](
            mu, eta, plan.chunks, mean, share, call.chunk_size,
            heads, BT=128, BH=triton.next_power_of_2(heads),
        )  # fmt: skip
    return mean, share


def write_chunks(
    k: Tensor, v: Tensor, eta: Tensor, mu: Tensor, w: Tensor, m: Tensor, norms: Tensor,
    plan: ScanPlan, call: Call,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Equations (9) to (11) for all chunks: W, M [S, H, 3, F, K] and scales [S, H, 2 F + K].

    mu [A, H]: of the chunks. Two launches a step and nothing else, where no step is clipped.
    """
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
    steps = shares_buffer(plan, call, "steps_kernel", w)
    for begin, end in pairwise(plan.steps):
        active = end - begin
        splits = steps_of(k, v, eta, states[0], scale, steps, plan, (begin, end), call)
        factor = mu
        if call.clip is not None:
            factor = clip_factor(in_shares(steps, splits, active).sum(0), call.clip)
        fwd.update_kernel[(active * sizes.heads, sizes.num_tiles)](
            states[0], states[1], scale, norms, mu, call.decay, factor, plan.chunks, steps,
            begin, splits, *sizes.all, CLIP=call.clip is not None, **tiles(sizes.width),
        )  # fmt: skip
    return states[0], states[1], scale


def steps_of(
    k: Tensor, v: Tensor, eta: Tensor, w: Tensor, scale: Tensor, steps: Tensor,
    plan: ScanPlan, part: tuple[int, int], call: Call,
) -> int:  # fmt: skip
    """S of equation (10) for the chunks of one step, written to `steps` in the shares returned."""
    sizes, active = call.sizes, part[1] - part[0]
    splits, share = shares(active, call, "steps_kernel")
    fwd.steps_kernel[(active * sizes.heads, sizes.hidden_blocks("steps_kernel"), splits)](
        k, v, eta, w, scale, plan.chunks, steps,
        part[0], call.chunk_size, share, *sizes.all, **sizes.options("steps_kernel"),
    )  # fmt: skip
    return splits


def shares_buffer(plan: ScanPlan, call: Call, kernel: str, like: Tensor) -> Tensor:
    """Room for the shares of any step, [most shares, H, 3, F, K]: each step overwrites the last."""
    counts = {end - begin for begin, end in pairwise(plan.steps)}
    most = max((shares(active, call, kernel)[0] * active for active in counts), default=0)
    return like.new_empty(most, *like.shape[1:])


def in_shares(buffer: Tensor, splits: int, active: int) -> Tensor:
    """What a step left in the buffer, [splits, active, H, 3, F, K]."""
    return buffer[: splits * active].unflatten(0, (splits, active))


def low_weights(
    w: Tensor, scale: Tensor, plan: ScanPlan, call: Call, like: Tensor, *, normalised: bool
) -> Tensor:
    """States in the tokens' dtype [S, H, 3, F, K], or W~ of every chunk [A, H, 3, F, K]."""
    if not normalised and like.dtype == w.dtype:
        return w
    sizes = call.sizes
    count = len(plan.chunks) if normalised else plan.num_slots
    out = w.new_empty(count, *w.shape[1:], dtype=like.dtype)
    if count:
        grid = (count * sizes.heads, sizes.row_tiles)
        bwd.low_weights_kernel[grid](
            w, scale, out, plan.chunks, *sizes.all,
            NORMALISED=normalised, **rows(sizes.width),
        )  # fmt: skip
    return out


def clip_factor(steps: Tensor, clip: float) -> Tensor:
    """min(1, clip / |S|_F) of each matrix, [A, H, 3]."""
    norm = torch.linalg.vector_norm(steps, dim=(-2, -1))
    return (clip / norm.clamp(min=clip)).contiguous()


def shares(active: int, call: Call, kernel: str) -> tuple[int, int]:
    """Into how many shares a chunk's tokens are split to occupy the GPU, and their size."""
    sizes = call.sizes
    tokens = sizes.blocks(kernel).tokens
    most = math.ceil(call.chunk_size / tokens)
    splits = min(most, spare(active * sizes.heads * sizes.hidden_blocks(kernel), call))
    share = math.ceil(most / splits) * tokens
    return math.ceil(call.chunk_size / share), share


def spare(programs: int, call: Call) -> int:
    """How many times as many programs the GPU can run at once, at least 1."""
    if INTERPRETED:
        return 2  # so that tests meet shares
    device = call.decay.device
    return max(1, torch.cuda.get_device_properties(device).multi_processor_count // programs)
