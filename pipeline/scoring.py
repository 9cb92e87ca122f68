"""Runs documents through a model and leaves one small record for each.

Shape letters: `B` documents of equal length, `T` tokens of each, `D` model width, `V` vocabulary,
`N` positions whose logits are looked at.

Logits are formed for `logits_rows` positions at a time, so memory is bounded by that times V,
whatever B and T are.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from allmem_megatron.config import MixerSettings
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


@dataclass(frozen=True, kw_only=True)
class EvalDocument:
    """One document to score, on its own in its row."""

    id: str
    kind: str
    """`text`, `recall` or `chat`."""
    tokens: NDArray[np.int32]
    """[T]."""
    targets: NDArray[np.bool_]
    """[T]; true where the token at this index counts in the loss."""
    queries: list[Query] = field(default_factory=list)


def documents_of(
    tokens: NDArray[np.int32],
    loss_mask: NDArray[np.uint8],
    borders: Sequence[int],
    meta: Mapping[str, Any],
) -> list[EvalDocument]:
    """The documents that a sample of a shard is packed from, its padding left out.

    The loss of a recall document counts its answers, whatever the loss mask of training says.

    Args:
        tokens: [T].
        loss_mask: [T]; 1 where the token at this index is a loss target.
        borders: `cu_seqlens`, from 0 to T.
        meta: the sample's `meta.json`.

    Raises:
        ValueError: a query lies outside the documents, or lacks a field.
    """
    queries = [Query.from_meta(query) for query in meta.get("queries", ())]
    end_of_text = len(tokens) - int(meta.get("num_padding", 0))
    ids = list(meta.get("ids", ())) or [str(meta.get("source", "document"))]
    documents, placed = [], 0
    for index, (start, end) in enumerate(itertools.pairwise(borders)):
        end = min(end, end_of_text)
        if end - start < 2:  # nothing is predicted in it
            continue
        inside = [_shifted(q, start) for q in queries if start <= q.evidence_start < end]
        inside = [q for q in inside if q.answer_end <= end - start]
        placed += len(inside)
        targets = loss_mask[start:end].astype(bool)
        if meta["kind"] == "recall" and inside:
            targets = np.zeros(end - start, dtype=bool)
            for query in inside:
                targets[query.answer_start : query.answer_end] = True
        targets[0] = False  # no position before it in the document
        documents.append(
            EvalDocument(
                id=f"{ids[index]}" if index < len(ids) else f"{ids[-1]}+{index}",
                kind=str(meta["kind"]),
                tokens=tokens[start:end],
                targets=targets,
                queries=inside,
            )
        )
    if placed != len(queries):
        raise ValueError(
            f"{len(queries) - placed} of {len(queries)} queries of sample {ids[0]} cross a "
            "document's border; prepare the shards again"
        )
    return documents


def _shifted(query: Query, start: int) -> Query:
    return Query(
        answer_start=query.answer_start - start,
        answer_end=query.answer_end - start,
        evidence_start=query.evidence_start - start,
        evidence_end=query.evidence_end - start,
    )


def batches_of(documents: Iterable[EvalDocument], batch_size: int) -> list[list[EvalDocument]]:
    """Batches of one kind and one length, in order; no document is alone if another one fits it.

    A remainder of one joins the batch before it, so that the state of every document can be
    exchanged with that of another one of the same kind.
    """
    groups: dict[tuple[str, int], list[EvalDocument]] = {}
    for document in documents:
        groups.setdefault((document.kind, len(document.tokens)), []).append(document)
    batches = []
    for group in groups.values():
        parts = [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
        if len(parts) > 1 and len(parts[-1]) == 1:
            parts[-2:] = [parts[-2] + parts[-1]]
        batches += parts
    return batches


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
        runs: by name, something that prefills `num_tokens` tokens.
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
