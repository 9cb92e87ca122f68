"""Scores equal those worked out by hand from a bigram table."""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from allmem_megatron.config import MixerSettings
from evals.documents import EvalDocument
from evals.recall import Query
from pipeline.scoring import (
    next_token_scores,
    prefill,
    prefill_speeds,
    score_batch,
)

SETTINGS = MixerSettings(mode="swa", window_size=4, num_sinks=1, chunk_size=2)
CPU = torch.device("cpu")


class Bigrams:
    """A language model that is a table: p(next | last) for every last token."""

    def __init__(self, probabilities: Tensor) -> None:
        self.log_p = probabilities.log()
        self.rows_at_once: list[int] = []
        self.settings: list[MixerSettings] = []

    @contextlib.contextmanager
    def mixer(self, settings: MixerSettings) -> Iterator[None]:
        self.settings.append(settings)
        yield

    def hidden_states(self, tokens: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        return torch.nn.functional.one_hot(tokens, len(self.log_p)).float()

    def logits(self, hidden: Tensor) -> Tensor:
        self.rows_at_once.append(hidden[..., 0].numel())
        return hidden @ self.log_p + 3.0  # a shift changes no probability


def table() -> Tensor:
    return torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25], [0.3, 0.6, 0.1]])


def document(name: str, tokens: list[int], **fields: Any) -> EvalDocument:
    targets = fields.pop("targets", [False] + [True] * (len(tokens) - 1))
    return EvalDocument(
        id=name,
        kind=fields.pop("kind", "text"),
        tokens=np.array(tokens, dtype=np.int32),
        targets=np.array(targets, dtype=bool),
        **fields,
    )


@pytest.mark.parametrize("logits_rows", [1, 3, 100])
def test_losses_are_those_of_the_table_however_logits_are_cut(logits_rows: int) -> None:
    tokens = torch.tensor([[0, 2, 1, 0], [1, 1, 2, 2]])
    model = Bigrams(table())
    losses, predicted = next_token_scores(model, tokens, logits_rows=logits_rows)
    expected = [[0.7, 0.6, 0.5], [0.25, 0.25, 0.1]]
    assert torch.allclose(losses, -torch.tensor(expected).log(), atol=1e-6)
    assert predicted.tolist() == [[2, 1, 0], [0, 0, 1]]
    assert max(model.rows_at_once) <= logits_rows


def test_records_count_the_targets_and_the_answers() -> None:
    tokens = [0, 2, 1, 0, 2, 1, 0, 2]
    queries = [
        Query(evidence_start=1, evidence_end=2, answer_start=6, answer_end=8),  # 0, 2: predicted
        Query(evidence_start=0, evidence_end=1, answer_start=3, answer_end=4),  # a sink shows it
    ]
    targets = [False, True, False, False, True, False, False, True]
    wrong = document("b", [0, 1] * 4, queries=[queries[0]], kind="recall")
    right = document("a", tokens, targets=targets, queries=queries, kind="recall")
    records = score_batch(
        Bigrams(table()),
        [right, wrong],
        SETTINGS,
        edges=[0, 4, 8],
        num_layers=1,
        logits_rows=5,
        device=CPU,
    )
    assert [record.id for record in records] == ["a", "b"]
    assert records[0].target_losses.counts == [2, 1]  # targets 1, 4 and 7: predicted at 0, 3, 6
    assert records[0].target_losses.sums == pytest.approx(
        [-2 * math.log(0.7), -math.log(0.7)], abs=1e-5
    )
    assert records[0].all_losses.counts == [4, 3]
    first, second = records[0].queries
    assert (first.distance, first.outside_window, first.correct) == (4, True, True)
    assert first.beyond_reach  # one layer reaches 3 positions
    assert (second.distance, second.outside_window, second.correct) == (2, False, True)
    assert not records[1].queries[0].correct


def test_teacher_forced_match_equals_greedy_decoding() -> None:
    generator = torch.Generator().manual_seed(0)
    vocabulary, matches = 5, 0
    for _ in range(60):
        model = Bigrams(torch.softmax(2 * torch.randn(5, 5, generator=generator), dim=-1))
        tokens = torch.randint(0, vocabulary, (8,), generator=generator).tolist()
        query = Query(evidence_start=0, evidence_end=1, answer_start=6, answer_end=8)
        greedy = tokens[:6]
        for _ in range(2):
            greedy.append(int(model.log_p[greedy[-1]].argmax()))
        (record,) = score_batch(
            model,
            [document("a", tokens, queries=[query])],
            SETTINGS,
            edges=[0, 4, 8],
            num_layers=1,
            logits_rows=4,
            device=CPU,
        )
        assert record.queries[0].correct == (greedy[6:] == tokens[6:])
        matches += record.queries[0].correct
    assert matches > 0


def test_prefill_gives_the_last_logits_under_its_mixer() -> None:
    model = Bigrams(table())
    logits = prefill(model, torch.tensor([[0, 1], [1, 2]]), SETTINGS)
    assert torch.allclose(logits.softmax(-1), table()[[1, 2]], atol=1e-6)
    assert model.settings == [SETTINGS]
    assert model.rows_at_once == [2]


def test_speed_is_the_median_and_runs_take_turns() -> None:
    order: list[str] = []
    slow_once = iter([0.2])

    def run(name: str, seconds: float) -> None:
        order.append(name)
        slow = next(slow_once, 0.0) if name == "a" and len(order) > 2 else 0.0
        time.sleep(seconds + slow)

    speeds = prefill_speeds(
        {"a": lambda: run("a", 0.004), "b": lambda: run("b", 0.012)},
        120,
        repeats=5,
        warmup=1,
        device=CPU,
    )
    assert order[:6] == ["a", "b", "b", "a", "a", "b"]
    assert speeds["a"] > 120 / 0.1  # the slow spell of 0.2 s moves no median
    assert speeds["b"] < 120 / 0.012
