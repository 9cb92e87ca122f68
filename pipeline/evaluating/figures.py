"""Figures of tasks and of the memory's state, from numbers in `results.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from evals.compare_plots import COLOURS, figures_of
from evals.paper_tables import subjects_of
from pipeline.evaluating.drawing import MARKERS, measured, shared_legend, subject_title

Bins = dict[str, float]


def task_figures(results: Mapping[str, Any]) -> dict[str, Figure | None]:
    """The figures by name; None where the results have nothing to show."""
    return {
        "scores": scores_figure(results),
        **figures_of(subjects_of({"": results}, controls=True)),
        "memory_norms": norms_figure(results),
    }


def scores_figure(results: Mapping[str, Any]) -> Figure | None:
    """Every task's score with its standard error, mixers and controls beside each other."""
    tasks = results.get("tasks", {})
    series = measured(results)
    shown = [
        name
        for name, about in tasks.items()
        if any(about["metric"] in metrics.get(name, {}) for _, _, metrics in series)
    ]
    if not shown:
        return None
    figure = Figure(figsize=(9.4, 1.6 + 0.62 * len(shown)), layout="constrained")
    axis = figure.subplots()
    step = 0.8 / max(len(series), 1)
    for index, (name, label, metrics) in enumerate(series):
        points = [
            (place + (index - (len(series) - 1) / 2) * step, metrics[task])
            for place, task in enumerate(shown)
            if tasks[task]["metric"] in metrics.get(task, {})
        ]
        metric = [tasks[task]["metric"] for task in shown if task in metrics]
        axis.errorbar(
            [found[key] for (_, found), key in zip(points, metric, strict=True)],
            [place for place, _ in points],
            xerr=[found.get("stderr", 0.0) for _, found in points],
            fmt=MARKERS.get(name, "x"),
            color=COLOURS[name],
            label=label,
            markersize=4.5,
            linewidth=1.0,
        )
    axis.set_yticks(
        range(len(shown)), [_row_label(name, tasks[name]) for name in shown], fontsize=8
    )
    axis.set_ylim(len(shown) - 0.5, -0.5)
    for border in range(1, len(shown)):
        axis.axhline(border - 0.5, color="lightgrey", linewidth=0.8, zorder=0)
    low, high = axis.get_xlim()
    axis.set_xlim(max(low, -2.0), min(max(high, 5.0), 102.0))
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("score (0 to 100; bars: one standard error by bootstrap)")
    shared_legend(figure, axis)
    figure.suptitle("Scores of the tasks" + _window(results))
    return figure


def _row_label(name: str, about: Mapping[str, Any]) -> str:
    count = f", {about['n']} examples" if "n" in about else ""
    own = ", own prompts" if about["prompts"] == "own" else ""
    return f"{name}\n{about['metric']}{count}{own}"


def _window(results: Mapping[str, Any]) -> str:
    config = results["config"]
    return (
        f" (window {config['window_size']:,}, {config['num_sinks']:,} sinks, "
        f"chunk {config['chunk_size']:,})"
    )


def norms_figure(results: Mapping[str, Any]) -> Figure | None:
    """Norms of the memory's fast weights and of their momentum along a document, by layer."""
    metrics = results["mixers"].get("allmem", {})
    panels = [
        ("weights", "fast weights W", "‖W‖ / ‖W at the start‖"),
        ("momentum", "momentum M", "‖M‖ / ‖W at the start‖"),
    ]
    found = {kind: _by_layer(metrics, kind) for kind, _, _ in panels}
    if not any(found.values()):
        return None
    figure = Figure(figsize=(11.6, 4.4), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (kind, title, label) in zip(axes, panels, strict=True):
        layers = found[kind]
        for place, (layer, norms) in enumerate(sorted(layers.items())):
            shade = colormaps["viridis"](0.9 * place / max(len(layers) - 1, 1))
            positions = [int(key) for key in norms]
            line = f"layer {layer}"
            axis.plot(positions, list(norms.values()), color=shade, label=line, linewidth=1.6)
        axis.set(title=title, xlabel="tokens read", ylabel=label)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.yaxis.set_major_locator(MaxNLocator(6))
        axis.ticklabel_format(axis="y", useOffset=False)
        axis.grid(alpha=0.3)
    if len(found["weights"]) <= 12:
        shared_legend(figure, axes[-1])
    else:
        figure.text(0.5, 0.0, "dark: the first layer; bright: the last", ha="center", fontsize=9)
    figure.suptitle(subject_title(results, "State of the memory along one document"))
    return figure


def _by_layer(metrics: Mapping[str, Any], kind: str) -> dict[int, Bins]:
    pattern = re.compile(rf"{kind}_norm_layer_(\d+)_by_position")
    return {int(m.group(1)): metrics[name] for name in metrics if (m := pattern.fullmatch(name))}
