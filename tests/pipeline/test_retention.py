"""Which checkpoints stay, and which one `evaluate` and `export` take."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import save_checkpoint
from pipeline.config import compose
from pipeline.lineage import is_last
from pipeline.retention import BEST_FILE, Retention, chosen_checkpoint, prune

LOSSES = {5: 2.0, 10: 1.0, 15: 1.5, 20: 1.2, 25: 3.0}


def save(folder: Path, step: int, loss: float | None, metric: str = "eval/loss") -> None:
    score = None if loss is None else {"metric": metric, "loss": loss}
    tensors = {"a": torch.zeros(2)}
    state = {"score": score}
    save_checkpoint(
        folder, step=step, model=tensors, optimizer=tensors, state=state, keep_last=1000
    )


def steps(folder: Path) -> list[int]:
    return sorted(int(name[5:]) for name in os.listdir(folder) if name.startswith("step_"))


def best(folder: Path) -> list[tuple[str, float]]:
    named = json.loads((folder / BEST_FILE).read_text())
    return [(entry["folder"], entry["loss"]) for entry in named["checkpoints"]]


def test_the_best_stay_beside_the_newest(tmp_path: Path):
    for step, loss in LOSSES.items():
        save(tmp_path, step, loss)
        prune(tmp_path, Retention(keep_last=1, keep_best=2, metric="eval/loss"))
    assert steps(tmp_path) == [10, 20, 25]
    assert best(tmp_path) == [("step_00000010", 1.0), ("step_00000020", 1.2)]


def test_without_keep_best_only_the_newest_stay(tmp_path: Path):
    for step, loss in LOSSES.items():
        save(tmp_path, step, loss)
        prune(tmp_path, Retention(keep_last=2))
    assert steps(tmp_path) == [20, 25]
    assert not (tmp_path / BEST_FILE).exists()


def test_a_best_one_is_not_deleted_when_keep_best_is_turned_off(tmp_path: Path):
    for step, loss in LOSSES.items():
        save(tmp_path, step, loss)
        keep_best = 1 if step <= 15 else 0
        prune(tmp_path, Retention(keep_last=1, keep_best=keep_best, metric="eval/loss"))
    assert steps(tmp_path) == [10, 25]


@pytest.mark.parametrize("loss", [None, float("nan"), float("inf")])
def test_a_checkpoint_without_a_finite_loss_is_never_the_best(tmp_path: Path, loss: float | None):
    save(tmp_path, 5, 9.0)
    save(tmp_path, 10, loss)
    save(tmp_path, 15, 0.1, metric="train/loss")
    prune(tmp_path, Retention(keep_last=3, keep_best=3, metric="eval/loss"))
    assert best(tmp_path) == [("step_00000005", 9.0)]


def test_best_json_is_made_again_after_a_kill_before_it_was_written(tmp_path: Path):
    save(tmp_path, 5, 1.0)
    prune(tmp_path, Retention(keep_last=1, keep_best=1, metric="eval/loss"))
    save(tmp_path, 10, 0.5)  # killed here: named, but best.json still tells of step 5
    save(tmp_path, 15, 0.7)
    prune(tmp_path, Retention(keep_last=1, keep_best=1, metric="eval/loss"))
    assert best(tmp_path) == [("step_00000010", 0.5)]
    assert steps(tmp_path) == [10, 15]


def test_best_counts_for_the_last_training_stage_of_each_branch_alone(tmp_path: Path):
    config = compose(["recipe=tiny", "run.checkpoint=best"])
    last = [entry for entry in config.stages if is_last(config, entry)]
    assert [e for e in last if e.startswith(("pretrain", "align", "convert", "sft"))] == [
        "convert@mamba2",
        "sft",
    ]
    for stage in ("convert", "sft", "convert_mamba2"):
        folder = tmp_path / stage / "checkpoints"
        for step, loss in LOSSES.items():
            save(folder, step, loss)
        prune(folder, Retention(keep_last=1, keep_best=1, metric="eval/loss"))
    chosen = [chosen_checkpoint(config, tmp_path, entry) for entry in config.stages]
    found = {path.parent.parent.name: path.name for path in chosen if path is not None}
    assert found == {
        "convert": "step_00000025",
        "sft": "step_00000010",
        "convert_mamba2": "step_00000010",
    }
    newest = compose(["recipe=tiny"])
    assert chosen_checkpoint(newest, tmp_path, "sft") == tmp_path / "sft/checkpoints/step_00000025"


def test_a_best_checkpoint_that_nobody_named_is_refused(tmp_path: Path):
    save(tmp_path / "sft" / "checkpoints", 5, 1.0)
    config = compose(["recipe=tiny", "run.checkpoint=best"])
    with pytest.raises(ValueError, match=r"best\.json names no checkpoint .*checkpoint=newest"):
        chosen_checkpoint(config, tmp_path, "sft")
