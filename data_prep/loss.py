"""Which tokens are loss targets."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_prep.config import SourceConfig


def document_mask(
    source: SourceConfig, length: int, response: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """[T] loss mask of a whole document by `source.loss`; `piece_mask` adds the rule of distance.

    Args:
        source: the document's source.
        length: tokens T of the document.
        response: [T] of a conversation: 1 on responses and what ends them.
    """
    if response is None or source.loss == "all":
        return np.ones(length, dtype=np.uint8)
    return response


def piece_mask(source: SourceConfig, mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[T] loss mask of a piece as it stands in a sample, `mask` being its part of the document's.

    A piece is a document of its own for attention and memory, so `loss=beyond` counts positions
    from the piece's begin: its tokens `min_distance` and later may be targets.
    """
    if source.loss != "beyond":
        return mask
    restricted = mask.copy()
    restricted[: source.min_distance] = 0
    return restricted
