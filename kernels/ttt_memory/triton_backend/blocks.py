"""Sizes of the kernels' blocks, by head width, dtype and chunk length.

Chosen without a GPU, from what the compiler says for Hopper: no register spilled to memory, shared
memory that fits, tensor-core products (`wgmma`) up to head width 128, and the largest blocks that
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


# by the head width, rounded up to a power of two; for 16-bit inputs
BLOCKS: dict[str, dict[int, Blocks]] = {
    "steps_kernel": {
        32: Blocks(64, 32, 4, 3), 64: Blocks(64, 32, 4, 3),
        128: Blocks(64, 32, 8, 3), 256: Blocks(32, 16, 8, 2),
    },
    "read_kernel": {
        32: Blocks(128, 64, 8, 2), 64: Blocks(128, 64, 8, 2),
        128: Blocks(128, 64, 8, 2), 256: Blocks(128, 16, 8, 2),
    },
    "read_tokens_kernel": {
        32: Blocks(128, 64, 8, 2), 64: Blocks(128, 32, 8, 2),
        128: Blocks(128, 32, 8, 2), 256: Blocks(128, 16, 8, 2),
    },
    "read_weights_kernel": {
        32: Blocks(64, 32, 4, 2), 64: Blocks(64, 32, 4, 2),
        128: Blocks(64, 32, 8, 2), 256: Blocks(32, 16, 8, 2),
    },
    "steps_weights_kernel": {
        32: Blocks(64, 16, 4, 2), 64: Blocks(64, 32, 8, 2),
        128: Blocks(64, 16, 8, 2), 256: Blocks(32, 16, 8, 2),
    },
    "steps_tokens_kernel": {
        32: Blocks(128, 16, 8, 2), 64: Blocks(128, 16, 8, 2),
        128: Blocks(128, 16, 8, 2), 256: Blocks(32, 16, 8, 2),
    },
}  # fmt: skip
APART = 128
"""The padded head width at which dK and dV take a walk each: the registers of one do not hold both
beside tensor-core products (at 256 the blocks are too small for those anyway)."""


def padded(size: int) -> int:
    """Rounded up to a power of two, 16 at least; BK of the head width."""
    return max(16, triton.next_power_of_2(size))


def blocks_of(kernel: str, width: int, hidden: int, chunk_size: int, dtype: torch.dtype) -> Blocks:
    """The blocks of a kernel.

    Args:
        kernel: its name.
        width: K.
        hidden: F.
        chunk_size: C; no block is larger than its power of two.
        dtype: of the tokens.

    Raises:
        ValueError: heads wider than 256.
    """
    wide = padded(width)
    if wide > 256:
        raise ValueError(
            f"memory heads of width {width} exceed 256, the widest of backend='triton'; set "
            "mixer.memory.num_heads higher, or backend='reference'"
        )
    found = BLOCKS[kernel][max(32, wide)]
    most = padded(chunk_size)
    if dtype == torch.float32:  # no tensor cores: products unroll, and registers fill
        most = min(most, 32)
        found = found._replace(hidden=16, stages=1)
    if wide == 256 and most < found.tokens:
        most = min(most, 32)
    if most < found.tokens:
        found = found._replace(tokens=most)
    if most < 64 and wide < 256:  # too short for tensor-core products of a warp group
        found = found._replace(hidden=16, warps=4)
    return found._replace(hidden=min(found.hidden, padded(hidden)))


def options(
    kernel: str, width: int, hidden: int, chunk_size: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Keyword arguments of a launch."""
    blocks = blocks_of(kernel, width, hidden, chunk_size, dtype)
    found = {
        "BT": blocks.tokens,
        "BF": blocks.hidden,
        "BK": padded(width),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
    if kernel == "steps_tokens_kernel":
        found["APART"] = padded(width) == APART and dtype != torch.float32
    return found


ROWS = COLUMNS = 16
"""Rows, or columns, of a program of the elementwise kernels."""


def rows(width: int) -> dict[str, int]:
    """Keyword arguments of an elementwise launch that takes rows of all three matrices."""
    return {"BF": ROWS, "BK": padded(width), "num_warps": 8}


def tiles(width: int) -> dict[str, int]:
    """Keyword arguments of a launch of an elementwise kernel."""
    return {"BR": ROWS, "BC": COLUMNS, "BF": 32, "BK": padded(width)}
