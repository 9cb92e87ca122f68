"""Figures of several evaluations: a colour for each mixer, a line style for each run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from evals.bins import parse_label
from evals.config import COLOURS, MIXERS
from evals.paper_tables import Subject

LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DPI = 130

Bins = Mapping[str, float]


def draw_all(subjects: Sequence[Subject], folder: Path) -> list[Path]:
    """Draw each figure for which any subject has numbers; the files written."""
    files = []
    for name, figure in figures_of(subjects).items():
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=DPI)
            files.append(path)
    return files


def figures_of(subjects: Sequence[Subject]) -> dict[str, Figure | None]:
    """The figures by name; None where no subject has numbers for one."""
    return {
        "score_by_length": score_figure(
            subjects, "_by_length", "length of the prompt (tokens)", "Score by length"
        ),
        "score_by_distance": score_figure(
            subjects,
            "_by_distance",
            "tokens from the evidence to the prompt's end",
            "Score by distance of the evidence",
        ),
        "needle_map": needle_figure(subjects),
        "perplexity_by_position": perplexity_figure(subjects),
    }


def score_figure(subjects: Sequence[Subject], ending: str, label: str, title: str) -> Figure | None:
    """Scores over bins of length or distance, a panel a suite.

    A line is the mean over the suite's tasks that every shown subject answered, so that no line
    rests on easier tasks than another.
    """
    suites: dict[str, list[str]] = {}
    for subject in subjects:
        for task, about in subject.tasks.items():
            if subject.metrics.get(task + ending):
                suites.setdefault(about["suite"], [])
                if task not in suites[about["suite"]]:
                    suites[about["suite"]].append(task)
    panels = {}
    for suite, tasks in suites.items():
        having = [s for s in subjects if any(s.metrics.get(t + ending) for t in tasks)]
        shared = [t for t in tasks if all(s.metrics.get(t + ending) for s in having)]
        if shared:
            panels[suite] = (having, shared)
    if not panels:
        return None
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns + 2.6, 3.9 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (suite, (having, tasks)) in zip(axes, panels.items(), strict=False):
        for subject in having:
            bins = mean_bins([subject.metrics[task + ending] for task in tasks])
            middles = [math.sqrt(max(a, 1) * (b + 1)) for a, b in map(parse_label, bins)]
            _line(axis, subjects, subject, middles, list(bins.values()))
        plural = "" if len(tasks) == 1 else "s"
        axis.set(title=f"{suite} ({len(tasks)} task{plural})", xlabel=label)
        axis.set_ylabel("score (0 to 100)")
        axis.set_xscale("log", base=2)
        _windows(axis, having)
        _tokens(axis)
        top = max(axis.get_ylim()[1], 10) * 1.03
        axis.set_ylim(-0.04 * top, top)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    _legend(figure)
    figure.suptitle(title)
    return figure


def mean_bins(tasks: Sequence[Bins]) -> dict[str, float]:
    """The mean over the tasks that have a bin, in the bins' order."""
    labels = sorted({label for task in tasks for label in task}, key=parse_label)
    return {
        label: statistics.fmean(task[label] for task in tasks if label in task) for label in labels
    }


