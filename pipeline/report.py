"""Figures and files of an evaluation, from its results dictionary and the stages' metrics.

Every figure is drawn from numbers that are in `results.json` or a `metrics.jsonl`, and can be drawn
again from them: `write_report` measures nothing.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from evals.paper_tables import paper_tables, subjects_of
from evals.table import format_value, has_documents, human_tokens, markdown_table
from pipeline.atomic import write_atomically
from pipeline.evaluating.drawing import (
    COLOURS,
    MARKERS,
    binned_line,
    measured,
    shared_legend,
    subject_title,
    window_line,
)
from pipeline.evaluating.figures import task_figures

LOSS_LABELS = {
    "pretrain": "next-token loss (nats/token)",
    "align": "error of the branch (relative to the window's)",
    "convert": "KL to full attention (nats/token)",
    "sft": "next-token loss (nats/token)",
}
"""What `train/loss` is in each stage."""
DPI = 130


def write_report(
    results: Mapping[str, Any], out_dir: Path, metrics_files: Mapping[str, Path]
) -> list[Path]:
    """Write `results.json`, `table.md` and `plots/*.png`.

    Args:
        results: the evaluation, of design.md's contract.
        out_dir: `evaluate/` of the run.
        metrics_files: `metrics.jsonl` of training stages by title, such as `convert`; files that
            are not there are left out.

    Returns:
        The files written: results, table, then figures; a figure with nothing to show is not drawn.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "plots").mkdir(exist_ok=True)
    files = [out_dir / "results.json", out_dir / "table.md"]
    _write(files[0], (json.dumps(results, indent=2) + "\n").encode())
    _write(files[1], tables(results).encode())
    curves = {title: read_metrics(path) for title, path in metrics_files.items() if path.is_file()}
    figures: dict[str, Figure | None] = {
        "summary": summary_figure(results) if has_documents(results) else None,
        "loss_by_position": position_figure(results),
        "recall_by_distance": distance_figure(results),
        "alpha_by_layer": alpha_figure(results),
        **task_figures(results),
        **training_figures(curves),
    }
    for name, figure in figures.items():
        if figure is not None:
            path = out_dir / "plots" / f"{name}.png"
            image = io.BytesIO()
            figure.savefig(image, format="png", dpi=DPI)
            _write(path, image.getvalue())
            files.append(path)
    for old in set((out_dir / "plots").glob("*.png")) - set(files):
        old.unlink()  # of an earlier evaluation, which showed more
    return files


def tables(results: Mapping[str, Any]) -> str:
    """Loss, recall and costs, then the tasks in the shape of the paper's tables, as Markdown."""
    tasks = paper_tables(subjects_of({"": results}, controls=True), held_out=False)
    held_out = markdown_table(results) if has_documents(results) else ""
    refused = "".join(
        f"Not in the scores: {about['num_refused']} examples of `{name}`, longer than "
        f"{results['config']['max_positions']:,} positions.\n"
        for name, about in results.get("tasks", {}).items()
        if about.get("num_refused")
    )
    return "\n".join(part for part in (held_out, tasks, refused) if part)


