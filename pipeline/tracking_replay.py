"""Puts runs that are on the disk into an MLflow store, from their own files, as often as wanted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config import flatten
from pipeline.context import DONE_FILE, folder_name
from pipeline.lineage import data_entry
from pipeline.schema import TrackingSettings
from pipeline.tracking import MlflowRecorder
from pipeline.tracking_notes import Notes, Tracked


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's: it has a stage's configuration and metrics."""
    return bool(stages_of(folder))


def stages_of(run_dir: Path) -> list[tuple[str, Path]]:
    """Entries with metrics in the order of the recipe, each with its configuration's file."""
    found: dict[str, tuple[str, Path]] = {}
    order: list[str] = []
    for path in sorted((run_dir / "configs").glob("*.json")):
        if not (run_dir / path.stem / "metrics.jsonl").is_file():
            continue
        entries = json.loads(path.read_text(encoding="utf-8")).get("stages", [])
        order = max(order, [folder_name(entry) for entry in entries], key=len)
        names = {folder_name(entry): entry for entry in entries}
        found[path.stem] = (names.get(path.stem, path.stem), path)
    ranks = {label: place for place, label in enumerate(order)}
    return [found[label] for label in sorted(found, key=lambda x: (ranks.get(x, 99), x))]


def replay(run_dir: Path, store: Path, *, say: Callable[[str], None]) -> str:
    """Send all stages of a run to `store/mlflow.db`; what is there already is not sent again.

    Args:
        run_dir: folder of the run; nothing in it is changed but `evaluate/report.html`.
        store: folder of the database, the artifacts and the notes of what was sent.
        say: prints a line for each stage.

    Returns:
        MLflow's id of the experiment.

    Raises:
        ValueError: the folder is no run's.
    """
    stages = stages_of(run_dir)
    if not stages:
        raise ValueError(
            f"{run_dir} is no run: it needs configs/STAGE.json and STAGE/metrics.jsonl; give the "
            "run.dir of a run"
        )
    store.mkdir(parents=True, exist_ok=True)
    settings = TrackingSettings(uri=f"sqlite:///{store.resolve()}/mlflow.db", timeout_s=60)
    name = str(run_dir.resolve()).strip("/").replace("/", "_")
    notes = Notes(store / "notes" / f"{name}.json")
    (store / "notes").mkdir(exist_ok=True)
    experiment = ""
    for entry, path in stages:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        done = run_dir / folder_name(entry) / DONE_FILE
        mark = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else {}
        recorder = MlflowRecorder(
            Tracked(
                entry=entry,
                run_dir=run_dir,
                data_dir=run_dir / folder_name(data_entry(entry)),
                params=flatten(config),
                recipe=config.get("recipe", run_dir.name),
                commit=mark.get("commit", "unknown"),
                settings=settings,
                notes=notes,
            )
        )
        recorder.ship()
        recorder.ship_files()
        recorder.close("FINISHED" if mark else "KILLED")
        experiment = recorder.experiment_id
        say(f"{run_dir}: {entry}" + ("" if mark else " (not finished)"))
    return experiment
