"""Standard errors by bootstrap, and scores in bins of length, distance and depth."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

Aggregate = Callable[[Sequence[float]], float]
DEPTHS = 5
"""Bins of depth in a document."""


def bootstrap_stderr(
    scores: Sequence[float], aggregate: Aggregate, *, resamples: int, seed: int
) -> float:
    """Standard deviation of an aggregate over resamplings of the examples, with replacement.

    Args:
        scores: one for each example (the mean of its samplings).
        aggregate: the data set's score from them.
        resamples: how often; 0 gives 0.
        seed: of the choice, so that the same scores give the same number.
    """
    if len(scores) < 2 or resamples < 2:
        return 0.0
    values = np.asarray(scores, dtype=np.float64)
    rng = np.random.default_rng(seed)
    drawn = [
        aggregate(values[rng.integers(0, len(values), len(values))].tolist())
        for _ in range(resamples)
    ]
    return statistics.stdev(drawn)


def length_bins(lengths: Iterable[int]) -> list[int]:
    """Edges at powers of two that hold all lengths: `[1024, 2048, 4096]`."""
    given = list(lengths)
    if not given:
        return []
    low, high = max(min(given), 1), max(given)
    edge = 1 << (low.bit_length() - 1)
    edges = [edge]
    while edges[-1] <= high:
        edges.append(edges[-1] * 2)
    return edges


def binned(
    places: Sequence[int | None],
    scores: Sequence[float],
    edges: Sequence[int],
    aggregate: Aggregate,
) -> dict[str, float]:
    """Aggregates of the examples between edges, `{"1024-2047": 41.2}`; empty bins are left out."""
    groups: dict[int, list[float]] = {}
    for place, score in zip(places, scores, strict=True):
        if place is None or not edges or not edges[0] <= place < edges[-1]:
            continue
        index = int(np.searchsorted(np.asarray(edges), place, side="right")) - 1
        groups.setdefault(index, []).append(score)
    return {f"{edges[i]}-{edges[i + 1] - 1}": aggregate(groups[i]) for i in sorted(groups)}


def by_length_and_depth(
    lengths: Sequence[int | None],
    depths: Sequence[float | None],
    scores: Sequence[float],
    aggregate: Aggregate,
) -> dict[str, float]:
    """Cells of a needle map, `{"4096@0.1": 100.0}`: length and middle of the bin of depth."""
    cells: dict[tuple[int, int], list[float]] = {}
    for length, depth, score in zip(lengths, depths, scores, strict=True):
        if length is None or depth is None:
            continue
        index = min(int(depth * DEPTHS), DEPTHS - 1)
        cells.setdefault((length, index), []).append(score)
    return {
        f"{length}@{(index + 0.5) / DEPTHS:.2f}": aggregate(cells[length, index])
        for length, index in sorted(cells)
    }


def means(samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Mean over the samplings of each example."""
    return {name: statistics.fmean(values) for name, values in samples.items()}
