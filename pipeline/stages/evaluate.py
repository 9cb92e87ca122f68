"""`stage=evaluate`: mixers side by side on the same documents and tasks, with the controls.

Three kinds of measure: loss and recall on held-out documents (`evaluating.documents`), long-context
tasks and short tasks (`evaluating.generated`). Every subject sees the same batches and prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from evals.records import Metrics, gap_closed
from pipeline.context import StageContext
from pipeline.distributed import on_main
from pipeline.evaluating.documents import DocumentScores
from pipeline.evaluating.generated import TaskRuns
from pipeline.evaluating.memory_norms import memory_norms
from pipeline.evaluating.subjects import Subjects
from pipeline.evaluation import (
    BRANCH_OF,
    Subject,
    cost_metrics,
    memory_metrics,
    mixer_shape,
    subjects_of,
)
from pipeline.metrics_log import read_lines
from pipeline.report import write_report
from pipeline.schema import RunConfig
from pipeline.wording import count

BINNED = ("_by_position", "_by_distance", "_by_layer", "_by_length", "_by_length_and_depth")
"""Endings of tasks whose metrics are bins of another task's."""


def run(config: RunConfig, context: StageContext) -> None:
    """Measure every mixer and control, and write results, table and figures.

    Raises:
        ValueError: no held-out document fits, a shard is broken, a task is unknown or its data are
            not there, or nothing is trained yet.
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
    return {
        f"{name}/{task}/{metric}": value
        for rows in (results["mixers"], results["controls"])
        for name, tasks in rows.items()
        for task, metrics in tasks.items()
        if not task.endswith(BINNED)
        for metric, value in metrics.items()
    }


class _Evaluation:
    """One run of the stage."""

    def __init__(self, config: RunConfig, context: StageContext) -> None:
        self.config, self.context, self.settings = config, context, config.eval
        self.subjects = Subjects(config, context)
        self.tasks = TaskRuns(context, self.subjects)
        self.documents = DocumentScores(context, self.subjects) if config.eval.kinds else None

    def run(self) -> dict[str, Any]:
        present, missing = self._present()
        metrics: dict[str, Metrics] = {subject.name: {} for subject in present}
        if self.documents is not None:
            self._measure_documents(self.documents, present, metrics)
        if self.tasks.wanted:
            for subject in present:
                self.subjects.generator(subject)
            self.subjects.release_training_models()
        generated = self.tasks.run(present)
        for subject in present:
            metrics[subject.name].update(generated.metrics.get(subject.name, {}))
            if not subject.is_control:
                metrics[subject.name].update(self._costs(subject))
                metrics[subject.name].update(self._memory(subject, metrics[subject.name]))
        return {
            "mixers": {s.name: metrics[s.name] for s in present if not s.is_control},
            "controls": {s.name: metrics[s.name] for s in present if s.is_control},
            "tasks": generated.tasks,
            "missing": missing,
            "config": self._description(),
            "commit": self.context.commit,
        }

    def _present(self) -> tuple[list[Subject], dict[str, str]]:
        """Subjects that have weights, and why others have none."""
        subjects, weights = subjects_of(self.settings), self.subjects.weights
        missing = {
            subject.name: why
            for subject in subjects
            if not subject.is_control and (why := weights[BRANCH_OF[subject.mixer]].missing)
        }
        for name, why in missing.items():
            self._say(f"{name} is not measured: {why}")
        for found in weights.values():
            if found.before is not None and not found.missing:
                self._say(f"{found.branch} is measured without {found.before}: not finished")
        present = [subject for subject in subjects if subject.mixer not in missing]
        if not present:
            raise ValueError(
                "none of eval.mixers has weights: " + "; ".join(missing.values()) + "; train first"
            )
        return present, missing

    def _measure_documents(
        self, documents: DocumentScores, present: Sequence[Subject], metrics: dict[str, Metrics]
    ) -> None:
        """Add loss, recall and speed on held-out documents, and α and η after them."""
        measured = {subject.name: documents.measure(subject) for subject in present}
        speeds = documents.speeds([subject for subject in present if not subject.is_control])
        for subject in present:
            own = metrics[subject.name]
            own.update(documents.metrics(measured[subject.name]))
            if subject.name in speeds:
                own["speed"] = {"prefill_tokens_per_s": speeds[subject.name]}
            own.update(memory_metrics(measured[subject.name].memory))
        if "full" not in metrics or "swa" not in metrics:
            return
        for subject in present:
            if subject.mixer not in ("full", "swa"):
                metrics[subject.name]["gap_closed_beyond_window"] = gap_closed(
                    metrics[subject.name], full=metrics["full"], window=metrics["swa"]
                )

    def _costs(self, subject: Subject) -> Metrics:
        shape = mixer_shape(self.config, self.subjects.base)
        return cost_metrics(subject.mixer, shape, self.settings, self._length)

    def _memory(self, subject: Subject, known: Metrics) -> Metrics:
        """Mean |α| by layer where no document told it, and how the memory's state grows."""
        found: Metrics = {}
        if BRANCH_OF[subject.mixer] != "none" and "alpha_by_layer" not in known:
            found["alpha_by_layer"] = self.subjects.alphas(subject)
        if subject.mixer == "allmem" and self.documents is not None and self.settings.memory_norms:
            longest = max(self.documents.documents, key=lambda document: len(document.tokens))
            found.update(memory_norms(self.subjects.generator(subject), longest.tokens.tolist()))
        return found

    @property
    def _length(self) -> int:
        """Tokens of the longest document, or of the longest context that tasks may have."""
        return self.subjects.max_positions if self.documents is None else self.documents.length

    def _description(self) -> dict[str, Any]:
        return {
            **asdict(self.settings),
            "length": self._length,
            "num_documents": 0 if self.documents is None else len(self.documents.documents),
            "recipe": self.config.recipe,
            "model": self.config.model.path or "",
            "branch": self.config.mixer.branch,
            "weights": {
                branch: list(weights.checkpoints)
                for branch, weights in self.subjects.weights.items()
                if not weights.missing
            },
            "max_positions": self.subjects.max_positions,
            "dtype": self.subjects.dtype,
            "device": self.subjects.device_name,
            "num_threads": torch.get_num_threads(),
        }

    def _say(self, line: str) -> None:
        self.context.say(f"{self.context.entry}: {line}")
