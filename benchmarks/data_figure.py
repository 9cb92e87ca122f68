"""Figure of the data benchmark."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

COLOURS = {"tokenizer": "#999999", "ours": "#0072B2", "datasets": "#E69F00", "datatrove": "#009E73"}
LABELS = {
    "tokenizer": "the tokenizer alone, text in memory",
    "ours": "stage=prepare: read, pack, shards with checksums",
    "datasets": "datasets.map, concatenated and cut",
    "datatrove": "datatrove's tokenizer, nothing packed",
}
INK = "#222222"


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws what was measured."""
    panels = [name for name in ("ratios", "parts", "memory") if name in result]
    if not panels:
        return
    width = {"ratios": 1.5, "parts": 1.0, "memory": 0.9}
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(4.4 * sum(width[name] for name in panels), 4.3),
        width_ratios=[width[name] for name in panels],
        layout="constrained",
        squeeze=False,
    )
    draws = {"ratios": _speeds, "parts": _packing, "memory": _memory}
    for axis, name in zip(axes[0], panels, strict=True):
        draws[name](axis, result)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK)
    text = result["text"]
    figure.suptitle(
        f"{text['name']}, {text['tokens'] / 1e6:.1f} M tokens, {result['tokenizer']['name']} "
        f"tokenizer; {result['machine']['processor']}, {result['machine']['cores']} cores",
        fontsize=10,
        color="#555555",
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _speeds(axis: Axes, result: dict[str, Any]) -> None:
    """Tokens per CPU second and process, by tool and number of processes."""
    counts = sorted({int(name.split("/")[1]) for name in result["ratios"]})
    tools = [tool for tool in COLOURS if f"{tool}/{counts[0]}" in result["ratios"]]
    bar = 0.8 / len(tools)
    for place, tool in enumerate(tools):
        middle, low, high = [], [], []
        for count in counts:
            runs = [turn[f"{tool}/{count}"] for turn in result["rounds"]]
            speeds = [run["tokens"] / run["cpu_s"] / 1e6 for run in runs]
            middle.append(statistics.median(speeds))
            low.append(middle[-1] - min(speeds))
            high.append(max(speeds) - middle[-1])
        at = np.arange(len(counts)) + (place - (len(tools) - 1) / 2) * bar
        axis.bar(at, middle, bar * 0.92, color=COLOURS[tool], label=LABELS[tool])
        axis.errorbar(at, middle, [low, high], fmt="none", ecolor=INK, elinewidth=0.8, capsize=2)
    names = [f"{n} process{'' if n == 1 else 'es'}" for n in counts]
    axis.set_xticks(range(len(counts)), names)
    axis.set_ylabel("M tokens per CPU second")
    axis.set_ylim(0, axis.get_ylim()[1] * 1.35)
    axis.legend(fontsize=8, frameon=False, loc="upper left")
    axis.set_title("Text to shards", loc="left", fontsize=10, color=INK)


def _packing(axis: Axes, result: dict[str, Any]) -> None:
    rows = result["parts"]["packing"]
    fills = [100 * row["fill"] for row in rows.values()]
    axis.barh(range(len(rows)), fills, color=COLOURS["ours"], height=0.6)
    for place, fill in enumerate(fills):
        label = f"{math.floor(100 * fill) / 100:.2f} %"
        axis.annotate(
            label, (fill, place), xytext=(-5, 0), textcoords="offset points",
            ha="right", va="center", fontsize=8, color="white",
        )  # fmt: skip
    axis.set_yticks(range(len(rows)), list(rows), fontsize=9)
    axis.invert_yaxis()
    axis.axvline(98, color=INK, linestyle=":", linewidth=1)
    axis.set_xlim(0, 104)
    axis.set_xlabel("% of the samples is text (line: 98)")
    axis.set_title("Packing to 24,576 tokens", loc="left", fontsize=10, color=INK)


def _memory(axis: Axes, result: dict[str, Any]) -> None:
    rows = result["memory"]
    names = [f"text ×{row['times']}\n{row['processes']} proc." for row in rows]
    for key, shift, colour, label in (
        ("peak_bytes", -0.2, COLOURS["ours"], "main process"),
        ("largest_child_bytes", 0.2, "#9ecae1", "largest of the others"),
    ):
        peaks = [row[key] / 2**20 for row in rows]
        places = np.arange(len(rows)) + shift
        axis.bar(places, peaks, color=colour, width=0.38, label=label)
        for place, peak in zip(places, peaks, strict=True):
            if peak:
                axis.annotate(f"{peak:.0f}", (place, peak), ha="center", va="bottom", fontsize=8)
    axis.set_xticks(range(len(rows)), names, fontsize=8)
    axis.set_ylim(0, axis.get_ylim()[1] * 1.25)
    axis.set_ylabel("peak, MiB")
    axis.legend(fontsize=8, frameon=False, loc="upper left")
    axis.set_title("Memory", loc="left", fontsize=10, color=INK)
