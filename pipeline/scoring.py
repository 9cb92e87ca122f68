"""Runs documents through a model and leaves one small record for each.

Shape letters: `B` documents of equal length, `T` tokens of each, `D` model width, `V` vocabulary,
`N` positions whose logits are looked at.

Logits are formed for `logits_rows` positions at a time, so memory is bounded by that times V,
whatever B and T are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from allmem_megatron.config import MixerSettings
from evals.documents import EvalDocument
from evals.perplexity import LossBins
from evals.recall import Query, QueryResult, exact_match, is_beyond_reach, is_outside_window
from evals.records import DocumentRecord


class Scored(Protocol):
    """What scoring needs of a model: `allmem_megatron.model.AllMemGPTModel` has it."""

    def mixer(self, settings: MixerSettings) -> AbstractContextManager[Any]:
        """Set every layer's token mixer."""

    def hidden_states(self, tokens: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """[B, T] to [B, T, D], after the final norm."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., V]."""


@torch.no_grad()
def next_token_scores(model: Scored, tokens: Tensor, *, logits_rows: int) -> tuple[Tensor, Tensor]:
    """Loss and most likely token of every position but the last, teacher-forced.

    Args:
        model: a model whose mixer is set.
        tokens: [B, T] int64.
        logits_rows: positions whose logits are held at once.

    Returns:
        losses [B, T-1] float32, in nats: `-log p(tokens[:, t + 1] | tokens[:, :t + 1])`;
        predicted [B, T-1] int64, the argmax at t.
    """
    hidden = model.hidden_states(tokens)[:, :-1].flatten(0, 1)  # [N, D]
    targets = tokens[:, 1:].flatten()
    losses = torch.empty(len(targets), dtype=torch.float32, device=tokens.device)
    predicted = torch.empty_like(targets)
    for start in range(0, len(targets), logits_rows):
        rows = slice(start, start + logits_rows)
        logits = model.logits(hidden[rows]).float()  # [<= logits_rows, V]
        losses[rows] = torch.nn.functional.cross_entropy(logits, targets[rows], reduction="none")
        predicted[rows] = logits.argmax(dim=-1)
    shape = (tokens.shape[0], tokens.shape[1] - 1)
    return losses.view(shape), predicted.view(shape)


def score_batch(
    model: Scored,
    documents: Sequence[EvalDocument],
    settings: MixerSettings,
    *,
    edges: list[int],
    num_layers: int,
    logits_rows: int,
    device: torch.device,
) -> list[DocumentRecord]:
    """One record for each document of a batch of equal lengths.

    Args:
        model: scored with `settings` as its mixer.
        documents: B documents of T tokens each.
        settings: mixer, window, sinks, chunk and controls.
        edges: bins of positions, up to at least T.
        num_layers: L, for the reach of stacked windows.
        logits_rows: positions whose logits are held at once.
        device: where the model is.
    """
    tokens = torch.from_numpy(np.stack([d.tokens for d in documents]).astype(np.int64)).to(device)
    with model.mixer(settings):
        losses, predicted = next_token_scores(model, tokens, logits_rows=logits_rows)
    records = []
    for document, loss_row, predicted_row in zip(
        documents, losses.tolist(), predicted.tolist(), strict=True
    ):
        target_losses, all_losses = LossBins(edges=edges), LossBins(edges=edges)
        target_losses.add(loss_row, document.targets[1:].tolist())  # token t + 1 is predicted at t
        all_losses.add(loss_row)
        answers = document.tokens.tolist()
        records.append(
            DocumentRecord(
                id=document.id,
                kind=document.kind,
                length=len(document.tokens),
                target_losses=target_losses,
                all_losses=all_losses,
                queries=[
                    _answered(query, predicted_row, answers, settings, num_layers)
                    for query in document.queries
                ],
            )
        )
    return records


def _answered(
    query: Query,
    predicted: Sequence[int],
    tokens: Sequence[int],
    settings: MixerSettings,
    num_layers: int,
) -> QueryResult:
    window, sinks = settings.window_size, settings.num_sinks
    span = slice(query.answer_start - 1, query.answer_end - 1)  # positions that predict the answer
    return QueryResult(
        distance=query.distance,
        outside_window=is_outside_window(query, window, sinks),
        beyond_reach=is_beyond_reach(query, window, sinks, num_layers),
        correct=exact_match(predicted[span], tokens[query.answer_start : query.answer_end]),
    )


@torch.no_grad()
def prefill(model: Scored, tokens: Tensor, settings: MixerSettings) -> Tensor:
    """[B, V] logits after the last token: what a server computes before it generates."""
    with model.mixer(settings):
        return model.logits(model.hidden_states(tokens)[:, -1])


def prefill_speeds(
    runs: Mapping[str, Callable[[], object]],
    num_tokens: int,
    *,
    repeats: int,
    warmup: int,
    device: torch.device,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Tokens per second of each run, the median of `repeats`.

    The runs take turns, so that a slow spell of the machine hits all of them, and the one that
    begins a round changes from round to round.

    Args:
        runs: by name, something that prefills.
        num_tokens: tokens of all rows of one prefill.
        repeats: timed rounds.
        warmup: rounds before that.
        device: waited for at the clock's start and stop.
        progress: called after each prefill.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_index in range(warmup + repeats):
        turn = round_index % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            _wait(device)
            start = time.perf_counter()
            runs[name]()
            _wait(device)
            if round_index >= warmup:
                seconds[name].append(time.perf_counter() - start)
            progress()
    return {name: num_tokens / statistics.median(times) for name, times in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
