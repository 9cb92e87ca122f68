"""The speed targets in one table: met, missed or not measured, each with its number.

    python -m benchmarks.targets                       # of benchmarks/results/*_gpu.json

Targets are for one H200 at the shape of Qwen3-1.7B, W = 4096, s = 128, c = 2048. Times come from
the files that `benchmarks.kernels` and `benchmarks.models` wrote; sizes and FLOPs are counted here,
on any machine. Beside each stands what the counts allow at best: the ratio of the two floors.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks import floors
from benchmarks.measure import ROOT
from benchmarks.model_cases import ConstantReader, build
from benchmarks.model_training import work_of
from benchmarks.rows import Row, find, load
from benchmarks.shapes import SHAPES, Shape
from pipeline.costs import cache_bytes, flops_ratio

RESULTS = ROOT / "benchmarks" / "results"
LONG, TRAINED, MILLION = 131072, 24576, 1 << 20
BASE = "Qwen3-1.7B"
DEVICE = "H200"
_BF16 = 2
Rows = list[Row]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One line of the table."""

    name: str
    wanted: str
    found: str
    status: str
    """met, missed or not measured."""
    count: str = ""
    """What bytes and FLOPs allow at best."""
    source: str = ""
    """Where the number is from: a device, or "counted"."""


def ratio_target(
    name: str,
    wanted: float,
    slow: Row | None,
    fast: Row | None,
    count: float,
    source: str,
    instead: str = "",
) -> Target:
    """At least `wanted` times as many tokens a second as `slow`; `instead` is said without both."""
    given = {"name": name, "wanted": f"at least {wanted:g} ×", "count": f"{count:.1f} ×"}
    if slow is None or fast is None:
        return Target(**given, found=instead, status="not measured", source=source * bool(instead))
    ratio = fast["tokens_per_s"] / slow["tokens_per_s"]
    status = "met" if ratio >= wanted else "missed"
    return Target(**given, found=f"{ratio:.2f} ×", status=status, source=source)


def speed_targets(kernels: Rows, models: Rows, device: str) -> list[Target]:
    """Those that need a GPU."""
    shape = SHAPES[BASE]
    model = {"shape": BASE, "tokens": LONG}
    found = [
        ratio_target(
            "decode at 128k, batch 8, over full attention",
            10,
            find(models, op="decode", mixer="full", batch=8, **model),
            find(models, op="decode", mixer="allmem", batch=8, **model),
            floors.decode(shape, "full", 8, LONG, _BF16).bytes
            / floors.decode(shape, "allmem", 8, LONG, _BF16).bytes,
            device,
            instead=at_batch_4(models),
        ),
        ratio_target(
            "prefill at 128k over full attention",
            3,
            find(models, op="prefill", mixer="full", batch=1, **model),
            find(models, op="prefill", mixer="allmem", batch=1, **model),
            floors.prefill(shape, "full", 1, LONG, _BF16).flops
            / floors.prefill(shape, "allmem", 1, LONG, _BF16).flops,
            device,
        ),
    ]
    found.append(training_target(models, device))
    kernel = {"op": "memory", "pass": "forward+backward", "shape": BASE, "tokens": TRAINED}
    fast = find(kernels, name="triton", **kernel)
    for name, plain in (("plain", "plain"), ("plain, compiled", "plain, compiled")):
        target = ratio_target(
            f"Triton over {name} PyTorch, memory forward+backward at 24k",
            5,
            find(kernels, name=plain, **kernel),
            fast,
            0.0,
            device,
        )
        found.append(replace(target, count=""))
    found.append(million_target(models, device))
    return found


def at_batch_4(models: Rows) -> str:
    """The ratio of decoding where eight rows of full attention do not fit the device."""
    case = {"op": "decode", "batch": 4, "shape": BASE, "tokens": LONG}
    slow, fast = (find(models, mixer=mixer, **case) for mixer in ("full", "allmem"))
    if slow is None or fast is None:
        return ""
    return f"{fast['tokens_per_s'] / slow['tokens_per_s']:.2f} × at batch 4, as 8 does not fit"


