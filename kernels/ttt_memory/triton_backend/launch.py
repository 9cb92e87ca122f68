"""The launches that write the memory, and what all launches of one call share."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

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
    processors: int
    """Of the GPU."""


class Step(NamedTuple):
    """Chunks begin … end - 1 of a plan, and the shares that their tokens are split into."""

    begin: int
    end: int
    splits: int
    share: int
    """Tokens of a share."""

    @property
    def active(self) -> int:
        return self.end - self.begin


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
    walk = steps_in_shares(plan, call, "steps_kernel")
    steps = shares_buffer(walk, w)
    options, tile = sizes.options("steps_kernel"), tiles(sizes.width)
    clips, factor = call.clip is not None, mu
    for step in walk:
        steps_of(k, v, eta, states[0], scale, steps, plan, step, call, options)
        if call.clip is not None:
            factor = clip_factor(in_shares(steps, step).sum(0), call.clip)
        fwd.update_kernel[(step.active * sizes.heads, sizes.num_tiles)](
            states[0], states[1], scale, norms, mu, call.decay, factor, plan.chunks, steps,
            step.begin, step.splits, *sizes.all, CLIP=clips, **tile,
        )  # fmt: skip
    return states[0], states[1], scale


def steps_of(
    k: Tensor, v: Tensor, eta: Tensor, w: Tensor, scale: Tensor, steps: Tensor,
    plan: ScanPlan, step: Step, call: Call, options: dict[str, Any],
) -> None:  # fmt: skip
    """S of equation (10) for the chunks of one step, written to `steps` in shares."""
    sizes = call.sizes
    hidden_blocks = triton.cdiv(sizes.hidden, options["BF"])
    fwd.steps_kernel[(step.active * sizes.heads, hidden_blocks, step.splits)](
        k, v, eta, w, scale, plan.chunks, steps,
        step.begin, call.chunk_size, step.share, *sizes.all, **options,
    )  # fmt: skip


def steps_in_shares(plan: ScanPlan, call: Call, kernel: str) -> list[Step]:
    """The steps of a plan, split so that each launch of `kernel` occupies the GPU."""
    active = {end - begin for begin, end in pairwise(plan.steps)}
    cuts = {number: shares(number, call, kernel) for number in active}
    return [Step(begin, end, *cuts[end - begin]) for begin, end in pairwise(plan.steps)]


def shares_buffer(walk: list[Step], like: Tensor) -> Tensor:
    """Room for the shares of any step, [most shares, H, 3, F, K]: each step overwrites the last."""
    most = max((step.splits * step.active for step in walk), default=0)
    return like.new_empty(most, *like.shape[1:])


def in_shares(buffer: Tensor, step: Step) -> Tensor:
    """What a step left in the buffer, [splits, active, H, 3, F, K]."""
    return buffer[: step.splits * step.active].unflatten(0, (step.splits, step.active))


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
    return 2 if INTERPRETED else max(1, call.processors // programs)  # 2: so that tests meet shares
