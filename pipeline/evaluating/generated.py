"""Long-context and short tasks for all subjects, task by task, so that all see the same prompts."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from evals.short import SHORT_TASKS
from evals.task import build_tasks
from pipeline.config import resolve_path
from pipeline.context import StageContext
from pipeline.distributed import on_main
from pipeline.evaluating.program import program_digest
from pipeline.evaluating.short_tasks import (
    load_harness_tasks,
    local_place,
    quiet,
    require_harness,
    run_short_task,
)
from pipeline.evaluating.speaker import Sampling
from pipeline.evaluating.subjects import Subjects
from pipeline.evaluating.suites import (
    Asking,
    Metrics,
    Prepared,
    TextTokenizer,
    describe,
    predictions,
    prepare,
    prepare_on_ranks,
    suite_metrics,
)
from pipeline.evaluation import Subject
from pipeline.tokenizer import open_tokenizer
from pipeline.wording import count

_REASONS = 3
"""Refused examples whose reason is printed."""


@dataclass(kw_only=True)
class Generated:
    """What tasks gave."""

    metrics: dict[str, Metrics] = field(default_factory=dict)
    """By subject, then task."""
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What a reader must know of each task: prompts' source, metric, counts."""

    def add(self, subject: str, metrics: Metrics) -> None:
        """Take in a subject's metrics of a task."""
        self.metrics.setdefault(subject, {}).update(metrics)