def _write(path: Path, content: bytes) -> None:
    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_atomically(path, write)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Lines of a `metrics.jsonl`, by step; of a step written twice (a resumed run) the last counts.

    Raises:
        ValueError: a line other than an unfinished last one is not JSON.
    """
    by_step: dict[int, dict[str, float]] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # a process was killed while writing it
                break
            raise ValueError(
                f"{path.name} line {number} is not JSON ({error}); remove that line"
            ) from error
        if "step" in record:
            by_step[int(record["step"])] = record
    return [by_step[step] for step in sorted(by_step)]


def summary_figure(results: Mapping[str, Any]) -> Figure:
    """The table as pictures: quality of mixers and controls above, costs of mixers below."""
    config = results["config"]
    length, long = (human_tokens(int(config[key])) for key in ("length", "long_context"))
    quality = (
        ("Loss, all positions\n(nats/token, lower is better)", "overall", "loss", "loss"),
        ("Loss beyond window\n(nats/token)", "overall", "loss_beyond_window", "loss"),
        ("Recall outside window\n(exact match)", "recall", "exact_match_outside_window", "share"),
    )
    costs = (
        ("Prefill speed\n(tokens/s)", "speed", "prefill_tokens_per_s", "rate"),
        (f"Cache at {length} tokens\n(bytes, log scale)", "cache", "bytes_at_length", "bytes"),
        (f"Cache at {long} tokens\n(bytes, log scale)", "cache", "bytes_at_long_context", "bytes"),
    )
    series = (measured(results), measured(results, controls=False))
    heights = [len(rows) + 1.5 for rows in series]
    figure = Figure(figsize=(13, 1 + 0.42 * sum(heights)), layout="constrained")
    axes = figure.subplots(2, 3, sharey="row", height_ratios=heights)
    for row, (rows, panels) in enumerate(zip(series, (quality, costs), strict=True)):
        axes[row, 0].set_yticks(range(len(rows)), [title for _, title, _ in rows])
        axes[row, 0].set_ylim(len(rows) - 0.4, -0.6)
        for axis, (title, task, metric, unit) in zip(axes[row], panels, strict=True):
            values = [metrics.get(task, {}).get(metric) for _, _, metrics in rows]
            draw = _points if unit == "loss" else _bars
            draw(axis, [name for name, _, _ in rows], values, unit)
            axis.set_title(title, fontsize=10)
            axis.grid(axis="x", alpha=0.3)
            axis.set_axisbelow(True)
    figure.suptitle(subject_title(results, "Mixers side by side"))
    return figure


def position_figure(results: Mapping[str, Any]) -> Figure | None:
    """Loss of text, and of recall answers, over the position in the document."""
    series = measured(results)
    panels = [
        (task, title)
        for task, title in (
            ("loss_by_position", "Text: next-token loss"),
            ("answer_loss_by_position", "Recall documents: loss of the answers"),
        )
        if any(task in metrics for _, _, metrics in series)
    ]
    if not panels:
        return None
    figure = Figure(figsize=(6.4 * len(panels) + 1.6, 4.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (task, title) in zip(axes, panels, strict=True):
        for name, label, metrics in series:
            binned_line(axis, name, label, metrics.get(task, {}))
        window_line(axis, results, "position = window")
        axis.set(title=title, xlabel="position in the document (tokens)")
        axis.set_ylabel("loss (nats/token)")
        axis.set_ylim(bottom=max(0.0, axis.get_ylim()[0]))
    shared_legend(figure, axes[-1])
    figure.suptitle(subject_title(results, "Loss by position"))
    return figure


def distance_figure(results: Mapping[str, Any]) -> Figure | None:
    """Exact match of recall over the distance to the evidence."""
    series = measured(results)
    if not any(metrics.get("recall_by_distance") for _, _, metrics in series):
        return None
    figure = Figure(figsize=(8.6, 4.8), layout="constrained")
    axis = figure.subplots()
    for name, label, metrics in series:
        binned_line(axis, name, label, metrics.get("recall_by_distance", {}))
    window_line(axis, results, "distance = window")
    axis.set(xlabel="distance from the evidence to the answer (tokens)")
    axis.set_ylabel("exact match (share of answers)")
    axis.set_ylim(-0.03, 1.03)
    shared_legend(figure, axis)
    figure.suptitle(subject_title(results, "Recall by distance of the evidence"))
    return figure


def alpha_figure(results: Mapping[str, Any]) -> Figure | None:
    """Mean |alpha| of each layer: how much of the memory's output the layers let in."""
    chosen = [s for s in measured(results, controls=False) if s[2].get("alpha_by_layer")]
    if not chosen:
        return None
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(chosen)
    for index, (name, label, metrics) in enumerate(chosen):
        alphas = {int(layer): value for layer, value in metrics["alpha_by_layer"].items()}
        offset = (index - (len(chosen) - 1) / 2) * width
        places = [layer + offset for layer in alphas]
        axis.bar(places, list(alphas.values()), width, color=COLOURS[name], label=label)
    axis.set(xlabel="layer (0 is next to the embedding)", ylabel="mean |α| over channels")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(axis="y", alpha=0.3)
    axis.legend()
    figure.suptitle("Weight of the memory branch, by layer (0 at the start of conversion)")
    return figure


