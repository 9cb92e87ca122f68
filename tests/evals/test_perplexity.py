"""Losses add up in bins as they do in one list."""

import math
import random

import pytest

from evals.perplexity import LossBins, merged, perplexity


def test_means_equal_those_of_the_plain_list() -> None:
    rng = random.Random(0)
    losses = [rng.uniform(0, 5) for _ in range(37)]
    mask = [rng.random() < 0.7 for _ in losses]
    bins = LossBins(edges=[0, 5, 10, 20, 40])
    bins.add(losses, mask)
    counted = [(t, loss) for t, loss in enumerate(losses) if mask[t]]
    beyond = [loss for t, loss in counted if t >= 10]
    assert bins.mean() == pytest.approx(sum(loss for _, loss in counted) / len(counted))
    assert bins.mean(start=10) == pytest.approx(sum(beyond) / len(beyond))
    third = [loss for t, loss in counted if 10 <= t < 20]
    assert bins.loss_by_position()["10-19"] == pytest.approx(sum(third) / len(third))
    assert bins.perplexity_by_position()["10-19"] == pytest.approx(
        math.exp(sum(third) / len(third))
    )


def test_merged_parts_equal_the_whole() -> None:
    parts = [LossBins(edges=[0, 2, 4]) for _ in range(2)]
    parts[0].add([1.0, 2.0, 3.0])
    parts[1].add([5.0, 6.0, 7.0, 8.0])
    total = merged(parts, [0, 2, 4])
    assert total.sums == [14.0, 18.0]
    assert total.counts == [4, 3]
    assert parts[0].counts == [2, 1]


def test_an_empty_bin_is_left_out_and_nothing_has_no_mean() -> None:
    bins = LossBins(edges=[0, 2, 4])
    assert bins.mean() is None
    bins.add([1.0])
    assert bins.loss_by_position() == {"0-1": 1.0}
    assert bins.mean(start=2) is None
    assert bins.mean(start=9) is None


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused_unless_masked(loss: float) -> None:
    bins = LossBins(edges=[0, 4])
    bins.add([1.0, loss], [True, False])
    with pytest.raises(ValueError, match="at position 1"):
        bins.add([1.0, loss])


def test_bins_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not add up"):
        LossBins(edges=[0, 2]).merge(LossBins(edges=[0, 3]))
    with pytest.raises(ValueError, match="no edge"):
        LossBins(edges=[0, 4]).mean(start=2)
    with pytest.raises(ValueError, match="1 mask"):
        LossBins(edges=[0, 4]).add([1.0, 2.0], [True])


def test_perplexity_overflows_to_infinity() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1e4) == math.inf
