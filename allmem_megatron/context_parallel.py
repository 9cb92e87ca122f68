"""How the tokens of a sequence lie on context-parallel ranks.

Rank r of R holds tokens [r T/R, (r+1) T/R) of every row, or of the one row of packed documents.
Documents may begin and end anywhere; all that ranks need to know of each other follows from T, R
and the documents' bounds, which every rank knows. Lengths and positions are in tokens.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from allmem_megatron.exchange import Exchange

CP_MODES = ("wavefront", "a2a")


@dataclass(frozen=True, kw_only=True)
class ContextShard:
    """The tokens of one context-parallel rank, and its way to the other ranks."""

    exchange: Exchange
    mode: str
    """"wavefront" or "a2a": how the memory crosses ranks."""
    rank: int
    size: int
    """R, the context-parallel ranks."""
    start: int
    stop: int
    """This rank holds tokens [start, stop)."""
    num_tokens: int
    """T, over all ranks."""
    cu_seqlens: Tensor | None
    """int [N + 1] on the CPU: bounds over T of packed documents; None: each row is a document."""

    @classmethod
    def of(
        cls, exchange: Exchange, mode: str, num_tokens: int, cu_seqlens: Tensor | None
    ) -> ContextShard:
        """The shard of the exchange's rank.

        Raises:
            ValueError: T that does not split over the ranks, or an unknown mode.
        """
        if mode not in CP_MODES:
            raise ValueError(f"cp_mode={mode!r} is not known; use one of {', '.join(CP_MODES)}")
        check_splits(num_tokens, exchange.size)
        each = num_tokens // exchange.size
        return cls(
            exchange=exchange,
            mode=mode,
            rank=exchange.rank,
            size=exchange.size,
            start=exchange.rank * each,
            stop=(exchange.rank + 1) * each,
            num_tokens=num_tokens,
            cu_seqlens=cu_seqlens,
        )

    def bounds(self, rank: int) -> tuple[int, int]:
        """[start, stop) of another rank."""
        each = self.num_tokens // self.size
        return rank * each, (rank + 1) * each

    def at(self, rank: int) -> ContextShard:
        """The same split seen from another rank."""
        start, stop = self.bounds(rank)
        return replace(self, rank=rank, start=start, stop=stop)

    @property
    def document_start(self) -> int:
        """Where the document that holds token `start` begins, counted over all ranks."""
        bounds = self._bounds()
        return bounds[bisect_right(bounds, self.start) - 1]

    @property
    def document_stop(self) -> int:
        """Where the document that holds token `stop - 1` ends, counted over all ranks."""
        bounds = self._bounds()
        return bounds[bisect_left(bounds, self.stop)]

    @property
    def continues(self) -> bool:
        """Whether the shard's first document began on an earlier rank."""
        return self.document_start < self.start

    @property
    def leaves(self) -> bool:
        """Whether the shard's last document goes on on the next rank."""
        return self.document_stop > self.stop

    @property
    def local_cu_seqlens(self) -> Tensor | None:
        """Bounds of the documents inside the shard, from 0 to its length; None for plain rows."""
        if self.cu_seqlens is None:
            return None
        inner = sorted({b for b in self._bounds() if self.start < b < self.stop})
        bounds = [0, *(b - self.start for b in inner), self.stop - self.start]
        return torch.tensor(bounds, dtype=self.cu_seqlens.dtype)

    def _bounds(self) -> list[int]:
        return [0, self.num_tokens] if self.cu_seqlens is None else self.cu_seqlens.tolist()


def check_splits(num_tokens: int, size: int, *, parts: int = 1) -> None:
    """Refuses T that is not a multiple of cp (times tp under sequence parallelism).

    Raises:
        ValueError: naming the two numbers and the next length that would do.
    """
    if num_tokens % (size * parts):
        unit = size * parts
        ranks = f"cp={size}" if parts == 1 else f"cp={size} times tp={parts}"
        raise ValueError(
            f"{num_tokens} tokens do not split over {ranks} ranks; set data.seq_length to a"
            f" multiple of {unit}, {-(-num_tokens // unit) * unit} for one"
        )


def take_shard(x: Tensor, rank: int, size: int, *, dim: int = 1) -> Tensor:
    """This rank's tokens of x [B, T, ...], [B, T / size, ...].

    Raises: ValueError if T does not split over the ranks.
    """
    check_splits(x.shape[dim], size)
    each = x.shape[dim] // size
    return x.narrow(dim, rank * each, each)