def training_figures(
    curves: Mapping[str, Sequence[Mapping[str, float]]],
) -> dict[str, Figure | None]:
    """One figure for each kind of stage, its branches together, by `training_STAGE`."""
    groups: dict[str, dict[str, Sequence[Mapping[str, float]]]] = {}
    for title, lines in curves.items():
        stage = next((name for name in LOSS_LABELS if title.startswith(name)), None)
        if stage is not None and lines:
            groups.setdefault(stage, {})[title] = lines
    return {f"training_{stage}": _training_figure(stage, g) for stage, g in groups.items()}


def _training_figure(stage: str, curves: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Loss, gradient norm, learning rate and, where it is told, mean |alpha| over steps."""
    panels = [
        ("train/loss", LOSS_LABELS[stage], "linear"),
        ("train/grad_norm", "gradient norm (L2, before clipping)", "log"),
        ("train/lr", "learning rate", "linear"),
        ("memory/alpha_abs/mean", "mean |α| over channels and layers", "linear"),
    ]
    panels = [p for p in panels if any(p[0] in line for ls in curves.values() for line in ls)]
    figure = Figure(figsize=(4.6 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (key, label, scale) in zip(axes, panels, strict=True):
        for index, (title, lines) in enumerate(curves.items()):
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if points:
                smooth = key in ("train/loss", "train/grad_norm")
                _training_line(axis, points, title, index, smooth=smooth)
        axis.set(xlabel="step", ylabel=label)
        if scale == "log" and any(max(line.get_ydata()) > 0 for line in axis.lines):
            axis.set_yscale("log")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"Training, stage {stage} (thin: each step; thick: running mean)")
    return figure


def _training_line(
    axis: Axes, points: Sequence[tuple[float, float]], stage: str, index: int, *, smooth: bool
) -> None:
    steps, values = zip(*points, strict=True)
    colour, dashes = f"C{index}", ("-", "--", "-.", ":")[index % 4]
    if not smooth or len(points) < 20:
        axis.plot(steps, values, color=colour, linestyle=dashes, label=stage)
        return
    axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    span = max(3, len(values) // 40)
    running = [
        sum(values[max(0, i - span) : i + 1]) / len(values[max(0, i - span) : i + 1])
        for i in range(len(values))
    ]
    axis.plot(steps, running, color=colour, linewidth=1.8, label=stage)


def _points(axis: Axes, names: Sequence[str], values: Sequence[float | None], unit: str) -> None:
    """Losses as points: their differences count, so the axis does not begin at zero."""
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        if value is not None:
            axis.plot(value, index, MARKERS.get(name, "X"), color=COLOURS[name], markersize=9)
        _annotate(axis, value, index, unit)
    present = [value for value in values if value is not None]
    if present:
        least, spread = min(present), max(max(present) - min(present), 0.01)
        axis.set_xlim(least - 0.12 * spread, least + 1.35 * spread)
    axis.xaxis.set_major_locator(MaxNLocator(4))


def _bars(axis: Axes, names: Sequence[str], values: Sequence[float | None], unit: str) -> None:
    numbers = [0.0 if value is None else float(value) for value in values]
    axis.barh(range(len(names)), numbers, color=[COLOURS[name] for name in names], height=0.7)
    present = [number for number in numbers if number > 0]
    if unit == "bytes" and present:
        axis.set_xscale("log", base=2)
        axis.set_xlim(min(present) / 4, max(present) * 16)
        axis.set_xticks([], [])  # the numbers stand beside the bars
        axis.set_xticks([], [], minor=True)
    elif unit == "share":
        axis.set_xlim(0, 1.22)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1])
    elif present:
        axis.set_xlim(0, max(present) * 1.22)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    for index, value in enumerate(values):
        _annotate(axis, value, index, unit)


def _annotate(axis: Axes, value: float | None, index: int, unit: str) -> None:
    place = (value, index) if value else (0.01, index)
    axis.annotate(
        format_value(value, unit),
        place,
        xycoords="data" if value else ("axes fraction", "data"),
        xytext=(8 if unit == "loss" else 4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
    )
