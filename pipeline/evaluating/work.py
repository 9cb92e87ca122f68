"""Questions over ranks: each to one rank, answers written as they come, then known to all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from pipeline.context import StageContext
from pipeline.distributed import Ranks, on_main
from pipeline.evaluating.journal import Answer, Journal, Question
from pipeline.survival import stop, stop_if_asked

Compute = Callable[[Sequence[int]], Sequence[Any]]
"""Answers, as plain JSON, to the questions at these indices."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Questions to one model, and how their cost compares."""

    questions: Sequence[Question]
    costs: Sequence[int]
    """Of each question, in any unit: tokens."""
    batch_size: int
    """Questions computed together."""


def shares(costs: Sequence[int], num_ranks: int, batch_size: int) -> list[list[list[int]]]:
    """Batches of indices for each rank.

    Batches hold questions of like cost, the dearest first, so that memory runs out at once or not
    at all; each goes to the rank that has the least to do. Where there are few questions, batches
    are smaller, so that no rank is idle.
    """
    batch_size = max(1, min(batch_size, -(-len(costs) // num_ranks)))
    order = sorted(range(len(costs)), key=lambda index: (-costs[index], index))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    loads = [0] * num_ranks
    parts: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for batch in batches:
        rank = loads.index(min(loads))
        parts[rank].append(batch)
        loads[rank] += sum(costs[index] for index in batch)
    return parts


def answer_all(
    work: Work, compute: Compute, journal: Journal, context: StageContext, title: str
) -> list[Any]:
    """The answers in the questions' order, on every rank; only missing ones are computed.

    Args:
        work: the same on every rank.
        compute: runs the model on this rank.
        journal: where answers are kept.
        context: ranks, and who is told.
        title: of the progress bar.

    Raises:
        StopRequested: asked to stop; what was finished is kept.
    """
    ranks = context.ranks
    known = on_main(ranks, journal.read)
    missing = [i for i, question in enumerate(work.questions) if question not in known]
    if len(missing) < len(work.questions) and missing:
        kept = len(work.questions) - len(missing)
        context.say(f"{title} {kept} of {len(work.questions)} answers are kept from before")
    stop_if_asked(ranks, f"{title} stopped")
    parts = shares([work.costs[i] for i in missing], ranks.world_size, work.batch_size)
    mine = [[missing[i] for i in batch] for batch in parts[ranks.rank]]
    total = sum(len(batch) for batch in mine)
    new: list[tuple[int, Any]] = []
    try:
        if total or ranks.is_main:
            with context.reporter.progress(title, total) as advance:
                started = time.monotonic()
                for batch in mine:
                    if stop.requested:
                        break
                    values = compute(batch)
                    journal.append(
                        [
                            Answer(question=work.questions[i], value=value)
                            for i, value in zip(batch, values, strict=True)
                        ]
                    )
                    new += zip(batch, values, strict=True)
                    advance(len(new), time_left(started, len(new), total))
    finally:
        journal.close()
    stop_if_asked(ranks, f"{title} stopped; finished answers are kept")
    found = dict(_gathered(new, ranks))
    return [
        found[i] if i in found else known[question] for i, question in enumerate(work.questions)
    ]


def time_left(started: float, done: int, total: int) -> str:
    """`about 3 min left`, by the speed so far; nothing at the end."""
    if not done or done >= total:
        return ""
    seconds = (time.monotonic() - started) / done * (total - done)
    if seconds < 90:
        return f"about {seconds:.0f} s left"
    if seconds < 5400:
        return f"about {seconds / 60:.0f} min left"
    return f"about {seconds / 3600:.1f} h left"


def _gathered(new: list[tuple[int, Any]], ranks: Ranks) -> Iterator[tuple[int, Any]]:
    if ranks.world_size == 1:
        yield from new
        return
    parts: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(parts, new)
    for part in parts:
        yield from part
