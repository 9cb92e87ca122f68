"""Documents' records survive JSON and add up to the metrics of all tokens."""

import json

import pytest

from evals.perplexity import LossBins
from evals.recall import QueryResult
from evals.records import DocumentRecord, gap_closed, summarise

EDGES = [0, 4, 8]


def record(name: str, kind: str, losses: list[float], mask: list[bool]) -> DocumentRecord:
    targets, every = LossBins(edges=EDGES), LossBins(edges=EDGES)
    targets.add(losses, mask)
    every.add(losses)
    queries = [QueryResult(distance=5, outside_window=True, beyond_reach=True, correct=True)]
    return DocumentRecord(
        id=name,
        kind=kind,
        length=8,
        target_losses=targets,
        all_losses=every,
        queries=queries if kind == "recall" else [],
    )


def documents() -> list[DocumentRecord]:
    text = record("a", "text", [1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0], [True] * 7)
    recall = record("b", "recall", [9.0] * 6 + [0.5], [False] * 6 + [True])
    return [text, recall]


def test_a_record_survives_json() -> None:
    for document in documents():
        assert DocumentRecord.from_json(json.loads(json.dumps(document.to_json()))) == document


def test_metrics_count_each_loss_token_once() -> None:
    metrics = summarise(documents(), position_edges=EDGES, window_size=4)
    assert metrics["text"]["loss"] == pytest.approx(10 / 7)
    assert metrics["text"]["loss_beyond_window"] == 2.0
    assert metrics["recall"]["loss"] == 0.5
    assert metrics["recall"]["loss_all_tokens"] == pytest.approx(54.5 / 7)
    assert metrics["recall"]["exact_match_outside_window"] == 1.0
    assert metrics["overall"]["loss"] == pytest.approx(10.5 / 8)
    assert metrics["overall"]["loss_beyond_window"] == pytest.approx(6.5 / 4)
    assert metrics["overall"]["num_documents"] == 2
    assert metrics["loss_by_position"] == {"0-3": 1.0, "4-7": 2.0}
    assert metrics["answer_loss_by_position"] == {"4-7": 0.5}
    assert metrics["recall_by_distance"] == {"4-7": 1.0}


def test_every_metric_is_a_number_by_task_and_name() -> None:
    metrics = summarise(documents(), position_edges=EDGES, window_size=4)
    assert all(
        isinstance(value, int | float) for task in metrics.values() for value in task.values()
    )


def test_documents_inside_the_window_have_no_loss_beyond_it() -> None:
    metrics = summarise(documents()[:1], position_edges=EDGES, window_size=100)
    assert "loss_beyond_window" not in metrics["text"]
    assert metrics["text"]["num_tokens_beyond_window"] == 0
    assert "recall" not in metrics


def test_a_stored_record_of_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match="delete evaluate/partial"):
        DocumentRecord.from_json({"id": "a"})


def test_the_closed_gap_is_zero_at_the_window_and_one_at_full_attention() -> None:
    def row(text: float, recall: float) -> dict[str, dict[str, float]]:
        return {
            "text": {"loss_beyond_window": text},
            "recall": {"loss_beyond_window": recall},
            "overall": {"loss": 1.0},
        }

    full, window = row(2.0, 1.0), row(2.0, 5.0)
    assert gap_closed(window, full=full, window=window) == {"recall": 0.0}
    assert gap_closed(full, full=full, window=window) == {"recall": 1.0}
    assert gap_closed(row(1.0, 2.0), full=full, window=window) == {"recall": 0.75}