def training_target(models: Rows, device: str) -> Target:
    """The branch costs at most a tenth of a step of the window alone."""
    case = {"op": "training, memory trained", "shape": BASE, "tokens": TRAINED}
    branch, alone = (find(models, mixer=mode, **case) for mode in ("allmem", "swa"))
    shape = SHAPES[BASE]
    work = {
        trained: [work_of(shape, mode, TRAINED, trained, _BF16).flops for mode in ("allmem", "swa")]
        for trained in ("memory", "all")
    }
    shares = {trained: with_it / without - 1 for trained, (with_it, without) in work.items()}
    given = {
        "name": "the memory's share of a training step at 24k, over the window alone",
        "wanted": "at most 10 %",
        "count": f"{shares['memory']:.1%} of FLOPs ({shares['all']:.1%} with all weights trained)",
    }
    if branch is None or alone is None:
        return Target(**given, found="", status="not measured")
    share = branch["seconds"] / alone["seconds"] - 1
    status = "met" if share <= 0.1 else "missed"
    return Target(**given, found=f"{share:.1%}", status=status, source=device)


def million_target(models: Rows, device: str) -> Target:
    """Prefill and decode at 1 M tokens with the state of 128 k tokens."""
    given = {"name": "1 M tokens, prefill and decode, constant state", "wanted": "runs"}
    case = {"shape": BASE, "mixer": "allmem", "batch": 1}
    read = find(models, op="prefill", tokens=MILLION, **case)
    written = find(models, op="decode", tokens=MILLION, **case)
    shorter = find(models, op="decode", tokens=LONG, **case)
    if read is None or written is None or shorter is None:
        return Target(**given, found="", status="not measured")
    same = written["cache_bytes"] == shorter["cache_bytes"]
    found = (
        f"{read['tokens_per_s']:,.0f} and {written['tokens_per_s']:,.0f} tokens/s, "
        f"state {written['cache_bytes'] / 2**20:.0f} MiB, at 128k "
        f"{shorter['cache_bytes'] / 2**20:.0f} MiB"
    )
    return Target(**given, found=found, status="met" if same else "missed", source=device)


def counted_targets() -> list[Target]:
    """Those that hold on any machine."""
    full = cache_bytes("full", SHAPES[BASE].mixer, LONG, layers=False)
    held = layer_cache_bytes(SHAPES[BASE])
    found = [
        Target(
            name="cache at 128k, of full attention's",
            wanted="at most 1/23",
            found=f"1/{full / held:.3f}",
            status="met" if held * 23 <= full else "missed",
            count=f"{held:,} of {full:,} bytes a layer",
            source="counted: a layer's real cache",
        )
    ]
    for name, most in (("Qwen3-0.6B", 0.096), ("Qwen3-1.7B", 0.124)):
        ratio = flops_ratio("allmem", SHAPES[name].mixer, LONG)
        found.append(
            Target(
                name=f"token-mixer FLOPs at 128k, of full attention's, {name}",
                wanted=f"at most {most}",
                found=f"{ratio:.4f}",
                status="met" if ratio <= most else "missed",
                source="counted: pipeline/costs.py",
            )
        )
    return found


def layer_cache_bytes(shape: Shape) -> int:
    """Bytes that one layer's decode state takes after W + s tokens, bfloat16, by making one.

    Nothing that the state's size depends on is changed: only widths of the model are small.
    """
    one = replace(
        shape, num_layers=1, hidden_size=64, num_heads=8, intermediate_size=64, vocab_size=64
    )
    model = build(one, "allmem", torch.device("cpu"), torch.bfloat16)
    reader = ConstantReader(model, shape.window_size)
    reader.feed(torch.randint(0, 64, (1, shape.window_size + shape.num_sinks)))
    return reader.cache_bytes


def table(targets: Sequence[Target]) -> str:
    """Markdown."""
    lines = [
        "| target | wanted | found | status | counts allow | from |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {t.name} | {t.wanted} | {t.found or '—'} | {t.status} | {t.count} | {t.source} |"
        for t in targets
    ]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Prints the table and writes it as JSON; the exit status is 0 whatever it says."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.targets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kernels", type=Path, default=RESULTS / "kernels_gpu.json")
    parser.add_argument("--models", type=Path, default=RESULTS / "models_gpu.json")
    parser.add_argument("--out", type=Path, default=RESULTS / "targets.json")
    given = parser.parse_args(words)
    kernels, models = load(given.kernels), load(given.models)
    devices = {found["machine"].get("device") for found in (kernels, models) if found["rows"]}
    device = " and ".join(sorted(map(str, devices)))
    targets = [*speed_targets(kernels["rows"], models["rows"], device), *counted_targets()]
    print(table(targets))
    if devices and not all(DEVICE in str(name) for name in devices):
        print(f"\nThe targets are for one {DEVICE}; this was measured on: {device}.")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    whole = {"device": device, "targets": [asdict(target) for target in targets]}
    given.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
