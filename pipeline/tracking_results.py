"""Sends an evaluation: a run for each mixer, a page of all figures, the table on runs' pages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from evals.config import COLOURS
from pipeline.atomic import write_atomically
from pipeline.tracking_evaluation import Point, describe, points_of, report_page, subjects
from pipeline.tracking_notes import Notes, Tracked, stamp_of

_TITLE = (
    "**{recipe}: evaluation.** Each mixer has a run of its own under `{label}`; in charts it is a "
    "line of its own. All figures on one page: *Artifacts*, `report.html`."
)


class Server(Protocol):
    """What of `pipeline.tracking.MlflowRecorder` is used here."""

    tracked: Tracked
    notes: Notes
    client: Any
    runs: dict[str, str]

    def open_run(self, place: str, name: str, tags: Mapping[str, str]) -> str:
        """The run noted for a place, or a new one."""

    def send_points(self, run_id: str, points: Sequence[Point], when: int) -> None:
        """Log points to a run."""


def send_evaluation(server: Server) -> None:
    """Send `results.json` of a finished evaluation; what is sent already is not sent again."""
    folder, label = server.tracked.dir, server.tracked.label
    path = folder / "results.json"
    if not path.is_file():
        return
    stamp = stamp_of(path)
    results = json.loads(path.read_text(encoding="utf-8"))
    about = results.get("tasks", {})
    for subject, tasks in subjects(results).items():
        _send_subject(server, subject, points_of(tasks, about), stamp)
    if server.notes.read(label).get("page") == stamp:
        return
    page = folder / "report.html"
    text = report_page(folder, f"{server.tracked.title}: evaluation")
    write_atomically(page, lambda file: _write(file, text))
    title = _TITLE.format(recipe=server.tracked.title, label=label)
    note = describe(title, (folder / "table.md").read_text(encoding="utf-8"))
    for kind, place in (("child", None), ("parent", label)):
        server.client.log_artifact(server.runs[kind], str(page), place)
        server.client.set_tag(server.runs[kind], "mlflow.note.content", note)
    server.notes.add(label, page=stamp)


def _send_subject(server: Server, subject: str, points: list[Point], stamp: list[int]) -> None:
    """One mixer's run; of an evaluation that was done again, the old one is thrown away."""
    place = f"{server.tracked.label}/{subject}"
    note = server.notes.read(place)
    known = note.get("results") if note.get("uri") == server.tracked.uri else None
    if known == stamp:
        return
    if known is not None:
        server.client.delete_run(note["run_id"])
        server.notes.write(place, {})
    tags = {"mlflow.parentRunId": server.runs["child"], "stage": place, "kind": "mixer"}
    if subject in COLOURS:  # MLflow's own follow from the run's id, and can be nearly the same
        tags["mlflow.runColor"] = COLOURS[subject]
    run_id = server.open_run(place, f"{subject} ({server.tracked.title})", tags)
    when = stamp[1] // 1_000_000
    server.send_points(run_id, points, when)
    server.client.set_terminated(run_id, "FINISHED", when)
    server.notes.add(place, results=stamp)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
