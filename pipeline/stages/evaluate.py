"""`stage=evaluate`: mixers side by side on the same held-out documents, with the controls.

Every subject sees the same batches. Documents are split over the ranks (over groups of
tensor-parallel ranks, which work on the same ones); each leaves a small record, and the records of
all ranks are put together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from allmem_megatron.model import AllMemGPTModel
from evals.bins import bin_edges
from evals.documents import EvalDocument, batches_of
from evals.records import DocumentRecord, Metrics, gap_closed, summarise
from pipeline.context import StageContext
from pipeline.distributed import Ranks, on_main, sum_over_ranks
from pipeline.evaluation import (
    BRANCH_OF,
    Measured,
    PartialResults,
    Subject,
    Weights,
    cost_metrics,
    find_weights,
    from_partial,
    key_of,
    memory_metrics,
    mixer_shape,
    subjects_of,
    to_partial,
    weights_identity,
)
from pipeline.held_out import read_documents
from pipeline.metrics_log import read_lines
from pipeline.models import base_config, choose_dtype, load_model
from pipeline.report import write_report
from pipeline.schema import RunConfig
from pipeline.scoring import prefill, prefill_speeds, score_batch
from pipeline.survival import StopRequested, stop, stop_if_asked
from pipeline.wording import count


def run(config: RunConfig, context: StageContext) -> None:
    """Measure every mixer and control, and write results, table and figures.

    Raises:
        ValueError: no held-out document fits, a shard is broken, or nothing is trained yet.
    """
    results = _Evaluation(config, context).run()
    training = {
        path.parent.name: path
        for path in sorted(context.run_dir.glob("*/metrics.jsonl"))
        if path.parent != context.dir
    }
    files = on_main(context.ranks, lambda: write_report(results, context.dir, training))
    step = max((line["step"] for _, line in read_lines(context.metrics.path)), default=-1) + 1
    context.log(step, headline(results))
    plots = [path for path in files if path.suffix == ".png"]
    context.artifact(*(path for path in files if path not in plots), on_parent=True)
    context.artifact(*plots, folder="plots", on_parent=True)
    context.say(
        f"{context.entry}: wrote results.json, table.md and {count(len(plots), 'figure')} "
        f"to {context.dir}"
    )


def headline(results: Mapping[str, Any]) -> dict[str, float]:
    """The table's numbers by name, for MLflow: `allmem/recall/exact_match_outside_window`, …"""
    binned = ("_by_position", "_by_distance", "_by_layer")
    return {
        f"{name}/{task}/{metric}": value
        for rows in (results["mixers"], results["controls"])
        for name, tasks in rows.items()
        for task, metrics in tasks.items()
        if not task.endswith(binned)
        for metric, value in metrics.items()
    }


