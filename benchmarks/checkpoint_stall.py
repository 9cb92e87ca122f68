"""How long a checkpoint holds training up: written at once, and while training goes on.

    python -m benchmarks.checkpoint_stall --dir runs/stall --out stall.json

Trains a model of some 28 million parameters from scratch (checkpoints of some 340 MB) on the shards
of the tiny recipe, with a checkpoint in every `EVERY`-th step, first with
`run.async_checkpoints=false`, then with `true`. Of each it reports how long the calls that save
held training up, and how long a step takes, as usual and beside the thread that writes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline.engine import Engine
from pipeline.run import main as run_pipeline
from pipeline.saving import Saver

STEPS, EVERY = 24, 6
WORDS = [
    "recipe=tiny",
    "stages=[prepare,pretrain]",
    "tracking=none",
    "model.scratch.hidden_size=512",
    "model.scratch.num_layers=8",
    "model.scratch.num_heads=8",
    "model.scratch.num_kv_heads=8",
    "model.scratch.head_dim=64",
    "model.scratch.intermediate_size=1536",
    f"pretrain.steps={STEPS}",
    f"pretrain.checkpoint_every={EVERY}",
    "pretrain.lr=1e-4",
]


def measure(folder: Path, asynchronous: bool) -> dict[str, Any]:
    """Seconds of steps and of saves of one run."""
    shutil.rmtree(folder / "pretrain", ignore_errors=True)
    flag = str(asynchronous).lower()
    words = [*WORDS, f"run.dir={folder}", "stage=pretrain", f"run.async_checkpoints={flag}"]
    steps, saves, polls = [], [], []
    with (
        timed(Engine, "train_step", steps),
        timed(Saver, "save", saves),
        timed(Saver, "poll", polls),
    ):
        if run_pipeline(words) != 0:
            raise SystemExit("the run failed")
    (newest, *_) = sorted((folder / "pretrain" / "checkpoints").iterdir(), reverse=True)
    return {
        "async_checkpoints": asynchronous,
        "checkpoint_bytes": sum(file.stat().st_size for file in newest.iterdir()),
        "step_s": statistics.median(steps),
        "step_after_save_s": statistics.median(steps[EVERY::EVERY]),
        "save_s": statistics.median(saves),
        "saves_s": saves,
        "polls_s": sum(polls) / len(saves),
    }


@contextlib.contextmanager
def timed(cls: type, name: str, seconds: list[float]) -> Iterator[None]:
    """Note how long each call of a method takes."""
    method = getattr(cls, name)

    def call(*args: Any, **options: Any) -> Any:
        before = time.perf_counter()
        try:
            return method(*args, **options)
        finally:
            seconds.append(time.perf_counter() - before)

    setattr(cls, name, call)
    try:
        yield
    finally:
        setattr(cls, name, method)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="folder for the run")
    parser.add_argument("--out", type=Path, help="JSON of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if run_pipeline([*WORDS, f"run.dir={arguments.dir}", "stage=prepare"]) != 0:
        raise SystemExit("prepare failed")
    results = [measure(arguments.dir, asynchronous) for asynchronous in (False, True)]
    ratio = results[0]["save_s"] / results[1]["save_s"]
    for result in results:
        print(json.dumps(result))
    print(f"stall, written at once / while training goes on: {ratio:.1f}")
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
