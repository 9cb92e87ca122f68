"""Recall counts an answer only where attention cannot have seen its evidence."""

import pytest

from evals.recall import (
    Query,
    QueryResult,
    exact_match,
    is_beyond_reach,
    is_outside_window,
    recall_by_distance,
    recall_metrics,
)


def sees_evidence(query: Query, window: int, sinks: int) -> bool:
    """Whether any predicting position of the answer sees any evidence token: spec section 2."""
    return any(
        position - key < window or key < sinks
        for position in range(query.answer_start - 1, query.answer_end - 1)
        for key in range(query.evidence_start, query.evidence_end)
    )


def reached_positions(start: int, window: int, layers: int) -> int:
    """Last position that learns of `start` through stacked windows."""
    known = {start}
    for _ in range(layers):
        known |= {t for key in known for t in range(key, key + window)}
    return max(known)


def test_outside_window_is_what_the_mask_says() -> None:
    for start in range(12):
        for gap in range(12):
            query = Query(
                evidence_start=start,
                evidence_end=start + 2,
                answer_start=start + 2 + gap,
                answer_end=start + 5 + gap,
            )
            for window in (1, 4, 7):
                for sinks in (0, 3):
                    outside = is_outside_window(query, window, sinks)
                    assert outside == (not sees_evidence(query, window, sinks))


def test_beyond_reach_is_what_stacked_windows_cannot_carry() -> None:
    for gap in range(30):
        query = Query(evidence_start=5, evidence_end=7, answer_start=7 + gap, answer_end=8 + gap)
        for window, layers in ((4, 1), (4, 3), (6, 4)):
            reaches = reached_positions(6, window, layers) >= query.answer_start - 1
            expected = not reaches and not sees_evidence(query, window, 2)
            assert is_beyond_reach(query, window, 2, layers) == expected


def test_exact_match_wants_every_token() -> None:
    assert exact_match([1, 2, 3], [1, 2, 3])
    assert not exact_match([1, 2, 4], [1, 2, 3])
    with pytest.raises(ValueError, match="2 predicted tokens"):
        exact_match([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="answer of 0"):
        exact_match([], [])


@pytest.mark.parametrize("spans", [(0, 0, 5, 6), (4, 6, 5, 7), (0, 2, 5, 5), (-1, 2, 5, 6)])
def test_spans_out_of_order_are_refused(spans: tuple[int, int, int, int]) -> None:
    names = ("evidence_start", "evidence_end", "answer_start", "answer_end")
    with pytest.raises(ValueError, match="recall query"):
        Query(**dict(zip(names, spans, strict=True)))


def test_a_query_without_its_evidence_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks evidence_start, evidence_end"):
        Query.from_meta({"answer_start": 3, "answer_end": 4})


def result(distance: int, outside: bool, beyond: bool, correct: bool) -> QueryResult:
    return QueryResult(
        distance=distance, outside_window=outside, beyond_reach=beyond, correct=correct
    )


def test_shares_are_over_the_counted_questions_only() -> None:
    results = [
        result(3, False, False, True),
        result(12, True, False, True),
        result(15, True, False, False),
        result(40, True, True, False),
    ]
    assert recall_metrics(results) == {
        "num_queries": 4,
        "exact_match": 0.5,
        "num_queries_outside_window": 3,
        "exact_match_outside_window": pytest.approx(1 / 3),
        "num_queries_beyond_reach": 1,
        "exact_match_beyond_reach": 0.0,
    }


def test_a_share_over_nothing_is_left_out_and_counted_as_none() -> None:
    metrics = recall_metrics([result(3, False, False, True)])
    assert "exact_match_outside_window" not in metrics
    assert metrics["num_queries_outside_window"] == 0


def test_bins_of_distance_leave_out_evidence_that_a_sink_shows() -> None:
    results = [
        result(3, False, False, True),
        result(12, True, False, True),
        result(13, True, False, False),
        result(14, False, False, True),  # far, but its evidence is a sink
    ]
    shares, counts = recall_by_distance(results, edges=[0, 10, 20], window_size=10)
    assert shares == {"0-9": 1.0, "10-19": 0.5}
    assert counts == {"0-9": 1, "10-19": 2}
