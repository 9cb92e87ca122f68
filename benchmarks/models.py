"""Measures whole models with random weights: prefill, decode and a training step, by mixer.

    python -m benchmarks.models                        # sizes that fit the machine: GPU or CPU
    python -m benchmarks.models --shapes Qwen3-1.7B --mixers allmem full --tokens 131072

Before a model is timed, two layers of its shape are compared on the device with plain PyTorch in
higher precision, read in pieces and continued token by token; a mixer that differs is refused and
has no speed, and the exit status is then 1. Beside each time stands its floor (benchmarks/floors.py
over ceilings measured in the same run), with the bytes of the cache and the peak memory. Writes
JSON after every figure, and a plot; the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.measure import ROOT, machine, measure_ceilings
from benchmarks.model_bench import Bench
from benchmarks.model_cases import MIXERS
from benchmarks.rows import Results, report_end
from benchmarks.shapes import SHAPES
from benchmarks.speed_plots import draw

RESULTS = ROOT / "runs" / "bench"

Group = tuple[str, str, int]
"""shape, mixer (or "training"), T"""

# in the order of worth: what the targets ask comes first
GPU_GROUPS: tuple[Group, ...] = (
    ("Qwen3-1.7B", "allmem", 131072),
    ("Qwen3-1.7B", "full", 131072),
    ("Qwen3-1.7B", "training", 24576),
    ("Qwen3-1.7B", "swa", 131072),
    ("Qwen3-1.7B", "allmem", 1048576),
    ("Qwen3-1.7B", "allmem", 4096),
    ("Qwen3-1.7B", "allmem", 32768),
    ("Qwen3-1.7B", "full", 4096),
    ("Qwen3-1.7B", "full", 32768),
    ("Qwen3-1.7B", "mamba2", 131072),
    ("Qwen3-0.6B", "allmem", 131072),
    ("Qwen3-0.6B", "full", 131072),
    ("Qwen3-0.6B", "training", 24576),
    ("Qwen3-8B", "allmem", 131072),
    ("Qwen3-8B", "full", 131072),
    ("Qwen3-8B", "training", 24576),
    ("Qwen3-0.6B", "allmem", 1048576),
    ("Qwen3-8B", "allmem", 1048576),
    ("Qwen3-0.6B", "allmem", 4096),
    ("Qwen3-0.6B", "full", 4096),
    ("Qwen3-8B", "allmem", 4096),
    ("Qwen3-8B", "full", 4096),
    ("Qwen3-1.7B", "swa", 4096),
    ("Qwen3-1.7B", "swa", 32768),
    ("Qwen3-1.7B", "mamba2", 4096),
    ("Qwen3-1.7B", "mamba2", 32768),
    ("Qwen3-1.7B", "full", 1048576),
)
CPU_GROUPS: tuple[Group, ...] = (
    *(("small", mixer, tokens) for tokens in (1024, 4096, 16384) for mixer in MIXERS),
    ("small", "training", 2048),
    ("small", "allmem", 65536),
)
TINY_GROUPS: tuple[Group, ...] = (
    *(("tiny", mixer, 96) for mixer in MIXERS),
    ("tiny", "training", 96),
)


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", help="cuda or cpu; default: cuda where there is one")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="default: as listed")
    parser.add_argument("--mixers", nargs="+", choices=(*MIXERS, "training"))
    parser.add_argument("--tokens", type=int, nargs="+", help="only these lengths")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--piece", type=int, default=8192, help="tokens that a prefill reads at once"
    )
    parser.add_argument("--tiny", action="store_true", help="sizes of a test: some seconds")
    parser.add_argument("--budget-s", type=float, default=1200.0, help="start nothing after it")
    parser.add_argument("--repeat-s", type=float, default=6.0, help="of repeats of one figure")
    parser.add_argument("--spoil", default="", help="make this mixer wrong, to see it refused")
    parser.add_argument("--fresh", action="store_true", help="measure again what there is")
    parser.add_argument("--out", type=Path, help="JSON file; default: runs/bench/models_*.json")
    return parser.parse_args(words)


def chosen_groups(given: argparse.Namespace, cuda: bool) -> list[Group]:
    """What to measure, in order."""
    groups = TINY_GROUPS if given.tiny else GPU_GROUPS if cuda else CPU_GROUPS
    if given.shapes and given.tokens and given.mixers:  # any combination, not only those listed
        return [(s, m, t) for s in given.shapes for t in given.tokens for m in given.mixers]
    return [
        (shape, mixer, tokens)
        for shape, mixer, tokens in groups
        if (not given.shapes or shape in given.shapes)
        and (not given.mixers or mixer in given.mixers)
        and (not given.tokens or tokens in given.tokens)
    ]


def main(words: Sequence[str] | None = None) -> int:
    """Measures, writes; gives the exit status."""
    given = arguments(words)
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    begin = time.monotonic()
    out = given.out or RESULTS / f"models_{'gpu' if cuda else 'cpu'}.json"
    try:
        results = Results(out, machine(device), fresh=given.fresh)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    ceilings = measure_ceilings(device, dtype, quick=given.tiny)
    results.head["ceilings"].append(asdict(ceilings))
    bench = Bench(
        given=given, device=device, dtype=dtype, ceilings=ceilings, results=results, begin=begin
    )
    for shape, mixer, tokens in chosen_groups(given, cuda):
        bench.run(SHAPES[shape], mixer, tokens)
    results.write()
    draw(out)
    return report_end(results)


if __name__ == "__main__":
    sys.exit(main())
