"""How long a checkpoint holds training up: written at once, and while training goes on.

    python -m benchmarks.checkpoint_stall --dir runs/stall --out stall.json

Trains a model of some 28 million parameters from scratch (checkpoints of some 340 MB) on the shards
of the tiny recipe, with a checkpoint in every `EVERY`-th step, first with
`run.async_checkpoints=false`, then with `true`, and reports of each: the median time of a step
without a save, how much longer the step of a save took, and how much longer the whole run took than
its steps would have without saves.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.context import StageContext
from pipeline.run import main as run_pipeline

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


def times_of_steps(words: list[str]) -> list[float]:
    """Seconds from each step's end to the next one's; the save of step k is in the k-th."""
    ends: list[float] = []
    log = StageContext.log

    def log_and_note(self: StageContext, step: int, values: Any) -> None:
        ends.append(time.perf_counter())
        log(self, step, values)

    StageContext.log = log_and_note  # type: ignore[method-assign]
    try:
        if run_pipeline(words) != 0:
            raise SystemExit("the run failed")
        ends.append(time.perf_counter())
    finally:
        StageContext.log = log  # type: ignore[method-assign]
    return [after - before for before, after in itertools.pairwise(ends)]


def measure(folder: Path, asynchronous: bool) -> dict[str, Any]:
    """Seconds of steps and of saves of one run."""
    shutil.rmtree(folder / "pretrain", ignore_errors=True)
    flag = str(asynchronous).lower()
    words = [*WORDS, f"run.dir={folder}", "stage=pretrain", f"run.async_checkpoints={flag}"]
    times = times_of_steps(words)[: STEPS - 1]  # what follows the last step is the stage's end
    saves = [seconds for step, seconds in enumerate(times, start=1) if step % EVERY == 0]
    plain = [seconds for step, seconds in enumerate(times, start=1) if step % EVERY != 0]
    usual = statistics.median(plain)
    (newest, *_) = sorted((folder / "pretrain" / "checkpoints").iterdir(), reverse=True)
    return {
        "async_checkpoints": asynchronous,
        "checkpoint_bytes": sum(file.stat().st_size for file in newest.iterdir()),
        "step_s": usual,
        "stall_s": statistics.median(saves) - usual,
        "stalls_s": [seconds - usual for seconds in saves],
        "all_saves_s": sum(times) - usual * len(times),
    }


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
    ratio = results[0]["stall_s"] / max(results[1]["stall_s"], 1e-9)
    for result in results:
        print(json.dumps(result))
    print(f"stall, written at once / while training goes on: {ratio:.1f}")
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
