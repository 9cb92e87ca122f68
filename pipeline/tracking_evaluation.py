"""An evaluation for MLflow: a run for each mixer and control, with the same metrics in each.

MLflow draws a chart for each metric with a line for each run. So the mixers are runs under the
evaluation's run, and what is binned (by length, distance, position, layer) is a metric whose steps
are the bins' lower bounds: the charts then have a line for each mixer.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.tracking_names import metric_name

_BINNED = (
    ("_by_length", "eval by length"),
    ("_by_distance", "eval by distance"),
    ("_by_layer", "memory by layer"),
)
_NORM = re.compile(r"(weights|momentum)_norm_layer_(\d+)_by_position")
_UNITS = {"k": 1000, "m": 1_000_000}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One number of a subject."""

    name: str
    step: int
    value: float


def subjects(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Metrics by task of each mixer and each control of `results.json`, in the table's order."""
    return {**results["mixers"], **results["controls"]}


def points_of(
    tasks: Mapping[str, Mapping[str, Any]], about: Mapping[str, Mapping[str, Any]]
) -> list[Point]:
    """All numbers of a subject: single ones at step 0, bins at their lower bound.

    Args:
        tasks: the subject's metrics by task.
        about: `tasks` of the results, which name each task's score.
    """
    scores = [
        Point(
            name=metric_name(f"eval scores/{_flat(task)}"), step=0, value=float(tasks[task][metric])
        )
        for task, metric in ((task, known["metric"]) for task, known in about.items())
        if task in tasks and isinstance(tasks[task].get(metric), int | float)
    ]
    return scores + [point for task, metrics in tasks.items() for point in _points(task, metrics)]


def _points(task: str, metrics: Mapping[str, Any]) -> Iterator[Point]:
    if task.endswith("_by_length_and_depth") or "_count_by_" in task:
        return  # the needle map is a figure; counts are in the file
    name = _binned_name(task)
    for key, value in metrics.items():
        if not isinstance(value, int | float):
            continue
        if name is None:
            yield Point(name=metric_name(f"eval: {_flat(task)}/{key}"), step=0, value=float(value))
        elif (step := lower_bound(key)) is not None:
            yield Point(name=metric_name(name), step=step, value=float(value))


def _binned_name(task: str) -> str | None:
    """Section and name of a task that is made of bins, or None."""
    if found := _NORM.fullmatch(task):
        kind, layer = found.groups()
        return f"memory by position/{kind}_norm layer {int(layer):02d}"
    if task.endswith("_by_position"):
        return f"eval by position/{_flat(task.removesuffix('_by_position'))}"
    for ending, section in _BINNED:
        if task.endswith(ending):
            return f"{section}/{_flat(task.removesuffix(ending))}"
    return None


def _flat(task: str) -> str:
    """A task's name without `/`, which would make a section of its own for each suite."""
    return task.replace("/", " ")


def lower_bound(key: str) -> int | None:
    """Where a bin begins: 64 of `64-127` or `64+`, 16000 of `16k`; None for what is no number."""
    found = re.match(r"(\d+(?:\.\d+)?)([kmKM]?)", key)
    if found is None:
        return None
    return int(float(found.group(1)) * _UNITS.get(found.group(2).lower(), 1))


def describe(title: str, table: str, limit: int = 7000) -> str:
    """Markdown for a run's page: what it is, then as much of the result table as fits."""
    text = f"{title}\n\n{table}".strip()
    while len(text) > limit and "\n" in text:
        text = text.rsplit("\n", 1)[0]
    return text


def report_page(folder: Path, title: str) -> str:
    """`table.md` and `plots/*.png` of an evaluation as one HTML page without links to files."""
    parts = [f"<h1>{html.escape(title)}</h1>", markdown_to_html((folder / "table.md").read_text())]
    for path in sorted((folder / "plots").glob("*.png")):
        data = base64.b64encode(path.read_bytes()).decode()
        name = path.stem.replace("_", " ")
        parts.append(f'<h2>{html.escape(name)}</h2><img alt="{name}" src="data:image/png;base64,')
        parts[-1] += f'{data}">'
    style = (
        "body{font-family:sans-serif;margin:1.5em;max-width:70em}table{border-collapse:collapse}"
        "th,td{padding:.3em .8em;border-bottom:1px solid #ddd;text-align:right}"
        "th:first-child,td:first-child{text-align:left}img{max-width:100%}"
    )
    body = "\n".join(parts)
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{style}</style>"
    return f"<!doctype html><html><head>{head}</head><body>\n{body}\n</body></html>\n"


def markdown_to_html(text: str) -> str:
    """Headings, pipe tables and paragraphs, which is all that the result table has."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.splitlines()
        if lines[0].startswith("|"):
            blocks.append(_html_table(lines))
        elif heading := re.match(r"(#+) (.*)", lines[0]):
            level = min(len(heading.group(1)) + 1, 6)
            blocks.append(f"<h{level}>{html.escape(heading.group(2))}</h{level}>")
            blocks += [f"<p>{html.escape(' '.join(lines[1:]))}</p>"] * bool(lines[1:])
        else:
            blocks.append(f"<p>{html.escape(' '.join(lines))}</p>")
    return "\n".join(blocks)


def _html_table(lines: list[str]) -> str:
    rows = []
    for number, line in enumerate(line for line in lines if line.startswith("|")):
        if number == 1 and not re.search(r"[^|:\- ]", line):
            continue
        cell = "th" if number == 0 else "td"
        cells = [html.escape(text.strip()) for text in line.strip().strip("|").split("|")]
        rows.append("<tr>" + "".join(f"<{cell}>{text}</{cell}>" for text in cells) + "</tr>")
    return "<table>" + "".join(rows) + "</table>"
