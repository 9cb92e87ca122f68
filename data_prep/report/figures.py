"""Figures of the report, from its facts alone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from data_prep.dedup import EXACT, NEAR
from data_prep.report.facts import CATEGORIES, KEPT, UNREADABLE, Facts, SourceFacts

DPI = 150
_WIDTH = 9.8
_MAX_ROWS = 24
"""More sources are drawn as one row."""
# Okabe and Ito's palette, told apart by people with colour blindness too.
COLOURS = {
    KEPT: "#56B4E9",
    "filters": "#E69F00",
    "language": "#F0E442",
    "evaluation text": "#D55E00",
    EXACT: "#CC79A7",
    NEAR: "#8B4A78",
    "length in tokens": "#999999",
    UNREADABLE: "#000000",
}
LOSS_COLOUR, READ_COLOUR, PADDING_COLOUR = "#009E73", "#B5DDCF", "#E4E4E4"
_SOURCES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
_TEXT: dict[str, Any] = {"size": 10, "color": "#333333"}


def figures(facts: Facts) -> dict[str, Figure]:
    """Figures by file name; one with nothing to show is left out."""
    found = {
        "tokens": tokens_figure(facts),
        "lengths": lengths_figure(facts),
        "kept": kept_figure(facts),
        "packing": packing_figure(facts),
    }
    return {name: figure for name, figure in found.items() if figure is not None}


def png(figure: Figure) -> bytes:
    """A figure as a file, the same bytes for the same numbers."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=DPI, metadata={"Software": None})
    return data.getvalue()


def tokens_figure(facts: Facts) -> Figure | None:
    """Tokens of each source, by whether they carry loss."""
    rows = [source for source in facts.sources if source.num_tokens]
    if not rows:
        return None
    rows = _fold(rows)
    figure, axis = _rows_figure(rows)
    loss = np.array([row.num_loss_tokens for row in rows], dtype=float)
    total = np.array([row.num_tokens for row in rows], dtype=float)
    places = np.arange(len(rows))
    axis.barh(places, loss, color=LOSS_COLOUR, label="loss targets", height=0.66)
    axis.barh(places, total - loss, left=loss, color=READ_COLOUR, label="only read", height=0.66)
    for place, row in enumerate(rows):
        label = f"{human(row.num_tokens)}, {percent(row.loss_share)} with loss"
        _beside(axis, float(row.num_tokens), place, label)
    axis.set_xlim(0, float(total.max()) * 1.32)
    axis.set_xlabel("tokens, without padding")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human(value)))
    return _finish(figure, axis)


