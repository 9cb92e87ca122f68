"""Next-token loss by position: sums and counts in bins, so that parts add up exactly.

The loss at query position t is `-log p(token[t + 1] | tokens[0..t])`, in nats. "Beyond the window"
means t >= W: the first positions at which sliding-window attention has lost sight of a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from evals.bins import bin_index, bin_label


@dataclass(kw_only=True)
class LossBins:
    """Sum of losses and number of tokens in each bin of query positions."""

    edges: list[int]
    """k + 1 increasing edges; bin i holds positions `edges[i] <= t < edges[i + 1]`."""
    sums: list[float] = field(default_factory=list)
    """Nats, one per bin."""
    counts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start at zero where no sums are given."""
        self.sums = self.sums or [0.0] * (len(self.edges) - 1)
        self.counts = self.counts or [0] * (len(self.edges) - 1)

    def add(self, losses: Sequence[float], mask: Sequence[bool] | None = None) -> None:
        """Add a document's losses; `losses[t]` belongs to query position t.

        Raises:
            ValueError: a loss that counts is NaN or infinite, or the lengths differ.
        """
        if mask is not None and len(mask) != len(losses):
            raise ValueError(f"{len(mask)} mask values for {len(losses)} losses; give one each")
        for position, loss in enumerate(losses):
            if mask is not None and not mask[position]:
                continue
            if not math.isfinite(loss):
                raise ValueError(
                    f"loss={loss} at position {position} is not finite; "
                    "look for overflow in the model, or evaluate in float32"
                )
            index = bin_index(self.edges, position)
            self.sums[index] += loss
            self.counts[index] += 1

    def merge(self, other: LossBins) -> None:
        """Add another's sums and counts.

        Raises:
            ValueError: the edges differ.
        """
        if self.edges != other.edges:
            raise ValueError(
                f"bins with edges {self.edges} and {other.edges} do not add up; use the same edges"
            )
        self.sums = [mine + theirs for mine, theirs in zip(self.sums, other.sums, strict=True)]
        self.counts = [
            mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)
        ]

    def mean(self, *, start: int = 0) -> float | None:
        """Mean loss in nats over the bins from position `start` on; None if they hold nothing.

        Raises:
            ValueError: `start` is no edge, so that a bin would be cut.
        """
        if start not in self.edges and start < self.edges[-1]:
            raise ValueError(f"start={start} is no edge of {self.edges}; make it one")
        chosen = [i for i, edge in enumerate(self.edges[:-1]) if edge >= start]
        count = sum(self.counts[i] for i in chosen)
        return sum(self.sums[i] for i in chosen) / count if count else None

    def loss_by_position(self) -> dict[str, float]:
        """Mean loss of each bin that holds anything, in nats, by label such as `"64-127"`."""
        return {
            bin_label(self.edges, i): self.sums[i] / count
            for i, count in enumerate(self.counts)
            if count
        }

    def perplexity_by_position(self) -> dict[str, float]:
        """exp of `loss_by_position`."""
        return {label: perplexity(loss) for label, loss in self.loss_by_position().items()}


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700.0 else math.inf


def merged(bins: Iterable[LossBins], edges: list[int]) -> LossBins:
    """The sum of several, with the given edges; zero if there are none."""
    total = LossBins(edges=edges)
    for part in bins:
        total.merge(part)
    return total
