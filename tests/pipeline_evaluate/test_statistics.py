"""Errors by bootstrap and scores in bins, against what can be computed otherwise."""

import random
import statistics

import pytest

from pipeline.evaluating.statistics import (
    binned,
    bootstrap_stderr,
    by_length_and_depth,
    length_bins,
)


def percent(scores):
    return 100 * sum(scores) / len(scores)


def test_the_bootstrap_error_of_a_mean_is_its_standard_error() -> None:
    rng = random.Random(3)
    scores = [float(rng.random() < 0.3) for _ in range(400)]
    error = bootstrap_stderr(scores, percent, resamples=2000, seed=1)
    assert error == pytest.approx(100 * statistics.pstdev(scores) / 20, rel=0.06)
    assert bootstrap_stderr(scores, percent, resamples=2000, seed=1) == error
    assert bootstrap_stderr([1.0], percent, resamples=2000, seed=1) == 0.0
    assert bootstrap_stderr([1.0] * 9, percent, resamples=100, seed=1) == 0.0


def test_bins_hold_every_example_once() -> None:
    lengths = [100, 127, 128, 500, 4096, None]
    edges = length_bins([100, 127, 128, 500, 4096])
    assert edges[0] <= 100
    assert edges[-1] > 4096
    found = binned(lengths, [1.0, 0.0, 1.0, 0.0, 1.0, 1.0], edges, percent)
    assert found == {"64-127": 50.0, "128-255": 100.0, "256-511": 0.0, "4096-8191": 100.0}
    assert length_bins([]) == []
    assert binned([3], [1.0], [], percent) == {}


def test_needle_cells_are_length_by_depth() -> None:
    cells = by_length_and_depth(
        [512, 512, 1024, 1024], [0.0, 0.05, 1.0, None], [1.0, 0.0, 1.0, 0.0], percent
    )
    assert cells == {"512@0.10": 50.0, "1024@0.90": 100.0}