def lengths_figure(facts: Facts) -> Figure | None:
    """How many documents have which length, by powers of two, sources on top of each other."""
    rows = [source for source in facts.of("train") if any(source.report.get("lengths", []))]
    if not rows:
        return None
    counts = np.zeros((len(rows), 34))
    for place, row in enumerate(rows):
        lengths = row.report["lengths"]
        counts[place, : len(lengths)] = lengths
    used = np.flatnonzero(counts.any(axis=0))
    first, last = int(used[0]), int(used[-1])
    figure = Figure(figsize=(_WIDTH, 3.6), layout="constrained")
    axis = figure.subplots()
    below = np.zeros(34)
    shown = sorted(range(len(rows)), key=lambda place: -counts[place].sum())
    groups = [[place] for place in shown[: len(_SOURCES) - 1]]
    if rest := shown[len(_SOURCES) - 1 :]:
        groups.append(rest)
    for colour, group in zip(_SOURCES, groups, strict=False):
        heights = counts[group].sum(axis=0)
        name = _name(rows[group[0]].name) if len(group) == 1 else f"{len(group)} more"
        axis.bar(np.arange(34), heights, bottom=below, color=colour, label=name, width=0.86)
        below += heights
    limit = float(np.log2(facts.manifest.seq_length))
    axis.axvline(limit + 0.5, color="#555555", linestyle=":", linewidth=1.4)
    axis.annotate(
        f"a sample holds {facts.manifest.seq_length:,}",
        (limit + 0.5, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        va="bottom",
        **_TEXT,
    )
    places = np.arange(min(first, int(limit)), max(last, int(np.ceil(limit))) + 1)
    axis.set_xlim(places[0] - 0.6, places[-1] + 0.8)
    axis.set_xticks(places, [f"{2**place:,}" for place in places], rotation=30, ha="right")
    axis.set_xlabel("tokens of a document, at most")
    axis.set_ylabel("documents kept")
    axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return _finish(figure, axis)


def kept_figure(facts: Facts) -> Figure | None:
    """Shares of the documents that were kept and dropped, by group of reasons."""
    rows = [s for s in facts.sources if not s.generated and s.num_read + s.num_bad]
    if not rows:
        return None
    rows = rows[:_MAX_ROWS]
    figure, axis = _rows_figure(rows)
    places = np.arange(len(rows))
    tables = [row.by_category() for row in rows]
    totals = np.array([max(sum(table.values()), 1) for table in tables], dtype=float)
    left = np.zeros(len(rows))
    for name in CATEGORIES:
        counts = np.array([table[name] for table in tables], dtype=float)
        if not counts.any():
            continue
        axis.barh(places, counts / totals, left=left, color=COLOURS[name], label=name, height=0.66)
        left += counts / totals
    for place, row in enumerate(rows):
        gone = row.num_dropped + row.num_bad
        _beside(axis, 1.0, place, f"{row.num_kept:,} kept, {gone:,} not")
    axis.set_xlim(0, 1.32)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axis.set_xlabel("documents")
    return _finish(figure, axis)


def packing_figure(facts: Facts) -> Figure | None:
    """How full the samples of each source are."""
    rows = [source for source in facts.sources if source.room]
    if not rows:
        return None
    rows = _fold(rows)
    figure, axis = _rows_figure(rows)
    places = np.arange(len(rows))
    fill = np.array([row.fill for row in rows])
    axis.barh(places, fill, color=LOSS_COLOUR, label="text", height=0.66)
    axis.barh(places, 1 - fill, left=fill, color=PADDING_COLOUR, label="padding", height=0.66)
    for place, row in enumerate(rows):
        samples = f"{row.num_samples:,} sample{'' if row.num_samples == 1 else 's'}"
        _beside(axis, 1.0, place, f"{percent(row.fill)} of {samples}")
    axis.set_xlim(0, 1.32)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axis.set_xlabel("tokens of the samples")
    return _finish(figure, axis)


def human(number: float) -> str:
    """`950`, `12.3 k`, `4.56 M`, `1.2 G`."""
    for unit in ("", " k", " M", " G"):
        if abs(number) < 1000 or unit == " G":
            break
        number /= 1000
    digits = 0 if not unit or number >= 100 else 1 if number >= 10 else 2
    shown = f"{number:,.{digits}f}"
    return (shown.rstrip("0").rstrip(".") if "." in shown else shown) + unit


def percent(share: float) -> str:
    """`62 %`, `99.7 %`; what is not all is never shown as 100 %."""
    if 0.9995 <= share < 1:
        return "99.9+ %"
    if 0 < share < 0.0005:
        return "< 0.1 %"
    return f"{share:.1%}".replace(".0%", "%").replace("%", " %")


def _fold(rows: Sequence[SourceFacts]) -> list[SourceFacts]:
    """The first rows of many, so that a figure stays one."""
    return list(rows)[:_MAX_ROWS]


def _rows_figure(rows: Sequence[SourceFacts]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, 1.4 + 0.36 * len(rows)), layout="constrained")
    axis = figure.subplots()
    axis.set_yticks(range(len(rows)), [f"{row.split}  {_name(row.name)}" for row in rows])
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    return figure, axis


def _beside(axis: Axes, value: float, place: int, label: str) -> None:
    axis.annotate(
        label, (value, place), xytext=(6, 0), textcoords="offset points", va="center", **_TEXT
    )


def _finish(figure: Figure, axis: Axes) -> Figure:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#bbbbbb")
    axis.tick_params(colors="#333333", labelsize=10)
    axis.xaxis.label.set_color("#555555")
    axis.yaxis.label.set_color("#555555")
    entries = len(axis.get_legend_handles_labels()[0])
    columns = entries if entries <= 6 else 4
    figure.legend(loc="outside upper left", ncols=max(columns, 1), frameon=False, fontsize=10)
    return figure


def _name(name: str, limit: int = 28) -> str:
    """A source's name for matplotlib, which takes $ for formulas."""
    short = name if len(name) <= limit else f"{name[: limit - 1]}…"
    return short.replace("$", r"\$")
