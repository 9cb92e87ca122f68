"""Files that a stage gives to MLflow: `artifacts.json` in run.dir, the queue that tracking reads.

Like `metrics.jsonl` it is written first and sent later, so that what a dead server did not take is
sent by the next process; it is written with tracking off, too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.atomic import write_json

ARTIFACTS_FILE = "artifacts.json"


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One file for MLflow."""

    path: Path
    """Where it is."""
    folder: str = ""
    """Folder among the run's artifacts; empty for their root."""
    on_parent: bool = False
    """Whether the recipe's own run gets it too, under the stage's name."""


def read_artifacts(run_dir: Path, label: str) -> list[Artifact]:
    """Files given by the stage whose folder is `label`, in the order in which they were given."""
    return [
        Artifact(path=run_dir / item["path"], folder=item["folder"], on_parent=item["on_parent"])
        for item in _all(run_dir).get(label, [])
    ]


def add_artifacts(run_dir: Path, label: str, artifacts: Sequence[Artifact]) -> None:
    """Note files; one that is noted already is not noted twice."""
    items = {(item["path"], item["folder"]): item for item in _all(run_dir).get(label, [])}
    for artifact in artifacts:
        path = artifact.path
        inside = path.relative_to(run_dir) if path.is_relative_to(run_dir) else path.resolve()
        item = {"path": str(inside), "folder": artifact.folder, "on_parent": artifact.on_parent}
        items[(item["path"], artifact.folder)] = item
    _write(run_dir, label, list(items.values()))


def clear_artifacts(run_dir: Path, label: str) -> None:
    """Forget a stage's files, before it gives new ones."""
    if label in _all(run_dir):
        _write(run_dir, label, [])


def _write(run_dir: Path, label: str, items: list[dict[str, Any]]) -> None:
    write_json(run_dir / ARTIFACTS_FILE, {**_all(run_dir), label: items})


def _all(run_dir: Path) -> dict[str, Any]:
    path = run_dir / ARTIFACTS_FILE
    if not path.is_file():
        return {}
    noted: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return noted
