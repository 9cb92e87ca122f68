"""One training sample: a fixed-length row of tokens with its loss mask and document borders.

Shape letters: `T` tokens of the sample, `N` documents packed into it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

KINDS = ("text", "recall", "repeat", "chat")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A row of exactly `T` tokens, as a shard stores it and the loader gives it back."""

    tokens: NDArray[np.int32]
    """[T] token ids; the tail past `cu_seqlens[-2]` may be padding (see `meta["num_padding"]`)."""
    loss_mask: NDArray[np.uint8]
    """[T]; 1 where the token **at this index** is a loss target (predicted from the one before)."""
    cu_seqlens: NDArray[np.int32]
    """[N+1] borders of the documents, from 0 to T; padding, if any, is the last segment."""
    meta: dict[str, Any] = field(default_factory=dict)
    """`kind`, `source`, `ids`, `queries` (token spans), `num_padding`; JSON-serialisable."""

    def __post_init__(self) -> None:
        length = len(self.tokens)
        if self.loss_mask.shape != (length,):
            raise ValueError(
                f"loss_mask has shape {self.loss_mask.shape}; it must be ({length},) like tokens"
            )
        borders = self.cu_seqlens
        if len(borders) < 2 or borders[0] != 0 or borders[-1] != length:
            raise ValueError(
                f"cu_seqlens={borders.tolist()} must run from 0 to {length}; rebuild the sample"
            )
        if np.any(np.diff(borders) <= 0):
            raise ValueError(f"cu_seqlens={borders.tolist()} must grow strictly")
        if self.meta.get("kind") not in KINDS:
            raise ValueError(f"kind={self.meta.get('kind')!r} is not one of {', '.join(KINDS)}")

    @property
    def kind(self) -> str:
        """`text`, `recall`, `repeat` or `chat`."""
        return str(self.meta["kind"])
