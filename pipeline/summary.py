"""The last lines of a run: the evaluation's table, and where everything lies."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from evals.paper_tables import subjects_of
from evals.table import has_documents, terminal_table
from pipeline.config import split_entry
from pipeline.context import folder_name, is_finished
from pipeline.schema import RunConfig
from pipeline.wording import count

TABLE_WIDTH = 80
"""Columns that the table needs, whatever the terminal says it has."""


def print_summary(config: RunConfig, run_dir: Path) -> None:
    """Print on stdout the table of `evaluate/results.json` and paths that a user wants next.

    Only what finished stages of the recipe left behind is shown.
    """
    results = run_dir / "evaluate" / "results.json"
    if "evaluate" in config.stages and is_finished(run_dir, "evaluate") and results.is_file():
        console = Console(width=max(Console().width, TABLE_WIDTH))
        for table in _tables(json.loads(results.read_text(encoding="utf-8"))):
            console.print(table)
        print()
    for title, text in _places(config, run_dir):
        print(f"{title:<9}{text}")


def _tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """Loss, recall and costs, then the scores of the tasks; whichever there are."""
    if has_documents(results):
        yield terminal_table(results)
    shown = [
        s for s in subjects_of({"": results}) if any(s.score(task) is not None for task in s.tasks)
    ]
    if not shown:
        return
    table = Table(
        title="Tasks",
        caption="Scores, 0 to 100; table.md has errors, controls and the meaning of the signs.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("task", no_wrap=True)
    for subject in shown:
        table.add_column(subject.label, justify="right", no_wrap=True)
    for task in results["tasks"]:
        table.add_row(task, *(subject.cell(task) for subject in shown))
    yield table


def _places(config: RunConfig, run_dir: Path) -> list[tuple[str, str]]:
    places = []
    finished = [entry for entry in config.stages if is_finished(run_dir, entry)]
    if "evaluate" in finished:
        folder = run_dir / "evaluate"
        figures = count(len(list((folder / "plots").glob("*.png"))), "figure")
        places += [("results", f"{folder / 'results.json'}, table.md beside it")]
        places += [("plots", f"{folder / 'plots'} ({figures})")]
    if "pretrain" in finished:
        saved = config.pretrain.save_to or run_dir / "pretrain" / "hf"
        places.append(("base", f"{saved}"))
    for entry in finished:
        if split_entry(entry)[0] == "export":
            path = run_dir / folder_name(entry)
            call = "AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)"
            places += [("export", f"{path}"), ("load", call)]
    if config.tracking.enabled:
        places.append(("metrics", _tracking(config.tracking.uri, run_dir)))
    return places


def _tracking(uri: str | None, run_dir: Path) -> str:
    """The command that shows the runs, or the server's address."""
    if uri is not None and "://" in uri and not uri.startswith("sqlite"):
        return uri
    return f"{_mlflow()} ui --backend-store-uri {uri or f'sqlite:///{run_dir}/mlflow.db'}"


def _mlflow() -> str:
    """How a shell finds the `mlflow` of this Python: by name, or by path outside its venv."""
    own = Path(sys.executable).parent / "mlflow"
    on_path = shutil.which("mlflow")
    if not own.is_file() or (on_path is not None and Path(on_path) == own):
        return "mlflow"
    inside = own.is_relative_to(Path.cwd())
    return os.path.relpath(own) if inside else str(own)
