"""Trains one run by one rank, and another that changes its layout again and again.

python relayout_server.py PLAN.json OUT.json; run by test_relayout.py. The plan's legs come one
after the other: each goes on from the checkpoint of the leg before, with its own number of ranks
and its own settings, until it is asked to stop after a step. OUT.json gets the exit codes and, of
each leg's last checkpoint, the files. In the end a third run meets a full disk.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from fork_server import after_steps, start, wait

import pipeline.engine

TIMEOUT_S = 200


def prepare(rank: int, *, stage: str, step: int) -> None:
    """In each rank: ZeRO-3 splits the tiny model's tensors too; rank 0 is asked to stop.

    Asked when the step before is logged, the ranks stop after `step`.
    """
    pipeline.engine.Engine.__init__.__kwdefaults__["persistent_elements"] = 16

    def stop(number: int) -> None:
        if number == step - 1:
            signal.raise_signal(signal.SIGTERM)

    if rank == 0:
        after_steps(stage, stop)


def fill_disk(rank: int, *, before: Path) -> None:
    """Once a checkpoint is whole, the operating system lets rank 1 write no large file."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def fill(number: int) -> None:
        if before.is_dir():
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))

    if rank == 1:
        after_steps("pretrain", fill)


def full_disk(folder: Path, words: list[str]) -> dict[str, Any]:
    """What two ranks do when rank 1 cannot write its share, and when the run is given again."""
    run_dir = folder / "full"
    run_dir.mkdir()
    (run_dir / "prepare").symlink_to(folder / "whole" / "prepare")
    words = [*words, f"run.dir={run_dir}", "stage=pretrain", "pretrain.checkpoint_every=3"]
    checkpoints = run_dir / "pretrain" / "checkpoints"
    hook = functools.partial(fill_disk, before=checkpoints / "step_00000003")
    sys.stderr.flush()
    before, log = os.dup(2), folder / "full.err"
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
        codes = wait(start(words, 2, hook), TIMEOUT_S)
        os.dup2(before, 2)
    os.close(before)
    left = sorted(path.name for path in checkpoints.iterdir())
    lines = (run_dir / "pretrain" / "metrics.jsonl").read_text().splitlines()
    again = wait(start(words, 2), TIMEOUT_S)
    return {"codes": codes, "left": left, "last": json.loads(lines[-1])["step"], "again": again}


def main(plan_file: str, out_file: str) -> None:
    plan = json.loads(Path(plan_file).read_text())
    folder, legs = Path(plan["folder"]), []
    whole = [*plan["words"], f"run.dir={folder / 'whole'}"]
    if (codes := wait(start(whole, 1), TIMEOUT_S)) != [0]:
        raise SystemExit(f"the undisturbed run ended with {codes}")
    run_dir = folder / "legs"
    run_dir.mkdir()
    (run_dir / "prepare").symlink_to(folder / "whole" / "prepare")
    for leg in plan["legs"]:
        words = [*plan["words"], *leg["words"], f"run.dir={run_dir}"]
        hook = functools.partial(prepare, stage=leg["stage"], step=leg["until"])
        codes = wait(start(words, leg["ranks"], hook), TIMEOUT_S)
        found: dict[str, Any] = {"codes": codes, "files": []}
        saved = sorted((run_dir / leg["stage"] / "checkpoints").glob("step_*"))
        if saved:
            found["newest"] = saved[-1].name
            found["files"] = sorted(file.name for file in saved[-1].iterdir())
        legs.append(found)
    result = {"legs": legs, "full_disk": full_disk(folder, plan["words"])}
    Path(out_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
