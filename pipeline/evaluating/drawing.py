"""What the figures of an evaluation share: colours, markers, lines over bins, titles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from evals.bins import parse_label
from evals.compare_plots import COLOURS
from evals.table import ROW_TITLES

Series = list[tuple[str, str, dict[str, dict[str, float]]]]
"""(name, title, metrics by task) of each mixer and control that was measured."""

MARKERS = {"full": "o", "swa": "s", "mamba2": "^", "allmem": "D"}


def measured(results: Mapping[str, Any], *, controls: bool = True) -> Series:
    """Mixers, then controls, that have results, in the table's order."""
    config = results["config"]
    series: Series = [
        (name, name, results["mixers"][name])
        for name in config["mixers"]
        if name in results["mixers"]
    ]
    if controls:
        series += [
            (name, ROW_TITLES[name], results["controls"][name])
            for name in config["controls"]
            if name in results["controls"]
        ]
    return series


def binned_line(axis: Axes, name: str, label: str, values: Mapping[str, float]) -> None:
    """A line through the middles of bins; controls are dashed."""
    spans = [parse_label(key) for key in values]
    centres = [(first + last) / 2 for first, last in spans]
    control = name not in MARKERS
    axis.plot(
        centres,
        list(values.values()),
        color=COLOURS[name],
        label=label,
        marker=MARKERS.get(name, "x"),
        markersize=5,
        linewidth=1.2 if control else 2.0,
        linestyle="--" if control else "-",
        zorder=4 if control else 3,
    )


def window_line(axis: Axes, results: Mapping[str, Any], label: str) -> None:
    """A dotted line at the window's length."""
    axis.axvline(
        results["config"]["window_size"], color="grey", linestyle=":", linewidth=1.5, label=label
    )
    axis.grid(alpha=0.3)
    axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def shared_legend(figure: Figure, axis: Axes) -> None:
    """One legend for all panels, beside them."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)


def subject_title(results: Mapping[str, Any], title: str) -> str:
    """A title with window, sinks, chunk and length."""
    config = results["config"]
    return (
        f"{title} (window {config['window_size']:,}, {config['num_sinks']:,} sinks, "
        f"chunk {config['chunk_size']:,}, documents of {int(config['length']):,} tokens)"
    )
