"""Simulated steps of Qwen3 students over 8, 32 and 128 context-parallel ranks.

    python -m benchmarks.wavefront_simulation            # 1 M tokens, all shapes, both modes
    python -m benchmarks.wavefront_simulation --help

Rates of the hardware are **assumptions**, given as arguments; nothing here was measured on a GPU.
Writes JSON and a figure.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from allmem_megatron.config import BaseModelConfig, MemoryConfig
from benchmarks.costs import BF16, SHAPES, Setting, TokenFlops, layer_seconds, messages
from benchmarks.programs import gathered, layer_backward, layer_forward
from benchmarks.schedule import Await, Compute, Join, Operation, simulate

ROOT = Path(__file__).resolve().parents[1]


def teacher_layer(
    base: BaseModelConfig, rank: int, ranks: int, layer: int, setting: Setting
) -> list[Operation]:
    """A layer of the base model on one rank: full causal attention over all tokens before.

    By heads all ranks attend equally long; with gathered keys the last rank has most to do.
    """
    by_heads = setting.teacher == "heads"
    flops = TokenFlops.of(base, MemoryConfig(), setting.window_size, setting.num_sinks)
    own = setting.tokens / ranks
    dense = setting.dense_tflops * 1e12
    pairs = setting.tokens**2 / 2 / ranks if by_heads else own * (rank * own) + own**2 / 2
    attend = 4.0 * base.num_heads * base.head_dim * pairs / (setting.attention_tflops * 1e12)
    project = own * flops.qkv / dense
    rest = own * (flops.window_out + flops.mlp) / dense
    kv = own * 2 * base.num_kv_heads * base.head_dim * BF16
    key = ("teacher", layer)
    if by_heads:
        heads = (2 * base.num_heads + 2 * base.num_kv_heads) * base.head_dim * BF16
        seconds = own * heads / 2 * (ranks - 1) / ranks / setting.link.bytes_per_s
        meet = [Join(key), Await(key, seconds)]
        back = [Join((*key, "out")), Await((*key, "out"), seconds)]
        name = f"teacher {layer}"
        return [Compute(name, project), *meet, Compute(name, attend), *back, Compute(name, rest)]
    return [
        Compute(f"teacher {layer}", project),
        *gathered(key, rank, ranks, kv),
        Compute(f"teacher {layer}", attend + rest),
    ]


def programs(
    base: BaseModelConfig, ranks: int, mode: str, setting: Setting
) -> list[list[Operation]]:
    """A whole step on every rank."""
    seconds = layer_seconds(base, ranks, mode, setting)
    sizes = messages(base, ranks, mode, setting)
    flops = TokenFlops.of(base, MemoryConfig(), setting.window_size, setting.num_sinks)
    per_token = flops.qkv + flops.window_out + flops.mlp + flops.branch_in + flops.branch_out
    weights = per_token / 2 * BF16  # bytes of a layer
    gather_s = weights * (ranks - 1) / ranks / setting.link.bytes_per_s
    layers = range(base.num_layers)
    result = []
    for rank in range(ranks):
        steps: list[list[Operation]] = []
        if setting.teacher:
            steps += [teacher_layer(base, rank, ranks, i, setting) for i in layers]
        steps += [list(layer_forward(rank, i, seconds, sizes)) for i in layers]
        steps += [list(layer_backward(rank, i, seconds, sizes)) for i in reversed(layers)]
        program: list[Operation] = []
        for number, step in enumerate(steps):
            if setting.zero3:
                first = 0 if number == 0 else number + setting.prefetch
                last = min(number + setting.prefetch, len(steps) - 1)
                program += [Join(("weights", i)) for i in range(first, last + 1)]
                program.append(Await(("weights", number), gather_s))
            program += step
        result.append(program)
    return result


def run(name: str, ranks: int, mode: str, setting: Setting) -> dict[str, Any]:
    """One row of the table."""
    base = SHAPES[name]
    line = simulate(programs(base, ranks, mode, setting), setting.link)
    seconds = layer_seconds(base, ranks, mode, setting)
    layers = base.num_layers
    busy = [line.busy(rank) for rank in range(ranks)]
    sizes = messages(base, ranks, mode, setting)
    return {
        "shape": name,
        "ranks": ranks,
        "mode": mode,
        "teacher": setting.teacher,
        "zero3": setting.zero3,
        "step_s": line.makespan,
        "efficiency": line.efficiency,
        "busy_s": {"mean": sum(busy) / ranks, "most": max(busy)},
        "layer_bound": layers / (layers + ranks - 1),
        "scan_bound": layers
        * seconds.total
        / (layers * seconds.total + (ranks - 1) * seconds.scans),
        "scan_share": seconds.scans / seconds.total,
        "state_bytes": max(sizes.state, default=0),
        "halo_bytes": max((size for _, _, size in sizes.window), default=0),
        "layer": asdict(seconds),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| shape | ranks | mode | step | efficiency | L/(L+R-1) | scan only | scan's share |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        extra = f" + teacher, {row['teacher']}" if row["teacher"] else " + ZeRO-3" * row["zero3"]
        bounds = ["", ""]
        if row["mode"] == "wavefront":
            bounds = [f"{row['layer_bound']:.2f}", f"{row['scan_bound']:.2f}"]
        lines.append(
            f"| {row['shape']} | {row['ranks']} | {row['mode']}{extra} | {row['step_s']:.2f} s |"
            f" {row['efficiency']:.2f} | {bounds[0]} | {bounds[1]} | {row['scan_share']:.2f} |"
        )
    return "\n".join(lines)


def cases(setting: Setting, ranks: list[int]) -> list[tuple[str, int, str, Setting]]:
    """All rows: both modes where the memory's eight heads allow it, with and without a teacher."""
    heads = MemoryConfig().heads(SHAPES["Qwen3-8B"])  # as many as key-value heads
    found = []
    for name in SHAPES:
        for size in ranks:
            by_heads = heads % size == 0
            for mode in ("wavefront", "a2a") if by_heads else ("wavefront",):
                teachers = ["gathered"] * (mode == "wavefront") + ["heads"] * by_heads
                settings = [setting, replace(setting, zero3=True)]
                settings += [replace(setting, teacher=teacher) for teacher in teachers]
                found += [(name, size, mode, one) for one in settings]
    return found


