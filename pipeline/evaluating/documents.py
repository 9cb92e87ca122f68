"""Loss and recall on held-out documents: every subject sees the same batches.

Documents are split over the ranks (over groups of tensor-parallel ranks, which work on the same
ones); each leaves a small record, and the records of all ranks are put together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from allmem_megatron.model import AllMemGPTModel
from evals.bins import bin_edges
from evals.documents import EvalDocument, batches_of
from evals.records import DocumentRecord, Metrics, summarise
from pipeline.context import StageContext
from pipeline.distributed import Ranks, on_main, sum_over_ranks
from pipeline.evaluating.subjects import Subjects
from pipeline.evaluation import (
    BRANCH_OF,
    Measured,
    PartialResults,
    Subject,
    from_partial,
    key_of,
    to_partial,
)
from pipeline.held_out import documents_dir, read_documents
from pipeline.scoring import prefill, prefill_speeds, score_batch
from pipeline.survival import StopRequested, stop, stop_if_asked
from pipeline.wording import count


class DocumentScores:
    """Held-out documents, and each subject's record of them."""

    def __init__(self, context: StageContext, subjects: Subjects) -> None:
        """Read the documents.

        Raises:
            ValueError: no document fits, or a shard is broken.
        """
        self.context, self.subjects, self.settings = context, subjects, subjects.settings
        self.documents = read_documents(
            documents_dir(self.settings, context.data_dir), self.settings
        )
        self.batches = batches_of(self.documents, self.settings.batch_size)
        self.length = max(len(document.tokens) for document in self.documents)
        self.edges = bin_edges(self.length, self.settings.window_size, self.settings.num_bins)
        self.partial = PartialResults(context.dir / "partial")

    def metrics(self, measured: Measured) -> Metrics:
        """Loss by kind and position, recall by distance."""
        return summarise(
            measured.records, position_edges=self.edges, window_size=self.settings.window_size
        )

    def measure(self, subject: Subject) -> Measured:
        """A subject's records, from before where nothing has changed since.

        Raises:
            StopRequested: asked to stop; finished subjects are kept.
        """
        stop_if_asked(self.context.ranks, f"{self.context.entry} stopped before {subject.name}")
        key = self._key(subject)
        stored = on_main(self.context.ranks, lambda: self._kept(subject.name, key))
        if stored is not None:
            self._say(f"{subject.name} is kept from before")
            return from_partial(stored)
        measured = self._score(subject)
        on_main(
            self.context.ranks,
            lambda: self.partial.save(subject.name, key, to_partial(measured)),
        )
        return measured

    def _score(self, subject: Subject) -> Measured:
        model, ranks = self.subjects.model(subject), self.context.ranks
        batches = self._batches_for(subject)
        mine = batches[ranks.replica :: ranks.num_replicas]
        records: list[DocumentRecord] = []
        title = f"{self.context.entry} {subject.name}:"
        with self.context.reporter.progress(title, len(mine)) as advance:
            for done, batch in enumerate(mine, start=1):
                if self._stops():
                    break
                records += score_batch(
                    model,
                    batch,
                    subject.settings,
                    edges=self.edges,
                    num_layers=self.subjects.base.num_layers,
                    logits_rows=self.settings.logits_rows,
                    device=self.context.device,
                )
                advance(done)
        stop_if_asked(ranks, f"{self.context.entry} stopped at {subject.name}")
        has_memory = BRANCH_OF[subject.mixer] != "none" and not subject.is_control
        statistics = model.memory_statistics() if has_memory else {}
        return Measured(records=_gathered(records, ranks), memory=statistics)

    def _stops(self) -> bool:
        """Whether to stop before the next batch: tensor-parallel ranks, which share it, agree."""
        if self.context.ranks.tp == 1:
            return stop.requested
        group = parallel_state.get_tensor_model_parallel_group()
        return sum_over_ranks([float(stop.requested)], self.context.device, group)[0] > 0

    def _batches_for(self, subject: Subject) -> list[list[EvalDocument]]:
        """All batches; for the shuffled state those with another document to take it from."""
        if not subject.settings.shuffle_state:
            return self.batches
        paired = [batch for batch in self.batches if len(batch) > 1]
        if not paired:
            raise ValueError(
                "eval.controls has state_shuffled but no two held-out documents have the same "
                "length; set data.packing=none or leave the control out"
            )
        if left := len(self.batches) - len(paired):
            self._say(f"{subject.name}: {count(left, 'document')} without a partner of its length")
        return paired

    def speeds(self, subjects: Sequence[Subject]) -> dict[str, float]:
        """Prefill tokens per second, all mixers in turn, on every rank (rank 0's count)."""
        settings, ranks = self.settings, self.context.ranks
        if settings.timing_repeats == 0:
            return {}
        key = key_of(
            [self._key(subject) for subject in subjects],
            [settings.timing_repeats, settings.timing_warmup],
            [settings.timing_batch_size, settings.timing_length],
        )
        stored = on_main(ranks, lambda: self._kept("speed", key))
        if stored is not None:
            return dict(stored)
        tokens = self._timing_tokens()
        runs = {
            subject.name: _prefill_of(self.subjects.model(subject), tokens, subject)
            for subject in subjects
        }
        total = len(runs) * (settings.timing_warmup + settings.timing_repeats)
        done = 0
        with self.context.reporter.progress(f"{self.context.entry} speed:", total) as advance:

            def advanced() -> None:
                nonlocal done
                done += 1
                advance(done)
                if self._stops():
                    raise StopRequested

            speeds: dict[str, float] = {}
            with contextlib.suppress(StopRequested):  # all ranks stop together, below
                speeds = prefill_speeds(
                    runs,
                    tokens.numel(),
                    repeats=settings.timing_repeats,
                    warmup=settings.timing_warmup,
                    device=self.context.device,
                    progress=advanced,
                )
        stop_if_asked(ranks, f"{self.context.entry} stopped at the speeds")
        speeds = on_main(ranks, lambda: speeds)
        on_main(ranks, lambda: self.partial.save("speed", key, speeds))
        return speeds

    def _timing_tokens(self) -> torch.Tensor:
        """[timing_batch_size, timing_length] tokens of the held-out documents, repeated to fit."""
        rows, length = self.settings.timing_batch_size, self.settings.timing_length or self.length
        tokens = np.concatenate([document.tokens for document in self.documents])
        filled = np.resize(tokens, (rows, length)).astype(np.int64)
        return torch.from_numpy(filled).to(self.context.device)

    def _kept(self, name: str, key: str) -> Any:
        """A value from before, or None; a commit that does not name the program keeps nothing."""
        commit = self.context.commit
        return None if commit == "unknown" or commit[-1:] == "+" else self.partial.load(name, key)

    def _documents_identity(self) -> list[list[Any]]:
        return [
            [d.id, d.kind, len(d.tokens), int(np.sum(d.tokens, dtype=np.int64))]
            for d in self.documents
        ]

    def _key(self, subject: Subject) -> str:
        return self.subjects.key(
            subject,
            asdict(subject.settings),
            self.subjects.identities[self.subjects.branch(subject)],
            self._documents_identity(),
            self.edges,
            self.context.commit,
        )

    def _say(self, line: str) -> None:
        self.context.say(f"{self.context.entry}: {line}")


def _prefill_of(model: AllMemGPTModel, tokens: torch.Tensor, subject: Subject) -> Any:
    return lambda: prefill(model, tokens, subject.settings)


def _gathered(records: list[DocumentRecord], ranks: Ranks) -> list[DocumentRecord]:
    """The records of all ranks, on every rank; tensor-parallel ranks have the same ones."""
    if ranks.world_size == 1:
        return records
    parts: list[Any] = [None] * ranks.world_size
    own = [record.to_json() for record in records] if ranks.tp_rank == 0 else []
    dist.all_gather_object(parts, own)
    return [DocumentRecord.from_json(record) for part in parts for record in part]