class TaskRuns:
    """The tasks of a run's configuration."""

    def __init__(self, context: StageContext, subjects: Subjects) -> None:
        """Check names, packages and data folder before anything is computed.

        Raises:
            ValueError: an unknown task, a package or a folder that is not there.
        """
        self.context, self.subjects, self.settings = context, subjects, subjects.settings
        self.tokenizer: Any = None
        self.tasks = []
        self.data_dir = None
        if self.settings.short_tasks:
            require_harness(self.settings.short_tasks)
            self.data_dir = self._data_dir()
        if self.settings.suites.tasks or self.settings.short_tasks:
            self.tokenizer = open_tokenizer(subjects.config)
        if self.settings.suites.tasks:
            self.tasks = build_tasks(self.settings.suites, tokenizer=TextTokenizer(self.tokenizer))

    @property
    def wanted(self) -> bool:
        """Whether there is any task."""
        return bool(self.tasks or self.settings.short_tasks)

    def _data_dir(self) -> Any:
        if self.settings.data_dir is None:
            return None
        path = resolve_path(self.settings.data_dir)
        if not path.is_dir():
            raise ValueError(
                f"eval.data_dir={self.settings.data_dir} is no folder; name the one that holds the "
                "data of eval.short_tasks, or leave it out to take them from the hub"
            )
        for name in self.settings.short_tasks:
            local_place(name, path)
        return path

    def run(self, present: Sequence[Subject]) -> Generated:
        """Ask every subject every task: controls the long ones alone.

        Raises:
            StopRequested: asked to stop; finished answers are kept.
        """
        found = Generated()
        for task in self.tasks:
            prepared = prepare_on_ranks(
                self.context,
                functools.partial(
                    prepare,
                    task,
                    TextTokenizer(self.tokenizer),
                    max_positions=self.subjects.max_positions,
                    chat_template=self._chat_template(present),
                    folder=self.context.dir,
                ),
            )
            self._tell(prepared)
            found.tasks[prepared.name] = describe(prepared)
            for subject in present:
                if metrics := self._ask(prepared, subject, present):
                    found.add(subject.name, metrics)
        for name in self.settings.short_tasks:
            found.tasks[f"short/{name}"] = self._describe_short(name)
            tasks = self._harness_tasks(name)
            for subject in present:
                if not subject.is_control:
                    metrics = self._short(name, tasks, subject)
                    found.tasks[f"short/{name}"]["n"] = int(metrics[f"short/{name}"]["n"])
                    found.add(subject.name, metrics)
        return found

    def _ask(
        self, prepared: Prepared, subject: Subject, present: Sequence[Subject]
    ) -> Metrics | None:
        """A subject's metrics of a long task."""
        if subject.settings.shuffle_state and len(prepared.examples) < 2:
            self._say(f"{prepared.name}: no second example whose state {subject.name} could read")
            return None
        generation = self.settings.generation
        asking = Asking(
            context=self.context,
            sampling=self._sampling(),
            num_samples=generation.num_samples,
            batch_size=generation.batch_size,
            resamples=generation.resamples,
            window_size=self.settings.window_size,
            num_sinks=self.settings.num_sinks,
        )
        if not prepared.examples:
            return suite_metrics(prepared, [], asking)
        writer = next((s for s in present if s.mixer == subject.mixer and not s.is_control), None)
        said = predictions(
            prepared,
            self.subjects.speaker(subject),
            None if writer is None else self.subjects.foreign(subject, writer),
            asking,
            subject=subject.name,
            key=self._key(subject),
        )
        return suite_metrics(prepared, said, asking)

    def _harness_tasks(self, name: str) -> Mapping[str, Any]:
        """The harness's tasks, on rank 0 first, which alone fetches data that are not there."""
        self._say(f"short/{name}: reading the data")
        found: list[Mapping[str, Any]] = []
        with quiet():
            on_main(
                self.context.ranks, lambda: found.append(load_harness_tasks(name, self.data_dir))
            )
            return found[0] if found else load_harness_tasks(name, self.data_dir)

    def _short(self, name: str, tasks: Mapping[str, Any], subject: Subject) -> Metrics:
        generation = self.settings.generation
        metrics = run_short_task(
            name,
            tasks,
            self.subjects.speaker(subject),
            self.context,
            subject=subject.name,
            key=self.subjects.key(subject, program_digest(), self.subjects.config.run.seed),
            limit=self.settings.short_limit,
            batch_size=generation.batch_size,
            seed=self.subjects.config.run.seed,
            resamples=generation.resamples,
            chat=self._wants_chat(subject),
        )
        return {f"short/{name}": metrics}

    def _sampling(self) -> Sampling:
        generation = self.settings.generation
        return Sampling(
            temperature=generation.temperature,
            top_p=generation.top_p,
            seed=self.subjects.config.run.seed,
        )

    def _key(self, subject: Subject) -> str:
        sampling = self._sampling()
        drawn = asdict(sampling) if sampling.temperature else None
        return self.subjects.key(subject, program_digest(), drawn)

    def _wants_chat(self, subject: Subject) -> bool:
        """Whether tasks that want the chat template get it.

        Raises:
            ValueError: it is asked for and the tokenizer has none.
        """
        wanted = self.settings.generation.chat
        has = self.subjects.speaker(subject).has_chat
        if wanted == "always" and not has:
            raise ValueError(
                "eval.generation.chat=always but the tokenizer has no chat template; set it to "
                "auto or never"
            )
        return has and wanted != "never"

    def _chat_template(self, present: Sequence[Subject]) -> Any:
        first = present[0]
        return self.subjects.speaker(first).user_turn if self._wants_chat(first) else None

    def _tell(self, prepared: Prepared) -> None:
        """Say what is not as the data are: refused and cut prompts, prompts of our own."""
        for reason in prepared.refused[:_REASONS]:
            self._say(f"refused: {reason}")
        if (more := len(prepared.refused) - _REASONS) > 0:
            self._say(f"{prepared.name}: {count(more, 'example')} more refused")
        if cut := sum(num > 0 for num in prepared.num_cut):
            self._say(
                f"{prepared.name}: {cut} of {len(prepared.examples)} prompts were too long and "
                "lost their middle"
            )
        if prepared.task.prompts_source == "own":
            self._say(f"{prepared.name}: prompts of our own, not comparable with published tables")

    def _describe_short(self, name: str) -> dict[str, Any]:
        import lm_eval

        short = SHORT_TASKS[name]
        return {
            "suite": "short",
            "metric": short.label(short.metrics[0]),
            "prompts": f"upstream:lm_eval {lm_eval.__version__} {short.harness}",
            "num_fewshot": short.num_fewshot,
            "num_samples": short.num_samples,
            "data": "hub" if self.data_dir is None else "local",
        }

    def _say(self, line: str) -> None:
        self.context.say(f"{self.context.entry}: {line}")