class _Evaluation:
    """One run of the stage: models are loaded when a subject first needs them."""

    def __init__(self, config: RunConfig, context: StageContext) -> None:
        self.config, self.context, self.settings = config, context, config.eval
        self.documents = read_documents(context.data_dir, self.settings)
        self.batches = batches_of(self.documents, self.settings.batch_size)
        self.length = max(len(document.tokens) for document in self.documents)
        self.edges = bin_edges(self.length, self.settings.window_size, self.settings.num_bins)
        self.base = base_config(config)
        self.weights = {
            branch: find_weights(config, context.run_dir, branch)
            for branch in ("none", "allmem", "mamba2")
        }
        self.identities = {
            branch: weights_identity(config, context, weights)
            for branch, weights in self.weights.items()
        }
        self.partial = PartialResults(context.dir / "partial")
        self.models: dict[str, AllMemGPTModel] = {}

    def run(self) -> dict[str, Any]:
        subjects = subjects_of(self.settings)
        missing = {
            subject.name: why
            for subject in subjects
            if not subject.is_control and (why := self.weights[BRANCH_OF[subject.mixer]].missing)
        }
        for name, why in missing.items():
            self._say(f"{name} is not measured: {why}")
        for weights in self.weights.values():
            if weights.before is not None and not weights.missing:
                self._say(f"{weights.branch} is measured without {weights.before}: not finished")
        present = [subject for subject in subjects if subject.mixer not in missing]
        if not present:
            raise ValueError(
                "none of eval.mixers has weights: " + "; ".join(missing.values()) + "; train first"
            )
        measured = {subject.name: self._measure(subject) for subject in present}
        speeds = self._speeds([subject for subject in present if not subject.is_control])
        metrics = {
            subject.name: self._metrics(subject, measured[subject.name], speeds)
            for subject in present
        }
        if "full" in metrics and "swa" in metrics:
            for subject in present:
                if subject.mixer not in ("full", "swa"):
                    metrics[subject.name]["gap_closed_beyond_window"] = gap_closed(
                        metrics[subject.name], full=metrics["full"], window=metrics["swa"]
                    )
        return {
            "mixers": {s.name: metrics[s.name] for s in present if not s.is_control},
            "controls": {s.name: metrics[s.name] for s in present if s.is_control},
            "missing": missing,
            "config": self._description(),
            "commit": self.context.commit,
        }

    def _say(self, line: str) -> None:
        self.context.say(f"{self.context.entry}: {line}")

    def _key(self, subject: Subject) -> str:
        decides = {
            key: value
            for key, value in self.context.fingerprint.items()
            if key.startswith(("model.", "mixer.memory", "parallel."))
        }
        return key_of(
            subject.name,
            asdict(subject.settings),
            self.identities[self._branch(subject)],
            self._documents_identity(),
            self.edges,
            decides,
            self._dtype(),
            self._device_name(),
            self.context.commit,
        )

    def _documents_identity(self) -> list[list[Any]]:
        return [
            [d.id, d.kind, len(d.tokens), int(np.sum(d.tokens, dtype=np.int64))]
            for d in self.documents
        ]

    def _branch(self, subject: Subject) -> str:
        """The model that computes a subject: the base alone where the branch's base was changed."""
        wanted = BRANCH_OF[subject.mixer]
        if wanted != "none":
            return wanted
        changed = self.config.sft.train == "all" and any(
            entry.startswith("sft") for entry in self.weights["allmem"].entries
        )
        shared = "allmem" in self.settings.mixers and not self.weights["allmem"].missing
        return "allmem" if shared and not changed else "none"

    def _model(self, subject: Subject) -> AllMemGPTModel:
        branch = self._branch(subject)
        if branch not in self.models:
            weights = self.weights[branch]
            self._say(f"loading {_described(weights)}")
            model = load_model(
                self.config,
                self.context.run_dir,
                branch=branch,
                device=self.context.device,
                before=weights.before,
                any_dtype=True,
            )
            model.requires_grad_(False)
            model.eval()
            for other in self.models.values():
                _share_base(model, other)
            self.models[branch] = model
        return self.models[branch]

    def _measure(self, subject: Subject) -> Measured:
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
        model, ranks = self._model(subject), self.context.ranks
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
                    num_layers=self.base.num_layers,
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

    def _speeds(self, subjects: Sequence[Subject]) -> dict[str, float]:
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
            subject.name: _prefill_of(self._model(subject), tokens, subject) for subject in subjects
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

    def _metrics(
        self, subject: Subject, measured: Measured, speeds: Mapping[str, float]
    ) -> Metrics:
        metrics = summarise(
            measured.records, position_edges=self.edges, window_size=self.settings.window_size
        )
        if subject.is_control:  # costs what its mixer costs
            return metrics
        if subject.name in speeds:
            metrics["speed"] = {"prefill_tokens_per_s": speeds[subject.name]}
        shape = mixer_shape(self.config, self.base)
        metrics.update(cost_metrics(subject.mixer, shape, self.settings, self.length))
        metrics.update(memory_metrics(measured.memory))
        return metrics

    def _description(self) -> dict[str, Any]:
        return {
            **asdict(self.settings),
            "length": self.length,
            "num_documents": len(self.documents),
            "recipe": self.config.recipe,
            "branch": self.config.mixer.branch,
            "weights": {
                branch: list(weights.checkpoints)
                for branch, weights in self.weights.items()
                if not weights.missing
            },
            "dtype": self._dtype(),
            "device": self._device_name(),
            "num_threads": torch.get_num_threads(),
        }

    def _kept(self, name: str, key: str) -> Any:
        """A value from before, or None; a commit that does not name the program keeps nothing."""
        commit = self.context.commit
        return None if commit == "unknown" or commit[-1:] == "+" else self.partial.load(name, key)

    def _dtype(self) -> str:
        dtype = choose_dtype(self.config.parallel, self.context.device)
        return str(dtype).removeprefix("torch.")

    def _device_name(self) -> str:
        device = self.context.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _prefill_of(model: AllMemGPTModel, tokens: torch.Tensor, subject: Subject) -> Any:
    return lambda: prefill(model, tokens, subject.settings)


def _described(weights: Weights) -> str:
    stages = zip(weights.entries, weights.checkpoints, strict=True)
    steps = ", ".join(f"{entry} {Path(path).name}" for entry, path in stages)
    return f"the base model with {steps}" if steps else "the base model"


def _share_base(model: AllMemGPTModel, other: AllMemGPTModel) -> None:
    """Let two models hold one copy of base weights that are equal."""
    theirs = dict(other.base_parameters())
    for name, parameter in model.base_parameters():
        if name in theirs and torch.equal(parameter, theirs[name]):
            parameter.data = theirs[name].data


def _gathered(records: list[DocumentRecord], ranks: Ranks) -> list[DocumentRecord]:
    """The records of all ranks, on every rank; tensor-parallel ranks have the same ones."""
    if ranks.world_size == 1:
        return records
    parts: list[Any] = [None] * ranks.world_size
    own = [record.to_json() for record in records] if ranks.tp_rank == 0 else []
    dist.all_gather_object(parts, own)
    return [DocumentRecord.from_json(record) for part in parts for record in part]
