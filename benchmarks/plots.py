"""Figures of the wavefront measurement and simulation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

INK, GREY = "#222222", "#9a9a9a"
FORWARD, BACKWARD, SCAN = "Blues", "Oranges", "#1a7f37"
SHAPE_COLOURS = {"Qwen3-0.6B": "#1f77b4", "Qwen3-1.7B": "#d95f02", "Qwen3-8B": "#1a7f37"}

Bar = tuple[str, int, float, float]
"""(kind: forward, scan, backward or back scan; layer; start; stop)"""


def gantt(axes: Axes, ranks: Sequence[Sequence[Bar]], num_layers: int, title: str) -> None:
    """One row per rank; a layer's shade is the same on every rank, the scan is green."""
    maps = {"forward": plt.get_cmap(FORWARD), "backward": plt.get_cmap(BACKWARD)}
    for rank, bars in enumerate(ranks):
        axes.barh(rank, max((bar[3] for bar in bars), default=0), height=0.72, color="#eeeeee")
        for kind, layer, start, stop in bars:
            shade = 0.25 + 0.6 * (layer / max(1, num_layers - 1))
            colour = SCAN if "scan" in kind else maps[kind](shade)
            axes.barh(rank, stop - start, left=start, height=0.72, color=colour, linewidth=0)
    axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in range(len(ranks))])
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel("seconds", fontsize=9)
    axes.margins(x=0.005)
    _plain(axes)


def plot_measured(
    measured: Sequence[Sequence[Bar]],
    simulated: Sequence[Sequence[Bar]],
    num_layers: int,
    rows: Sequence[dict[str, Any]],
    path: Path,
) -> None:
    """The trace, the same schedule simulated, and the efficiency by number of ranks."""
    figure, axes = plt.subplots(
        3, 1, figsize=(10, 8), height_ratios=[1, 1, 0.9], layout="constrained"
    )
    longest = max(bar[3] for bars in (*measured, *simulated) for bar in bars)
    size = len(measured)
    gantt(axes[0], measured, num_layers, f"Measured: {size} ranks, {num_layers} layers")
    gantt(axes[1], simulated, num_layers, "Simulated from the compute times of one rank alone")
    for axis in axes[:2]:
        axis.set_xlim(0, 1.01 * longest)
    blue, orange = plt.get_cmap(FORWARD), plt.get_cmap(BACKWARD)
    handles = [
        Patch(color=blue(0.6), label="forward (darker: later layer)"),
        Patch(color=SCAN, label="the memory's scan, both passes"),
        Patch(color=orange(0.6), label="backward"),
        Patch(color="#eeeeee", label="waiting"),
    ]
    axes[0].legend(
        handles=handles, ncols=4, fontsize=8, frameon=False, loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
    )  # fmt: skip
    _efficiencies(axes[2], rows)
    _save(figure, path)


def _efficiencies(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Measured efficiency beside the two bounds."""
    ranks = [row["ranks"] for row in rows]
    middle = [row["efficiency"]["median"] for row in rows]
    low = [m - row["efficiency"]["least"] for m, row in zip(middle, rows, strict=True)]
    high = [row["efficiency"]["most"] - m for m, row in zip(middle, rows, strict=True)]
    style = {"markersize": 6, "linewidth": 1.5}
    axes.plot(
        ranks, [r["scan_bound"] for r in rows], "s--", color=SCAN, **style,
        label="bound: only the scan is serial",
    )  # fmt: skip
    axes.errorbar(
        ranks, middle, [low, high], fmt="o-", color=INK, capsize=4, **style,
        label="measured (median, least and most)",
    )  # fmt: skip
    axes.plot(
        ranks, [r["layer_bound"] for r in rows], "^:", color=GREY, **style, label="L / (L + R - 1)"
    )
    axes.set_xticks(ranks)
    axes.set_ylim(0.5, 1.04)
    axes.set_xlabel("context-parallel ranks", fontsize=9)
    axes.set_title(
        "Efficiency: time computing, of all ranks' time", loc="left", fontsize=10, color=INK
    )
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    _plain(axes)


def plot_simulation(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Efficiency by ranks: the student alone, under ZeRO-3, and with the teacher before it."""
    panels = (
        ("Student alone (ZeRO 0 to 2)", "", False),
        ("Student alone, ZeRO-3", "", True),
        ("With the teacher, keys gathered", "gathered", False),
    )
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
    for axis, (title, teacher, zero3) in zip(axes, panels, strict=True):
        for shape, colour in SHAPE_COLOURS.items():
            own = [
                row
                for row in rows
                if row["shape"] == shape and row["teacher"] == teacher and row["zero3"] == zero3
            ]
            wave = [row for row in own if row["mode"] == "wavefront"]
            if not wave:
                continue
            axis.plot(
                [row["ranks"] for row in wave], [row["efficiency"] for row in wave], "o-",
                color=colour, label=shape, markersize=5,
            )  # fmt: skip
        wave = [row for row in rows if row["mode"] == "wavefront" and row["shape"] == "Qwen3-0.6B"]
        bounds = sorted({(row["ranks"], row["layer_bound"]) for row in wave})
        if bounds:
            label = "L / (L + R - 1), L = 28"
            axis.plot(*zip(*bounds, strict=True), "^:", color=GREY, label=label, markersize=5)
            axis.set_xscale("log", base=2)
            sizes = [size for size, _ in bounds]
            axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.set_title(title, loc="left", fontsize=10, color=INK)
        axis.set_xlabel("context-parallel ranks", fontsize=9)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        _plain(axis)
    axes[0].set_ylim(0, 1.03)
    axes[0].set_ylabel("time computing, of all ranks' time", fontsize=9)
    axes[0].legend(fontsize=8, frameon=False, loc="lower left")
    _save(figure, path)


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
