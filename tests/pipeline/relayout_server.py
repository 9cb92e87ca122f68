"""Trains one run by one rank, and another that changes its layout again and again.

python relayout_server.py PLAN.json OUT.json; run by test_relayout.py. The plan's legs come one
after the other: each goes on from the checkpoint of the leg before, with its own number of ranks
and its own settings, until it is asked to stop after a step. OUT.json gets the exit codes and, of
each leg's last checkpoint, the files.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

from fork_server import start, stop_after, wait

import pipeline.engine

TIMEOUT_S = 120


def prepare(rank: int, *, stage: str, step: int) -> None:
    """In each rank: ZeRO-3 splits the tiny model's tensors too; rank 0 is asked to stop."""
    pipeline.engine.Engine.__init__.__kwdefaults__["persistent_elements"] = 16
    if rank == 0:
        stop_after(stage, step)


def main(plan_file: str, out_file: str) -> None:
    plan = json.loads(Path(plan_file).read_text())
    folder, result = Path(plan["folder"]), []
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
        result.append(found)
    Path(out_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
