"""Attention of shards equals attention of the whole, outputs and gradients, in float64."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TOLERANCE = 1e-11


def check(ranks: Any, **case: Any) -> None:
    case = {"mode": "wavefront", "rows": 1, "heads": (4, 2), "bounds": None, **case}
    for name, deviation in ranks.run("attention", **case)[0].items():
        assert deviation < TOLERANCE, (name, deviation)


@pytest.mark.parametrize(
    ("tokens_each", "window_size", "num_sinks"),
    [
        (10, 4, 0),
        (10, 4, 2),  # sinks far before
        (10, 12, 3),  # sinks in the halo, for rank 1
        (3, 8, 2),  # a window over several ranks
        (3, 5, 7),  # sinks on several ranks, and inside a shard
        (2, 100, 3),  # a window over everything
        (1, 2, 1),
        (10, 1, 0),  # a token sees itself only
        (10, 1, 4),
        (40, 33, 5),
    ],
)
@pytest.mark.parametrize("cp", [2, 4])
def test_window_over_ranks_equals_one_rank(cp, tokens_each, window_size, num_sinks, ranks):
    sizes = {"window_size": window_size, "num_sinks": num_sinks}
    check(ranks, cp=cp, tokens_each=tokens_each, rows=2, **sizes)


@pytest.mark.parametrize(
    "bounds",
    [
        [0, 24],
        [0, 6, 12, 24],  # on the borders
        [0, 5, 7, 24],
        [0, 1, 23, 24],
        [0, 12, 12, 13, 24],  # an empty document, on a border
        list(range(25)),
    ],
    ids=str,
)
@pytest.mark.parametrize("window_size", [3, 9, None])
@pytest.mark.parametrize("mode", ["wavefront", "a2a"])
def test_packed_documents_over_ranks_do_not_see_each_other(mode, window_size, bounds, ranks):
    sizes = {"window_size": window_size, "num_sinks": 2, "heads": (8, 4)}
    check(ranks, cp=4, tokens_each=6, mode=mode, bounds=bounds, **sizes)


@pytest.mark.parametrize(
    ("cp", "mode", "heads"),
    [
        (2, "wavefront", (2, 2)),
        (4, "wavefront", (6, 2)),
        (2, "a2a", (6, 2)),
        (4, "a2a", (4, 4)),
        (4, "a2a", (4, 2)),  # heads that do not split: keys are gathered
    ],
)
@pytest.mark.parametrize("rows", [1, 2])
def test_full_attention_over_ranks_equals_one_rank(cp, mode, heads, rows, ranks):
    sizes = {"window_size": None, "num_sinks": 0}
    check(ranks, cp=cp, mode=mode, heads=heads, rows=rows, tokens_each=7, **sizes)


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    cp = draw(st.sampled_from([2, 4]))
    tokens_each = draw(st.integers(1, 9))
    num_tokens = cp * tokens_each
    packed = draw(st.booleans())
    inner = draw(st.lists(st.integers(0, num_tokens), max_size=6)) if packed else []
    return {
        "cp": cp,
        "tokens_each": tokens_each,
        "mode": draw(st.sampled_from(["wavefront", "a2a"])),
        "rows": 1 if packed else draw(st.integers(1, 2)),
        "heads": draw(st.sampled_from([(4, 2), (4, 4), (3, 1)])),
        "window_size": draw(st.none() | st.integers(1, num_tokens + 2)),
        "num_sinks": draw(st.integers(0, num_tokens + 1)),
        "bounds": [0, *sorted(inner), num_tokens] if packed else None,
    }


def check_drawn(ranks: Any, examples: int) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(layouts())
    def any_layout(case: dict[str, Any]) -> None:
        check(ranks, **case)

    any_layout()


def test_any_layout_equals_one_rank(ranks):
    check_drawn(ranks, 120)


@pytest.mark.slow
def test_any_layout_equals_one_rank_many_times(ranks):
    check_drawn(ranks, 1500)


def test_each_key_comes_once_and_no_more_than_are_seen(ranks):
    # rank r has tokens [5r, 5r + 5); 7 keys of the window before each, and 3 sinks
    assert ranks.run("messages", cp=4, tokens_each=5, window_size=8, num_sinks=3) == [0, 5, 10, 10]
    assert ranks.run("messages", cp=4, tokens_each=5, window_size=8, num_sinks=0) == [0, 5, 7, 7]
