"""The chain as a table: states, why a stage does not run, and how the log of a failed one ends."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.context import folder_name, is_finished
from pipeline.metrics_log import read_lines
from pipeline.submitting.queue import GONE, JobState
from pipeline.submitting.record import Record, SubmittedJob

WIDTH = 118
"""Columns where the output is no terminal."""
_LOG_LINES = 12
_BECAUSE = "because "
_NEVER = "DependencyNeverSatisfied"
_COLOURS = {"COMPLETED": "green", "RUNNING": "cyan", "PENDING": "yellow", "done": "green"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A stage of the chain."""

    entry: str
    job: str
    state: str
    note: str
    time: str = ""
    failed: bool = False
    """Whether it failed by itself, and not because a stage before it did."""
    log: str = ""


def rows_of(record: Record, states: Mapping[str, JobState], run_dir: Path) -> list[Row]:
    """What is known of every stage.

    Args:
        record: the jobs.
        states: of the jobs by id, as Slurm says now.
        run_dir: where marks and logs are.
    """
    rows: list[Row] = []
    by_job: dict[str, Row] = {}
    for entry in record.stages:
        job = record.job_of(entry)
        if job is None:
            there = is_finished(run_dir, entry)
            note = "complete before, not submitted" if there else "was not submitted"
            rows.append(Row(entry=entry, job="", state="done" if there else "", note=note))
            continue
        row = _row(job, states[job.job], by_job.get(job.after or ""), run_dir)
        by_job[job.job] = row
        rows.append(row)
    return rows


def _row(job: SubmittedJob, state: JobState, before: Row | None, run_dir: Path) -> Row:
    name, note, failed = state.state, state.reason, False
    if name == GONE and is_finished(run_dir, job.entry):
        name, note = "COMPLETED", "Slurm has forgotten the job; DONE.json is there"
    elif name in ("PENDING", "CANCELLED") and before is not None and _NEVER in state.reason:
        note = f"{_BECAUSE}{_culprit(before)}"
    elif name == "PENDING" and before is not None and state.reason == "Dependency":
        note = f"waits for {before.entry}"
        if before.failed or _BECAUSE in before.note:
            note = f"will be cancelled, {_BECAUSE}{_culprit(before)}"
    elif name == "RUNNING":
        note = ", ".join(filter(None, (_progress(run_dir, job.entry), state.nodes)))
    elif state.has_failed:
        failed = True
        if name == "CANCELLED" and state.reason in ("", "None"):
            note = "cancelled by hand (python -m pipeline.submit cancel, or scancel)"
    if state.restarts:
        note = f"{note}; requeued {state.restarts} ×".removeprefix("; ")
    if state.tasks:
        note = f"{state.tasks}; {note}".removesuffix("; ")
    return Row(
        entry=job.entry,
        job=job.job,
        state=name,
        note=note,
        time=state.run_time,
        failed=failed,
        log=job.log,
    )


def _culprit(before: Row) -> str:
    """Why the stages after this one do not run."""
    if _BECAUSE in before.note and not before.failed:
        return before.note.partition(_BECAUSE)[2]
    return f"{before.entry} (job {before.job}) is {before.state}"


def _progress(run_dir: Path, entry: str) -> str:
    """The last line of a stage's metrics, in words."""
    path = run_dir / folder_name(entry) / "metrics.jsonl"
    last = deque((line for _, line in read_lines(path)), maxlen=1)
    if not last:
        return ""
    values = last[0]
    parts = [f"step {values['step']}"]
    if isinstance(loss := values.get("train/loss"), float):
        parts.append(f"loss {loss:.4f}")
    if isinstance(speed := values.get("tokens_per_s"), float):
        parts.append(f"{speed:.0f} tokens/s")
    return ", ".join(parts)


def show(console: Console, title: str, rows: Sequence[Row]) -> None:
    """The table, then the end of the log of each stage that failed by itself."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("stage", "job", "state", "time"):
        table.add_column(name, no_wrap=True)
    table.add_column("", overflow="fold")
    for row in rows:
        colour = "red" if row.failed else _COLOURS.get(row.state, "")
        table.add_row(row.entry, row.job, Text(row.state, style=colour), row.time, Text(row.note))
    console.print(table)
    for row in rows:
        if row.failed:
            _show_log(console, row)


def _show_log(console: Console, row: Row) -> None:
    path = find_log(row.log, row.job)
    if path is None:
        where = row.log.replace("%j", row.job).replace("%A", row.job)
        console.print(
            Text(f"{row.entry} has printed nothing: {where} is not there"), soft_wrap=True
        )
        return
    console.print(Text(f"{row.entry}: the end of {path}", style="bold"), soft_wrap=True)
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in deque(file, maxlen=_LOG_LINES):
            console.print(Text(f"  {line.rstrip()}"), soft_wrap=True)


def find_log(pattern: str, job: str) -> Path | None:
    """The output of a job; of an array's the newest that speaks of an error, or else the newest."""
    name = Path(pattern.replace("%j", job).replace("%A", job).replace("%a", "*"))
    paths = sorted(name.parent.glob(name.name), key=lambda path: path.stat().st_mtime)
    blamed = [path for path in paths if b"error" in path.read_bytes()[-20_000:]]
    found = blamed or paths
    return found[-1] if found else None


def as_text(rows: Sequence[Row]) -> str:
    """The rows as JSON, for programs."""
    return json.dumps([row.__dict__ for row in rows], indent=2)
