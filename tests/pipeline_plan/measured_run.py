"""Runs the pipeline and writes down how much memory its training took on this rank.

    python tests/pipeline_plan/measured_run.py OUT stage=convert recipe=…

OUT.RANK.json gets `peak_bytes`: the process's largest resident set during the optimizer steps, less
the one before the model was built; on CUDA, PyTorch's `max_memory_allocated`. Nothing of the run is
changed: two functions are called through ones that look at the memory.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pipeline.models
import pipeline.run
from pipeline.engine import Engine

KIB = 1024


def resident(name: str) -> int:
    """`VmRSS`, what this process has in memory, or `VmHWM`, the most it has had, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(name + ":"))
    return int(line.split()[1]) * KIB


def forget_peak() -> None:
    """Let `VmHWM` begin anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def in_use() -> int:
    """Bytes now."""
    gc.collect()
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else resident("VmRSS")


def most() -> int:
    """Bytes at most since `forget_peak`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM")


def main() -> int:
    """Run the command line with a look at the memory."""
    out, words = sys.argv[1], sys.argv[2:]
    values: dict[str, int] = {}
    build, step = pipeline.models.build_model, Engine.train_step

    def build_model(*args: Any, **options: Any) -> Any:
        values.setdefault("before", in_use())
        return build(*args, **options)

    def train_step(self: Engine, *args: Any, **options: Any) -> Any:
        if "steps" not in values:
            values["held"] = in_use() - values["before"]
            forget_peak()
        result = step(self, *args, **options)
        values["steps"] = values.get("steps", 0) + 1
        values["peak_bytes"] = most() - values["before"]
        return result

    watched: list[tuple[Any, str, Callable[..., Any]]] = [
        (pipeline.models, "build_model", build_model),
        (Engine, "train_step", train_step),
    ]
    for owner, name, function in watched:
        setattr(owner, name, function)
    status = pipeline.run.main(words)
    rank = os.environ.get("RANK", "0")
    Path(f"{out}.{rank}.json").write_text(json.dumps(values), encoding="utf-8")
    return status


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # DeepSpeed's and gloo's threads have nothing more to say
