"""How the tokens of a sequence lie on context-parallel ranks.

Rank r of R holds tokens [r T/R, (r+1) T/R) of every row, or of the one row of packed documents.
Documents may begin and end anywhere; all that ranks need to know of each other follows from T, R
and the documents' bounds, which every rank knows. Lengths and positions are in tokens.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from allmem_megatron.exchange import Exchange, Key

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
    """Refuses T that does not split over cp = `size` ranks, or those times tp = `parts`.

    Raises:
        ValueError: naming the numbers and the next length that would do.
    """
    unit = size * parts
    if num_tokens % unit:
        ranks = " times ".join(f"{n}={k}" for n, k in (("cp", size), ("tp", parts)) if k > 1)
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


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return _sum(grad, ctx.group), None


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of all ranks' x; every rank's x gets the sum of the gradients of all ranks' results.

    For a loss that is a function of sums over all tokens: each rank makes its part of the loss of
    the same sum, and the parts' gradients add up.
    """
    total: Tensor = _SumOverRanks.apply(x, group)
    return total


def by_heads(
    function: Callable[..., Tensor], streams: Sequence[Tensor], shard: ContextShard, key: Key
) -> Tensor:
    """Every token of some heads instead of some tokens of every head; `function`; and back.

    Args:
        function: (each stream [B, R T, H / R, E_i]) -> out [B, R T, H / R, K].
        streams: [B, T, H, E_i] with H a multiple of R; those of one dtype travel together.
        shard: where the tokens lie.
        key: names the messages, (layer, what).

    Returns:
        out [B, T, H, K].
    """
    whole: list[Tensor | None] = [None] * len(streams)
    for dtype in dict.fromkeys(x.dtype for x in streams):
        places = [i for i, x in enumerate(streams) if x.dtype == dtype]
        joined = torch.cat([streams[i] for i in places], -1)
        # [B, T, R h, E] -> [R, B, T, h, E]: slice r goes to rank r
        parts = joined.unflatten(2, (shard.size, -1)).movedim(2, 0)
        came = shard.exchange.all_to_all((*key, "heads", str(dtype)), parts.contiguous())
        # [R, B, T, h, E], slice r holds rank r's tokens -> [B, R T, h, E]
        tokens = came.movedim(0, 1).flatten(1, 2)
        pieces = tokens.split([streams[i].shape[-1] for i in places], -1)
        for i, piece in zip(places, pieces, strict=True):
            whole[i] = piece
    out = function(*whole)
    # [B, R T, h, K] -> [R, B, T, h, K] -> [B, T, R h, K]
    parts = out.unflatten(1, (shard.size, -1)).movedim(1, 0)
    back = shard.exchange.all_to_all((*key, "tokens"), parts.contiguous())
    return back.movedim(0, 2).flatten(2, 3)
