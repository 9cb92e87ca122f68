"""What stands around the memory's scan: fused kernels, plain PyTorch, and compiled by PyTorch.

Equations (2), (3), (12) and alpha of (1) of arXiv 2602.13680: `conv` is convolution and norms of
the queries, `gate` norm and gate of what was read, `add` the sum with the window's output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import floors
from benchmarks.contest import BOUNDS, NEEDS_CUDA, Contender, Contest, Leaves
from benchmarks.mixer_case import EPS
from benchmarks.rows import Row
from benchmarks.shapes import Shape
from kernels.ttt_memory import fused

PIECES = ("conv", "gate", "add")
_CHECK = 8192


def make_piece(
    piece: str,
    case: Row,
    shape: Shape,
    draw: Any,
    dtype: torch.dtype,
    backward: bool,
    compiled: bool,
) -> Contest:
    """Inputs and versions of one of `PIECES`."""
    batch, tokens = case["batch"], case["tokens"]
    heads, head = shape.memory_heads, shape.memory_head_dim
    if piece == "conv":
        leaves = {
            "x": draw(batch, tokens, shape.memory_size),
            "weight": 0.5 * draw(shape.memory_size, 4),
            "norm": 1 + 0.1 * draw(head),
        }
    elif piece == "gate":
        leaves = {
            "x": draw(batch, tokens, heads, head),
            "norm": 1 + 0.1 * draw(head),
            "gate": draw(batch, tokens, heads),
        }
    else:
        leaves = {
            "x": draw(batch, tokens, shape.hidden_size),
            "base": draw(batch, tokens, shape.hidden_size),
            "alpha": draw(shape.hidden_size),
        }
    leaves = {name: x.to(dtype) for name, x in leaves.items()}
    cuda, element = leaves["x"].is_cuda, leaves["x"].element_size()
    plain = partial(run_piece, piece=piece, heads=heads, backend="reference")
    triton = partial(run_piece, piece=piece, heads=heads, backend="triton")
    by_compiler = partial(_compiled, piece=piece, heads=heads)
    versions = (
        ("triton", triton, "" if cuda else NEEDS_CUDA),
        ("plain", plain, ""),
        ("plain, compiled", by_compiler, "" if compiled else "left out by --no-compile"),
    )
    contenders = [
        Contender(
            name=name,
            run=run,
            reference=plain,
            work=floors.piece(piece, shape, batch, tokens, element, backward=backward),
            bound=BOUNDS[dtype],
            check_tokens=_CHECK if backward else tokens,
            unavailable=unavailable,
        )
        for name, run, unavailable in versions
    ]
    return Contest(
        case=case,
        leaves=leaves,
        along=frozenset(("x", "base", "gate")) & frozenset(leaves),
        wanted=tuple(leaves) if backward else (),
        contenders=contenders,
    )


def run_piece(leaves: Leaves, *, piece: str, heads: int, backend: str) -> Tensor:
    """The piece, `[B, T, ...]`."""
    x = leaves["x"]
    if piece == "conv":
        return fused.conv_heads(
            x, leaves["weight"], heads, norm=leaves["norm"], eps=EPS, backend=backend
        )
    if piece == "gate":
        return fused.gated_output(x, leaves["norm"], leaves["gate"], EPS, backend=backend)
    return fused.add_scaled(leaves["base"], leaves["alpha"], x, backend=backend)


@cache
def _compile() -> Callable[..., Any]:
    return torch.compile(partial(run_piece, backend="reference"), dynamic=False)


def _compiled(leaves: Leaves, *, piece: str, heads: int) -> Tensor:
    out: Tensor = _compile()(leaves, piece=piece, heads=heads)
    return out
