"""What the watchdog's breadcrumbs cost: step times with and without, in turns, in one run.

    torchrun --nproc-per-node=2 -m benchmarks.watchdog_overhead --dir runs/watchdog \\
        --out watchdog.json parallel.tp=2

Trains the tiny recipe; every other step runs with the functions of `torch.distributed` as they are.
Words after the options are further settings, such as a layout. Rank 0 prints and writes the median
step times, their ratio with its quartiles over pairs of neighbouring steps, and the number of calls
of a step that leave a crumb.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pipeline.train_loop
from pipeline import watchdog
from pipeline.engine import Engine, StepResult
from pipeline.run import main as run_pipeline

STEPS, WARMUP = 200, 20
WORDS = [
    "recipe=tiny", "stage=all", "stages=[prepare,pretrain,convert]", "tracking=none",
    "pretrain.steps=2", f"convert.steps={STEPS}", f"convert.checkpoint_every={STEPS}",
    "parallel.num_threads=1", "run.spike_factor=0",
]  # fmt: skip


@contextlib.contextmanager
def _nothing(**options: Any) -> Iterator[None]:
    yield


def measure(words: list[str]) -> dict[str, list[float]]:
    """Seconds of the steps of `convert`, `on` and `off` in turns, and crumbs of those `on`."""
    found: dict[str, list[float]] = {"off": [], "on": [], "crumbs": []}
    pipeline.train_loop.watching = _nothing  # type: ignore[assignment]
    train_step, watching, steps = Engine.train_step, watchdog.watching, 0

    def timed(self: Engine, *args: Any, **options: Any) -> StepResult:
        nonlocal steps
        steps += 1
        on = steps % 2 == 0
        with watching(enabled=on):
            started = time.perf_counter()
            result = train_step(self, *args, **options)
            found["on" if on else "off"].append(time.perf_counter() - started)
            if on:
                found["crumbs"].append(float(watchdog._watch.num_crumbs))
        return result

    Engine.train_step = timed  # type: ignore[method-assign]
    status = run_pipeline(words)
    if status:
        raise SystemExit(status)
    return found


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", type=Path, required=True, help="folder of the run, made new")
    parser.add_argument("--out", type=Path, required=True, help="JSON with the numbers")
    parser.add_argument("words", nargs="*", help="further settings")
    options = parser.parse_args()
    found = measure([*WORDS, f"run.dir={options.dir}", *options.words])
    if os.environ.get("RANK", "0") != "0":
        return
    off, on = (found[name][WARMUP // 2 :] for name in ("off", "on"))
    ratios = [b / a for a, b in zip(off, on, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    report = {
        "words": options.words,
        "pairs": len(ratios),
        "seconds_off": statistics.median(off),
        "seconds_on": statistics.median(on),
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "calls_of_a_step": statistics.median(found["crumbs"]),
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