def needle_figure(subjects: Sequence[Subject]) -> Figure | None:
    """Score by length and depth of the evidence: a row a run, a column a mixer."""
    maps = {
        (s.run, s.title): cells
        for s in subjects
        if (
            cells := _cells([v for k, v in s.metrics.items() if k.endswith("_by_length_and_depth")])
        )
    }
    if not maps:
        return None
    runs = list(dict.fromkeys(run for run, _ in maps))
    titles = list(dict.fromkeys(title for _, title in maps))
    lengths = sorted({length for cells in maps.values() for length, _ in cells})
    depths = sorted({depth for cells in maps.values() for _, depth in cells})
    figure = Figure(figsize=(2.7 * len(titles) + 1.6, 2.5 * len(runs) + 0.9), layout="constrained")
    axes = figure.subplots(len(runs), len(titles), squeeze=False, sharex=True, sharey=True)
    image = None
    for row, run in enumerate(runs):
        for column, title in enumerate(titles):
            axis = axes[row][column]
            cells = maps.get((run, title), {})
            grid = [[cells.get((n, depth), math.nan) for n in lengths] for depth in depths]
            image = axis.imshow(grid, vmin=0, vmax=100, cmap="cividis", aspect="auto")
            for y, line in enumerate(grid):
                for x, value in enumerate(line):
                    if not math.isnan(value):
                        colour = "white" if value < 50 else "black"
                        axis.text(
                            x, y, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour
                        )
            if not cells:
                axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
            axis.set_xticks(range(len(lengths)), [_short(n) for n in lengths], fontsize=8)
            axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
            if row == 0:
                axis.set_title(title, fontsize=10)
            if column == 0:
                axis.set_ylabel(f"{run}\ndepth" if run else "depth of the evidence")
            if row == len(runs) - 1:
                axis.set_xlabel("length (tokens)")
    assert image is not None
    figure.colorbar(image, ax=axes, label="score (0 to 100)", shrink=0.8)
    figure.suptitle("Where in the context the evidence is found")
    return figure


def _cells(tasks: Sequence[Bins]) -> dict[tuple[int, float], float]:
    found: dict[tuple[int, float], list[float]] = {}
    for task in tasks:
        for key, value in task.items():
            length, _, depth = key.partition("@")
            found.setdefault((int(length), float(depth)), []).append(value)
    return {key: statistics.fmean(values) for key, values in found.items()}


def perplexity_figure(subjects: Sequence[Subject]) -> Figure | None:
    """Perplexity of held-out text over the position in the document."""
    shown = [s for s in subjects if s.metrics.get("loss_by_position")]
    if not shown:
        return None
    figure = Figure(figsize=(8.8, 4.6), layout="constrained")
    axis = figure.subplots()
    for subject in shown:
        bins = subject.metrics["loss_by_position"]
        middles = [sum(parse_label(key)) / 2 for key in bins]
        _line(axis, subjects, subject, middles, [math.exp(loss) for loss in bins.values()])
    _windows(axis, shown)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axis.tick_params(axis="y", which="minor", labelsize=8)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set(xlabel="position in the document (tokens)", ylabel="perplexity (log scale)")
    _legend(figure)
    figure.suptitle("Perplexity of held-out text by position")
    return figure


def _line(
    axis: Axes, subjects: Sequence[Subject], subject: Subject, x: list[float], y: list[float]
) -> None:
    runs = list(dict.fromkeys(s.run for s in subjects))
    place = runs.index(subject.run)
    control = len(runs) == 1 and subject.name not in MIXERS
    axis.plot(
        x,
        y,
        color=COLOURS.get(subject.name, "grey"),
        linestyle="--" if control else LINES[place % len(LINES)],
        marker="x" if control else MARKERS[place % len(MARKERS)],
        markersize=5,
        linewidth=1.8,
        label=subject.label,
    )


def _windows(axis: Axes, subjects: Sequence[Subject]) -> None:
    """A dotted line at each window there is, named; the names stand one below the other."""
    windows = {int(s.config["window_size"]) for s in subjects if "window_size" in s.config}
    for place, window in enumerate(sorted(windows)):
        axis.axvline(window, color="grey", linestyle=":", linewidth=1.3)
        axis.annotate(
            f"W = {_short(window)}",
            (window, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(2, -9 * (place + 1)),
            textcoords="offset points",
            fontsize=7,
            color="grey",
        )
    axis.grid(alpha=0.3)


def _tokens(axis: Axes) -> None:
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _short(tokens: float) -> str:
    """`2048` to `2k`, as axes have room for."""
    whole = round(tokens)
    return f"{whole // 1024}k" if whole >= 1024 and whole % 1024 == 0 else f"{whole:,}"


def _legend(figure: Figure) -> None:
    """One legend of all lines, beside the panels."""
    found: dict[str, Artist] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(list(found.values()), list(found), loc="outside right center", frameon=False)
