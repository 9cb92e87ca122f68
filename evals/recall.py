"""Exact recall of facts, counted only where sliding-window attention cannot see the evidence.

Positions are token indices inside one document. The token at index t is predicted by the query at
position t - 1, which sees key j iff `t - 1 - j < W` or `j < s` (spec section 2).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from evals.bins import bin_index, bin_label


@dataclass(frozen=True, kw_only=True)
class Query:
    """One question of a recall document; `end` indices are exclusive."""

    answer_start: int
    """Index of the answer's first token."""
    answer_end: int
    evidence_start: int
    """Index of the first token of the stated fact."""
    evidence_end: int

    def __post_init__(self) -> None:
        """Check the order of the spans.

        Raises:
            ValueError: a span is empty, or the evidence does not end before the answer starts.
        """
        if not (
            0 <= self.evidence_start < self.evidence_end <= self.answer_start < self.answer_end
        ):
            raise ValueError(
                f"recall query evidence=[{self.evidence_start}, {self.evidence_end}) "
                f"answer=[{self.answer_start}, {self.answer_end}) must be non-empty spans in this "
                "order; prepare the shards again"
            )

    @classmethod
    def from_meta(cls, meta: Mapping[str, int]) -> Query:
        """Read a query of a sample's `meta.json`.

        Raises:
            ValueError: a field is missing.
        """
        names = ("answer_start", "answer_end", "evidence_start", "evidence_end")
        missing = [name for name in names if name not in meta]
        if missing:
            raise ValueError(
                f"recall query {dict(meta)} lacks {', '.join(missing)}; prepare the shards again"
            )
        return cls(**{name: int(meta[name]) for name in names})

    @property
    def distance(self) -> int:
        """Tokens from the evidence's last token to the position that predicts the answer's first.

        The window sees that evidence token iff `distance < W`.
        """
        return self.answer_start - self.evidence_end


def is_outside_window(query: Query, window_size: int, num_sinks: int) -> bool:
    """Whether no answer position sees any evidence token, by window or sink, in one layer.

    The first predicting position `answer_start - 1` is the nearest one, so all of the evidence is
    outside iff its last token is at least W behind that, and its first token is no sink.
    """
    return query.distance >= window_size and query.evidence_start >= num_sinks


def is_beyond_reach(query: Query, window_size: int, num_sinks: int, num_layers: int) -> bool:
    """Whether windows stacked over all layers cannot carry the evidence to the answer either.

    One layer of window attention moves information by at most W - 1 positions, so L layers reach
    L (W - 1). Sinks relay nothing more: a sink position itself sees only positions before it.
    """
    outside = is_outside_window(query, window_size, num_sinks)
    return outside and query.distance > num_layers * (window_size - 1)


def exact_match(predicted: Sequence[int], answer: Sequence[int]) -> bool:
    """Whether every answer token was predicted.

    With `predicted` the teacher-forced argmax at each answer position this equals the exact match
    of greedy decoding: if every argmax is the answer's token, greedy decoding, fed its own output,
    is fed the answer and makes the same choices; and if greedy decoding gives the answer, its
    every step had the answer as prefix, so the teacher-forced argmax there is the same.

    Raises:
        ValueError: the lengths differ or the answer is empty.
    """
    if len(predicted) != len(answer) or not answer:
        raise ValueError(
            f"{len(predicted)} predicted tokens for an answer of {len(answer)}; "
            "give one prediction for each answer token"
        )
    return list(predicted) == list(answer)


@dataclass(frozen=True, kw_only=True)
class QueryResult:
    """One scored question."""

    distance: int
    outside_window: bool
    beyond_reach: bool
    correct: bool


def recall_metrics(results: Iterable[QueryResult]) -> dict[str, float]:
    """Share of exact matches: over all questions, those outside the window, and beyond reach.

    A share over no questions is left out; its count is there and 0.
    """
    results = list(results)
    outside = [result for result in results if result.outside_window]
    beyond = [result for result in results if result.beyond_reach]
    metrics: dict[str, float] = {}
    for suffix, chosen in (("", results), ("_outside_window", outside), ("_beyond_reach", beyond)):
        metrics[f"num_queries{suffix}"] = len(chosen)
        if chosen:
            metrics[f"exact_match{suffix}"] = sum(r.correct for r in chosen) / len(chosen)
    return metrics


def recall_by_distance(
    results: Iterable[QueryResult], *, edges: list[int], window_size: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Exact match, and number of questions, in each bin of distance that has any.

    Questions farther than the window whose evidence a sink shows are left out, so that bins
    beyond the window hold only evidence that attention cannot see.
    """
    binned: dict[int, list[bool]] = {}
    for result in results:
        if result.distance < window_size or result.outside_window:
            binned.setdefault(bin_index(edges, result.distance), []).append(result.correct)
    labelled = {bin_label(edges, index): binned[index] for index in sorted(binned)}
    shares = {label: sum(correct) / len(correct) for label, correct in labelled.items()}
    return shares, {label: len(correct) for label, correct in labelled.items()}
