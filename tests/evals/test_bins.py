"""Bins cover every value once and never mix both sides of the window."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.bins import bin_edges, bin_index, bin_label, parse_label


def test_edges_are_parts_of_the_window_in_short_documents() -> None:
    assert bin_edges(1024, 128, 16) == list(range(0, 1025, 64))


def test_edges_are_multiples_of_the_window_in_long_documents() -> None:
    assert bin_edges(1000, 100, 4) == [0, 100, 300, 600, 900, 1000]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 500), st.integers(1, 40))
def test_bins_cover_every_value_once_and_split_at_the_window(
    length: int, window: int, bins: int
) -> None:
    edges = bin_edges(length, window, bins)
    assert edges[0] == 0
    assert edges[-1] == length
    assert edges == sorted(set(edges))
    assert window >= length or window in edges
    for value in {0, length - 1, min(window, length - 1), length // 2}:
        index = bin_index(edges, value)
        first, last = parse_label(bin_label(edges, index))
        assert first <= value <= last


@pytest.mark.parametrize("value", [-1, 10])
def test_a_value_outside_the_bins_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match=f"value={value}"):
        bin_index([0, 5, 10], value)


@pytest.mark.parametrize("label", ["64", "a-b", "-1-4"])
def test_a_label_of_another_form_is_refused(label: str) -> None:
    with pytest.raises(ValueError, match="not of the form"):
        parse_label(label)


def test_empty_bins_are_refused() -> None:
    with pytest.raises(ValueError, match="window_size=0"):
        bin_edges(10, 0, 2)
