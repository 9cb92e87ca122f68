"""Local files that an evaluation's tasks read: when one changes, the stage is done again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from evals.config import EvalConfig
from evals.short import SHORT_TASKS
from evals.task import chosen_names
from pipeline.config import resolve_path
from pipeline.evaluating.short_data import find_file, find_repository

_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".bz2", ".zip", ".py", ".md")


def data_files(settings: EvalConfig) -> dict[str, Path]:
    """By a name that stays where the folder moves; what comes from the hub is not among them."""
    found: dict[str, Path] = {}
    for name, place in _places(settings):
        if place.is_file():
            found[f"{name}/{place.name}"] = place
        elif place.is_dir():
            files = sorted(f for f in place.rglob("*") if f.suffix in _SUFFIXES and f.is_file())
            found.update({f"{name}/{file.relative_to(place)}": file for file in files})
    return found


def _places(settings: EvalConfig) -> Iterator[tuple[str, Path]]:
    suites = settings.suites
    used = {name.partition("/")[0] for name in chosen_names(suites)}
    for suite, keys in (
        ("longbench", ("longbench_data", "longbench_prompts")),
        ("infinitebench", ("infinitebench_data", "infinitebench_prompts")),
        ("lveval", ("lveval_data", "lveval_prompts")),
        ("ruler", ("ruler_data",)),
        ("recall", ("recall_filler",)),
    ):
        if suite in used:
            for key in keys:
                if place := getattr(suites, key):
                    yield f"eval.suites.{key}", Path(place).expanduser()
    if settings.data_dir is not None:
        folder = resolve_path(settings.data_dir)
        for name in settings.short_tasks:
            short = SHORT_TASKS[name]
            place = find_repository(folder, short.dataset) or find_file(folder, short.files)
            if place is not None:
                yield f"eval.data_dir/{name}", place