def arguments(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.wavefront_simulation", description=__doc__.splitlines()[0]
    )
    defaults = Setting()
    for name in ("tokens", "window_size", "num_sinks", "chunk_size", "prefetch"):
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name))
    for name in (
        "dense_tflops", "attention_tflops", "scan_tflops", "chunk_us", "gbytes_per_s", "latency_us",
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=float, default=getattr(defaults, name))
    parser.add_argument("--no_recompute", action="store_true")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 128])
    results = ROOT / "benchmarks" / "results" / "wavefront_simulation.json"
    parser.add_argument("--json", type=Path, default=results)
    parser.add_argument(
        "--plot", type=Path, default=ROOT / "docs" / "img" / "wavefront_simulation.png"
    )
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Simulates, prints the table, writes JSON and figure."""
    given = arguments(words)
    fields = {k: v for k, v in vars(given).items() if k in Setting.__dataclass_fields__}
    setting = Setting(**fields, recompute=not given.no_recompute)
    rows = []
    todo = cases(setting, given.ranks)
    for number, (name, size, mode, case) in enumerate(todo, 1):
        print(f"{number}/{len(todo)} {name} {size} ranks {mode}", file=sys.stderr)
        rows.append(run(name, size, mode, case))
    print(table(rows))
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps({"setting": asdict(setting), "rows": rows}, indent=1) + "\n")
    from benchmarks.plots import plot_simulation

    plot_simulation(rows, given.plot)


if __name__ == "__main__":
    main()
