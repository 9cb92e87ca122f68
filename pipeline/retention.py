"""Which checkpoints stay: the newest ones, and the best by a loss.

Each checkpoint's `state.json` has its own score, so `best.json` can be made again from what is
there; it names the best ones for people and for `run.checkpoint=best`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.atomic import remove, write_json
from pipeline.checkpoint import complete_checkpoints, latest_checkpoint, load_state
from pipeline.context import folder_name
from pipeline.lineage import is_last
from pipeline.schema import RunConfig

BEST_FILE = "best.json"
"""`metric` and `checkpoints` (`folder`, `loss`), the best first, beside the checkpoints."""

HELD_OUT = "eval/loss"
TRAINING = "train/loss"


@dataclass(frozen=True, kw_only=True)
class Retention:
    """How many checkpoints of a stage stay, and what makes one the best."""

    keep_last: int
    """Newest checkpoints that stay."""
    keep_best: int = 0
    """Checkpoints of the lowest loss that stay as well."""
    metric: str = TRAINING
    """The loss: `eval/loss`, or `train/loss`, the mean since the checkpoint before."""


def prune(folder: Path, retention: Retention) -> None:
    """Name the best checkpoints, and delete those that are neither the best nor the newest.

    Raises:
        OSError: `best.json` cannot be written; nothing is deleted then.
    """
    found = complete_checkpoints(folder)
    if retention.keep_best:
        ranked = _ranked(found, retention.metric)[: retention.keep_best]
        if ranked:
            best = [{"folder": path.name, "loss": loss} for loss, path in ranked]
            write_json(folder / BEST_FILE, {"metric": retention.metric, "checkpoints": best})
    kept = {path.name for path in found[-retention.keep_last :]} | set(_named(folder))
    for path in found:
        if path.name not in kept:
            remove(path)


def _ranked(found: list[Path], metric: str) -> list[tuple[float, Path]]:
    """(loss, checkpoint), the lowest first, of those whose score is this metric."""
    scores = [(load_state(path).get("score") or {}, path) for path in found]
    losses = [(score["loss"], path) for score, path in scores if score.get("metric") == metric]
    return sorted((loss, path) for loss, path in losses if math.isfinite(loss))


def _named(folder: Path) -> list[str]:
    """Names in `best.json`, the best first."""
    file = folder / BEST_FILE
    if not file.is_file():
        return []
    best: Any = json.loads(file.read_text(encoding="utf-8"))
    return [str(entry["folder"]) for entry in best["checkpoints"]]


def best_checkpoint(folder: Path) -> Path:
    """The checkpoint of the lowest loss.

    Raises:
        ValueError: none is named, or it is gone.
    """
    whole = {path.name: path for path in complete_checkpoints(folder)}
    for name in _named(folder):
        if name in whole:
            return whole[name]
    raise ValueError(
        f"run.checkpoint=best, but {folder / BEST_FILE} names no checkpoint that is there; set "
        "run.checkpoint=newest, or train with keep_best=1 in the stage's section"
    )


def chosen_checkpoint(config: RunConfig, run_dir: Path, entry: str) -> Path | None:
    """The checkpoint of a stage that `evaluate` and `export` take; None where there is none.

    `run.checkpoint=best` counts for stages that no other one starts from: what a later stage was
    trained on top of is the newest.

    Raises:
        ValueError: the best is asked for and none is named.
    """
    folder = run_dir / folder_name(entry) / "checkpoints"
    newest = latest_checkpoint(folder)
    if newest is None or config.run.checkpoint == "newest" or not is_last(config, entry):
        return newest
    return best_checkpoint(folder)
