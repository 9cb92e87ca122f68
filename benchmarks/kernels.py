"""Measures memory, window attention and token mixer beside plain PyTorch and other packages.

    python -m benchmarks.kernels                       # shapes that fit the machine: GPU or CPU
    python -m benchmarks.kernels --ops memory --shapes Qwen3-1.7B --tokens 24576

Every version is compared with a reference in float64 on the inputs that it is timed with; one that
is wrong is refused and has no speed, and the exit status is then 1. Beside each time stands its
floor: FLOPs and bytes that the operation needs (benchmarks/floors.py) over what a large matrix
product and a large copy reach in the same run. Writes JSON after every group, and a figure; the
same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.kernel_cases import make_contest
from benchmarks.kernel_pieces import PIECES
from benchmarks.measure import ROOT, Stopwatch, machine, measure_ceilings
from benchmarks.rows import Results, missing, report_end
from benchmarks.shapes import SHAPES
from benchmarks.speed_plots import draw

RESULTS = ROOT / "runs" / "bench"
OPS = ("memory", "attention", "mixer", *PIECES)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Group = tuple[str, str, int, int, bool]
"""op, shape, T, B, whether with the backward pass"""

# in the order of worth: what the targets ask comes first
GPU_GROUPS: tuple[Group, ...] = (
    ("memory", "Qwen3-1.7B", 24576, 1, True),
    ("memory", "Qwen3-1.7B", 131072, 1, False),
    ("attention", "Qwen3-1.7B", 24576, 1, True),
    ("mixer", "Qwen3-1.7B", 24576, 1, True),
    ("attention", "Qwen3-1.7B", 131072, 1, False),
    ("mixer", "Qwen3-1.7B", 131072, 1, False),
    *((piece, "Qwen3-1.7B", 24576, 1, True) for piece in PIECES),
    ("memory", "Qwen3-1.7B", 4096, 8, True),
    ("memory", "Qwen3-1.7B", 131072, 1, True),
    ("mixer", "Qwen3-8B", 24576, 1, True),
    ("mixer", "Qwen3-0.6B", 24576, 1, True),
    ("mixer", "Qwen3-8B", 131072, 1, False),
    ("mixer", "Qwen3-0.6B", 131072, 1, False),
    ("attention", "Qwen3-8B", 24576, 1, True),
)
CPU_GROUPS: tuple[Group, ...] = (
    *(
        (op, "small", tokens, 1, backward)
        for op in OPS[:3]
        for tokens in (1024, 4096)
        for backward in (False, True)
    ),
    *((piece, "small", 4096, 1, True) for piece in PIECES),
)
TINY_GROUPS: tuple[Group, ...] = tuple((op, "tiny", 100, 2, True) for op in OPS)


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", help="cuda or cpu; default: cuda where there is one")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="default: bfloat16 on cuda, else float32"
    )
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="default: as listed")
    parser.add_argument("--tokens", type=int, nargs="+", help="only these lengths")
    parser.add_argument("--names", nargs="+", help="only versions whose name begins so")
    parser.add_argument("--tiny", action="store_true", help="sizes of a test: some seconds")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--budget-s", type=float, default=900.0, help="start no group after it")
    parser.add_argument("--group-s", type=float, default=3.0, help="of repeats in a group")
    parser.add_argument(
        "--spoil", default="", help="make this version's output wrong, to see it refused"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what there is")
    parser.add_argument("--out", type=Path, help="JSON file; default: runs/bench/kernels_*.json")
    return parser.parse_args(words)


def chosen_groups(given: argparse.Namespace, device: torch.device) -> list[Group]:
    """What to measure, in order."""
    groups = GPU_GROUPS if device.type == "cuda" else CPU_GROUPS
    groups = TINY_GROUPS if given.tiny else groups
    if given.shapes and given.tokens:  # any combination, not only those listed
        return [
            (op, shape, tokens, 1, backward)
            for op in given.ops
            for shape in given.shapes
            for tokens in given.tokens
            for backward in (False, True)
        ]
    return [
        group
        for group in groups
        if group[0] in given.ops
        and (not given.shapes or group[1] in given.shapes)
        and (not given.tokens or group[2] in given.tokens)
    ]


def main(words: Sequence[str] | None = None) -> int:
    """Measures, writes; gives the exit status."""
    given = arguments(words)
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = DTYPES[given.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    begin = time.monotonic()
    out = given.out or RESULTS / f"kernels_{'gpu' if device.type == 'cuda' else 'cpu'}.json"
    try:
        results = Results(out, machine(device), fresh=given.fresh)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    ceilings = measure_ceilings(device, dtype, quick=given.tiny)
    results.head["ceilings"].append(asdict(ceilings))
    watch = Stopwatch(device)
    for op, shape, tokens, batch, backward in chosen_groups(given, device):
        contest = make_contest(
            op, SHAPES[shape], batch=batch, tokens=tokens, backward=backward, device=device,
            dtype=dtype, compiled=not given.no_compile, spoil=given.spoil,
        )  # fmt: skip
        if given.names:
            chosen = tuple(given.names)
            contest.contenders = [c for c in contest.contenders if c.name.startswith(chosen)]
        if time.monotonic() - begin > given.budget_s:
            for one in contest.contenders:
                if not results.has(contest.case["group"], one.name):
                    why = f"--budget-s={given.budget_s:g} was over"
                    results.add(missing(contest.case, one.name, why))
            continue
        contest.run(watch, ceilings, results, given.group_s)
        del contest
        # PyTorch stops compiling a function at its eighth shape, and FlexAttention then forms T x T
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    results.write()
    draw(out)
    return report_end(results)


if __name__ == "__main__":
    sys.exit(main())
