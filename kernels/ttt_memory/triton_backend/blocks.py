"""Sizes of the kernels' blocks, by head width.

Chosen without a GPU, from what the compiler says for Hopper in bfloat16: tensor-core products
(`wgmma`), no register spilled to memory up to width 64 (the paper's), and the largest blocks that
allow it. `tests/kernels/test_triton_compiles.py` holds the kernels to that. Not timed yet.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton


class Blocks(NamedTuple):
    """Of one kernel."""

    tokens: int
    """BT, tokens of a product."""
    hidden: int
    """BF, hidden units of a product."""
    warps: int
    stages: int


# by the head width, rounded up to a power of two
BLOCKS: dict[str, dict[int, Blocks]] = {
    "steps_kernel": {
        64: Blocks(64, 32, 4, 2), 128: Blocks(64, 32, 8, 2), 256: Blocks(32, 16, 8, 2),
    },
    "read_kernel": {
        64: Blocks(64, 64, 4, 2), 128: Blocks(64, 32, 4, 2), 256: Blocks(32, 16, 8, 1),
    },
    "read_tokens_kernel": {
        64: Blocks(64, 32, 4, 2), 128: Blocks(64, 32, 4, 2), 256: Blocks(32, 16, 8, 1),
    },
    "read_weights_kernel": {
        64: Blocks(64, 32, 4, 2), 128: Blocks(64, 32, 8, 2), 256: Blocks(32, 16, 8, 2),
    },
    "steps_weights_kernel": {
        64: Blocks(64, 32, 8, 2), 128: Blocks(64, 16, 4, 2), 256: Blocks(32, 16, 8, 1),
    },
    "steps_tokens_kernel": {
        64: Blocks(64, 16, 4, 1), 128: Blocks(32, 16, 8, 1), 256: Blocks(32, 16, 8, 1),
    },
}  # fmt: skip


def padded(width: int) -> int:
    """BK: the head width rounded up to a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(width))


def blocks_of(kernel: str, width: int, hidden: int) -> Blocks:
    """The blocks of a kernel for heads of some width and hidden width.

    Raises:
        ValueError: heads wider than 256.
    """
    wide = padded(width)
    if wide > 256:
        raise ValueError(
            f"memory heads of width {width} exceed 256, the widest of backend='triton'; set "
            "mixer.memory.num_heads higher, or backend='reference'"
        )
    found = BLOCKS[kernel][max(64, wide)]
    return found._replace(hidden=min(found.hidden, padded(hidden)))


def options(kernel: str, width: int, hidden: int, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of a launch."""
    blocks = blocks_of(kernel, width, hidden)
    return {
        "BT": blocks.tokens,
        "BF": blocks.hidden,
        "BK": padded(width),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


ROWS = COLUMNS = 16
"""Rows, or columns, of a program of the elementwise kernels."""


def tiles(width: int) -> dict[str, int]:
    """Keyword arguments of a launch of an elementwise kernel."""
    return {"BR": ROWS, "BC": COLUMNS, "BF": 32, "BK": padded(width)}
