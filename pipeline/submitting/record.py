"""`submit.json` in run.dir: which jobs were submitted for which stages, written after each one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.atomic import write_json

RECORD_FILE = "submit.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class SubmittedJob:
    """A job of the chain."""

    entry: str
    """The stage."""
    job: str
    """Slurm's id."""
    after: str | None
    """The job that it waits for."""
    log: str
    """Pattern of its output: `%j` is the id, `%A_%a` of an array."""
    command: tuple[str, ...]
    """What submitted it."""
    submitted: str
    """When, ISO 8601."""
    state: str = "PENDING"
    """The last state that was seen, for when Slurm has forgotten the job."""
    reason: str = ""
    """Why, with it."""
    run_time: str = ""
    """How long it had run by then."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """All that is known of a run's chain."""

    recipe: str
    words: tuple[str, ...]
    """What decides the stages, as given."""
    stages: tuple[str, ...]
    jobs: tuple[SubmittedJob, ...] = ()
    """In the chain's order, the newest job of each stage."""
    history: tuple[SubmittedJob, ...] = field(default=())
    """Jobs of stages that were submitted again since."""

    def job_of(self, entry: str) -> SubmittedJob | None:
        """The newest job of a stage."""
        return next((job for job in self.jobs if job.entry == entry), None)

    def with_job(self, job: SubmittedJob) -> Record:
        """The record with a new job; a former one of the stage moves to the history."""
        former = tuple(old for old in self.jobs if old.entry == job.entry)
        kept = [old for old in self.jobs if old.entry != job.entry]
        order = {entry: place for place, entry in enumerate(self.stages)}
        jobs = sorted([*kept, job], key=lambda one: order.get(one.entry, len(order)))
        return replace(self, jobs=tuple(jobs), history=(*self.history, *former))

    def with_states(self, states: Mapping[str, tuple[str, str, str]]) -> Record:
        """The record with the states (state, reason, time) of jobs by id."""
        jobs = []
        for job in self.jobs:
            state, reason, run_time = states.get(job.job, (job.state, job.reason, job.run_time))
            jobs.append(replace(job, state=state, reason=reason, run_time=run_time))
        return replace(self, jobs=tuple(jobs))


def read_record(run_dir: Path) -> Record | None:
    """What was submitted for this run, or None.

    Raises:
        ValueError: the file is not one that `write_record` writes.
    """
    path = run_dir / RECORD_FILE
    if not path.is_file():
        return None
    try:
        plain: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Record(
            recipe=plain["recipe"],
            words=tuple(plain["words"]),
            stages=tuple(plain["stages"]),
            jobs=tuple(_job(one) for one in plain["jobs"]),
            history=tuple(_job(one) for one in plain["history"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); look at squeue, then delete that file"
        ) from error


def _job(plain: dict[str, Any]) -> SubmittedJob:
    return SubmittedJob(**{**plain, "command": tuple(plain["command"])})


def write_record(run_dir: Path, record: Record) -> None:
    """Write it, whole or not at all."""
    write_json(run_dir / RECORD_FILE, {"schema_version": SCHEMA_VERSION, **asdict(record)})
