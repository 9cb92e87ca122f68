"""Figures of tasks and of the memory's state, from numbers in `results.json`."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from evals.bins import parse_label
from evals.table import human_tokens
from pipeline.evaluating.drawing import (
    COLOURS,
    MARKERS,
    measured,
    shared_legend,
    subject_title,
    window_line,
)

Bins = dict[str, float]


def task_figures(results: Mapping[str, Any]) -> dict[str, Figure | None]:
    """The figures by name; None where the results have nothing to show."""
    return {
        "scores": scores_figure(results),
        "score_by_length": binned_figure(results, "_by_length", "prompt (tokens)"),
        "score_by_distance": binned_figure(
            results, "_by_distance", "distance from the evidence to the prompt's end (tokens)"
        ),
        "needle_map": needle_figure(results),
        "perplexity_by_position": perplexity_figure(results),
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
    rows = max(len(series), 3)
    figure = Figure(figsize=(9.4, 1.6 + len(shown) * (0.13 * rows + 0.25)), layout="constrained")
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
            markersize=5,
            linewidth=1.2,
        )
    axis.set_yticks(range(len(shown)), [_row_label(name, tasks[name]) for name in shown])
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
    own = ", own prompts" if about["prompts"] == "own" else ""
    return f"{name}\n{about['metric']}, {about.get('n', '')} examples{own}".replace(
        ", examples", ""
    )


def _window(results: Mapping[str, Any]) -> str:
    config = results["config"]
    return (
        f" (window {config['window_size']:,}, {config['num_sinks']:,} sinks, "
        f"chunk {config['chunk_size']:,})"
    )


def binned_figure(results: Mapping[str, Any], ending: str, axis_label: str) -> Figure | None:
    """Scores over length or distance, a panel a suite: the mean over its tasks in each bin."""
    series = measured(results)
    suites = {
        about["suite"]: None
        for name, about in results.get("tasks", {}).items()
        if any(metrics.get(name + ending) for _, _, metrics in series)
    }
    if not suites:
        return None
    figure = Figure(figsize=(5.6 * len(suites) + 2.0, 4.6), layout="constrained")
    axes = figure.subplots(1, len(suites), squeeze=False)[0]
    for axis, suite in zip(axes, suites, strict=True):
        names = [
            name + ending for name, about in results["tasks"].items() if about["suite"] == suite
        ]
        for name, label, metrics in series:
            bins = _mean_bins([metrics[task] for task in names if task in metrics])
            _log_line(axis, name, label, bins)
        window_line(axis, results, "window")
        count = sum(any(task in metrics for _, _, metrics in series) for task in names)
        plural = "" if count == 1 else "s"
        axis.set(title=f"{suite} ({count} task{plural})", xlabel=axis_label)
        axis.set_ylabel("score (0 to 100)")
        _log_tokens(axis)
        axis.set_ylim(-3, max(axis.get_ylim()[1], 10) + 2)
    shared_legend(figure, axes[-1])
    what = "length of the prompt" if ending == "_by_length" else "distance of the evidence"
    figure.suptitle(f"Score by {what}" + _window(results))
    return figure


def _mean_bins(tasks: Sequence[Bins]) -> Bins:
    """The mean over the tasks that have a bin, in the bins' order."""
    labels = sorted({label for task in tasks for label in task}, key=parse_label)
    return {
        label: statistics.fmean(task[label] for task in tasks if label in task) for label in labels
    }


def _log_line(axis: Axes, name: str, label: str, bins: Bins) -> None:
    places = []
    for key in bins:
        first, last = parse_label(key)
        places.append(math.sqrt(max(first, 1) * (last + 1)))
    control = name not in MARKERS
    axis.plot(
        places,
        list(bins.values()),
        color=COLOURS[name],
        label=label,
        marker=MARKERS.get(name, "x"),
        markersize=5,
        linewidth=1.2 if control else 2.0,
        linestyle="--" if control else "-",
        zorder=4 if control else 3,
    )


def _log_tokens(axis: Axes) -> None:
    """A logarithmic axis of token counts, around what is drawn."""
    places = [float(x) for line in axis.lines for x in line.get_xdata()]
    axis.set_xscale("log", base=2)
    axis.set_xlim(min(places) / 1.4, max(places) * 1.4)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_tokens(round(value))))


def needle_figure(results: Mapping[str, Any]) -> Figure | None:
    """Score by length and depth of the evidence, a map for each mixer and control."""
    ending = "_by_length_and_depth"
    series = [
        (label, cells)
        for _, label, metrics in measured(results)
        if (cells := _mean_cells([v for k, v in metrics.items() if k.endswith(ending)]))
    ]
    if not series:
        return None
    lengths = sorted({length for _, cells in series for length, _ in cells})
    depths = sorted({depth for _, cells in series for _, depth in cells})
    columns = min(len(series), 4)
    rows = -(-len(series) // columns)
    figure = Figure(figsize=(2.9 * columns + 1.2, 2.6 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    image = None
    for axis, entry in zip(axes.flat, [*series, *[None] * (rows * columns)], strict=False):
        if entry is None:
            axis.set_visible(False)
            continue
        label, cells = entry
        grid = [[cells.get((length, depth), math.nan) for length in lengths] for depth in depths]
        image = axis.imshow(grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                if not math.isnan(value):
                    axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8)
        axis.set_title(label, fontsize=10)
        axis.set_xticks(range(len(lengths)), [human_tokens(n) for n in lengths], fontsize=8)
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("depth of the evidence")
    for place, axis in enumerate(axes.flat):
        if len(series) - columns <= place < len(series):
            axis.set_xlabel("length (tokens)")
            axis.tick_params(labelbottom=True)
    assert image is not None
    figure.colorbar(image, ax=axes, label="score (0 to 100)", shrink=0.8)
    figure.suptitle("Where in the context the evidence is found" + _window(results))
    return figure


def _mean_cells(tasks: Sequence[Mapping[str, float]]) -> dict[tuple[int, float], float]:
    """{(length, depth): mean over the tasks}."""
    found: dict[tuple[int, float], list[float]] = {}
    for task in tasks:
        for key, value in task.items():
            length, _, depth = key.partition("@")
            found.setdefault((int(length), float(depth)), []).append(value)
    return {key: statistics.fmean(values) for key, values in found.items()}


def perplexity_figure(results: Mapping[str, Any]) -> Figure | None:
    """Perplexity of text over the position in the document."""
    series = [s for s in measured(results) if s[2].get("loss_by_position")]
    if not series:
        return None
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    axis = figure.subplots()
    for name, label, metrics in series:
        bins = {key: math.exp(loss) for key, loss in metrics["loss_by_position"].items()}
        centres = [sum(parse_label(key)) / 2 for key in bins]
        control = name not in MARKERS
        axis.plot(
            centres,
            list(bins.values()),
            color=COLOURS[name],
            label=label,
            marker=MARKERS.get(name, "x"),
            markersize=5,
            linewidth=1.2 if control else 2.0,
            linestyle="--" if control else "-",
        )
    window_line(axis, results, "position = window")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.5g}"))
    axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axis.set(xlabel="position in the document (tokens)", ylabel="perplexity of text (log scale)")
    shared_legend(figure, axis)
    figure.suptitle(subject_title(results, "Perplexity by position"))
    return figure


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
