"""`stage=plan`: parameters, memory, time and layouts of a recipe, before any GPU is spent.

Never part of `stage=all`, never skipped: it is worked out anew at every call, in one process.
"""

from __future__ import annotations

import os

from rich.console import Console

from pipeline.atomic import write_json
from pipeline.context import StageContext
from pipeline.planning.figure import write_figure
from pipeline.planning.plan import as_json, make_plan
from pipeline.planning.tables import render
from pipeline.schema import RunConfig

TABLE_WIDTH = 118
"""Columns that the tables want, where the output is no terminal."""


def run(config: RunConfig, context: StageContext) -> None:
    """Show the plan, and write `plan.json` and `memory.png`.

    Raises:
        ValueError: the configured layout is refused, or does not fit; after everything is shown.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "stage=plan is one process and plans for plan.num_gpus GPUs; start it without torchrun"
        )
    with context.reporter.progress("plan: ways to split followed:", None) as tell:
        plan = make_plan(config, tell)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=TABLE_WIDTH)
    for part in render(plan):
        console.print(part)
    context.dir.mkdir(parents=True, exist_ok=True)
    path, picture = context.dir / "plan.json", context.dir / "memory.png"
    write_json(path, as_json(plan))
    paths = [path]
    if write_figure(plan, picture):
        paths.append(picture)
    context.artifact(*paths, on_parent=True)
    context.say("plan: " + ", ".join(str(path) for path in paths))
    if plan.refusals:
        raise ValueError("the plan is refused: " + "; ".join(plan.refusals))
