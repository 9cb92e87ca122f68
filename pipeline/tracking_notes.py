"""What is told of a stage, and `tracking.json`: which runs of which server stand for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.atomic import write_json
from pipeline.config import split_entry
from pipeline.context import folder_name
from pipeline.schema import TrackingSettings
from pipeline.tracking_system import SYSTEM_FOLDER

PARENT = "(recipe)"
"""Place of the recipe's own run."""


class Notes:
    """Server, run id and key of the parent and of each stage, and what they were sent."""

    def __init__(self, path: Path) -> None:
        """Args: path: the file, `tracking.json` in run.dir."""
        self._path = path

    def read(self, place: str) -> dict[str, Any]:
        """What is noted for a stage's label, for one of its parts or for the parent."""
        return dict(self._all().get(place, {}))

    def write(self, place: str, note: Mapping[str, Any]) -> None:
        """Note it, atomically."""
        write_json(self._path, {**self._all(), place: dict(note)})

    def add(self, place: str, **values: Any) -> None:
        """Note some values beside the others."""
        self.write(place, {**self.read(place), **values})

    def _all(self) -> dict[str, Any]:
        if not self._path.is_file():
            return {}
        notes: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
        return notes


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """One stage's folder, and what is told of it beside its files."""

    entry: str
    run_dir: Path
    data_dir: Path
    params: Mapping[str, Any]
    """Flat configuration."""
    recipe: str
    commit: str
    settings: TrackingSettings
    notes: Notes

    @property
    def label(self) -> str:
        """Name of the stage's folder."""
        return folder_name(self.entry)

    @property
    def stage(self) -> str:
        """The stage without round and branch."""
        return split_entry(self.entry)[0]

    @property
    def dir(self) -> Path:
        """The stage's folder."""
        return self.run_dir / self.label

    @property
    def title(self) -> str:
        """Name of the recipe's run: the recipe, and the folder's name where it is another."""
        folder = self.run_dir.resolve().name
        own = self.recipe if folder == self.recipe else f"{self.recipe} {folder}"
        return self.settings.run_name or own

    @property
    def metrics_file(self) -> Path:
        """The stage's own metrics."""
        return self.dir / "metrics.jsonl"

    @property
    def system_file(self) -> Path:
        """The machine's."""
        return self.run_dir / SYSTEM_FOLDER / f"{self.label}.jsonl"

    @property
    def uri(self) -> str:
        """The server, or the file in run.dir."""
        return self.settings.uri or f"sqlite:///{self.run_dir.resolve()}/mlflow.db"

    @property
    def is_complete(self) -> bool:
        """Whether the server has every line and file."""
        return bool(self.notes.read(self.label).get("complete"))


def stamp_of(path: Path) -> list[int]:
    """Size and date (ns) of a file: what it was when it was sent."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
