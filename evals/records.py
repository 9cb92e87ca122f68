"""What one document's evaluation leaves behind, and how documents add up to metrics.

A record is small and JSON, so that an evaluation can be stored per document, taken up again, and
put together from several processes in any order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from evals.perplexity import LossBins, merged, perplexity
from evals.recall import QueryResult, recall_by_distance, recall_metrics

Metrics = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class DocumentRecord:
    """Losses and answers of one document under one mixer."""

    id: str
    kind: str
    """`text`, `recall` or `chat`."""
    length: int
    """Tokens."""
    target_losses: LossBins
    """Over the document's loss tokens: every token of text, the answers of a recall document."""
    all_losses: LossBins
    """Over every token but the first."""
    queries: list[QueryResult] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DocumentRecord:
        """The inverse of `to_json`.

        Raises:
            ValueError: a field is missing or unknown.
        """
        try:
            return cls(
                **{
                    **value,
                    "target_losses": LossBins(**value["target_losses"]),
                    "all_losses": LossBins(**value["all_losses"]),
                    "queries": [QueryResult(**query) for query in value["queries"]],
                }
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"stored record is not one of a document ({error}); delete evaluate/partial"
            ) from error


def summarise(
    records: Sequence[DocumentRecord], *, position_edges: list[int], window_size: int
) -> Metrics:
    """Metrics by task from documents' records.

    Tasks: one for each kind of document there is, `overall` (all of them; the loss over every
    document's loss tokens), and the binned `loss_by_position` and `perplexity_by_position` (text),
    `answer_loss_by_position` (recall), `recall_by_distance` and its `recall_count_by_distance`.
    Losses in nats a token. A mean over nothing is left out, its count says 0.
    """
    metrics: Metrics = {}
    by_kind = {
        kind: [r for r in records if r.kind == kind]
        for kind in sorted({record.kind for record in records})
    }
    for kind, chosen in [*by_kind.items(), ("overall", list(records))]:
        losses = merged((record.target_losses for record in chosen), position_edges)
        metrics[kind] = _loss_metrics(losses, window_size)
        metrics[kind]["num_documents"] = len(chosen)
    if "text" in by_kind:
        text = merged((record.target_losses for record in by_kind["text"]), position_edges)
        metrics["loss_by_position"] = text.loss_by_position()
        metrics["perplexity_by_position"] = text.perplexity_by_position()
    if "recall" in by_kind:
        recall = by_kind["recall"]
        queries = [query for record in recall for query in record.queries]
        every_token = merged((record.all_losses for record in recall), position_edges)
        metrics["recall"].update(
            {
                f"{name}_all_tokens": value
                for name, value in _loss_metrics(every_token, window_size).items()
            }
        )
        metrics["recall"].update(recall_metrics(queries))
        answers = merged((record.target_losses for record in recall), position_edges)
        metrics["answer_loss_by_position"] = answers.loss_by_position()
        shares, counts = recall_by_distance(queries, edges=position_edges, window_size=window_size)
        metrics["recall_by_distance"] = shares
        metrics["recall_count_by_distance"] = counts
    return metrics


def gap_closed(metrics: Metrics, *, full: Metrics, window: Metrics) -> dict[str, float]:
    """How much of the loss that the window costs beyond itself is won back, by kind of document.

    `(window - loss) / (window - full)` of `loss_beyond_window`: 0 is sliding-window attention, 1
    is full attention. Left out where the window costs nothing.
    """
    name = "loss_beyond_window"
    closed = {}
    for task in ("text", "recall", "chat", "overall"):
        losses = [rows.get(task, {}).get(name) for rows in (window, metrics, full)]
        if None not in losses:
            worst, mine, best = (float(loss) for loss in losses if loss is not None)
            if worst > best:
                closed[task] = (worst - mine) / (worst - best)
    return closed


def _loss_metrics(losses: LossBins, window_size: int) -> dict[str, float]:
    beyond = [i for i, edge in enumerate(losses.edges[:-1]) if edge >= window_size]
    metrics: dict[str, float] = {
        "num_tokens": sum(losses.counts),
        "num_tokens_beyond_window": sum(losses.counts[i] for i in beyond),
    }
    for suffix, start in (("", 0), ("_beyond_window", window_size)):
        mean = losses.mean(start=start)
        if mean is not None:
            metrics[f"loss{suffix}"] = mean
            metrics[f"perplexity{suffix}"] = perplexity(mean)
    return metrics
