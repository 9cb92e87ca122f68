"""One table of an evaluation: mixers, then the controls of `allmem`, from a results dictionary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import JustifyMethod
from rich.table import Table as RichTable

ROW_TITLES = {
    "memory_off": "allmem, memory off",
    "write_off": "allmem, write off",
    "state_shuffled": "allmem, state shuffled",
}
MISSING = "–"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: where its number is in a row's metrics, and how a person reads it."""

    title: str
    task: str
    metric: str
    unit: str
    """`loss`, `share`, `rate` or `bytes`."""


COLUMNS: tuple[Column, ...] = (
    Column(title="loss", task="overall", metric="loss", unit="loss"),
    Column(title="loss beyond window", task="overall", metric="loss_beyond_window", unit="loss"),
    Column(
        title="recall outside window",
        task="recall",
        metric="exact_match_outside_window",
        unit="share",
    ),
    Column(title="tokens/s", task="speed", metric="prefill_tokens_per_s", unit="rate"),
    Column(title="cache, {length}", task="cache", metric="bytes_at_length", unit="bytes"),
    Column(title="cache, {long}", task="cache", metric="bytes_at_long_context", unit="bytes"),
)


def human_bytes(value: float) -> str:
    """`17301504` to `16.5 MiB`; at least three significant digits, binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{_three_digits(value)} {unit}"
        value /= 1024
    return f"{_three_digits(value)} TiB"


def human_tokens(value: int) -> str:
    """`131072` to `128k`, `1024` to `1,024`: binary thousands from 4k on."""
    if value >= 4096 and value % 1024 == 0:
        return f"{value // 1024}k"
    return f"{value:,}"


def format_value(value: float | None, unit: str) -> str:
    """A number as the table prints it; a dash where there is none.

    Raises:
        ValueError: an unknown unit.
    """
    if value is None:
        return MISSING
    if unit == "loss":
        return f"{value:.3f}"
    if unit == "share":
        return f"{value:.2f}"
    if unit == "rate":
        return f"{value:,.0f}"
    if unit == "bytes":
        return human_bytes(value)
    raise ValueError(f"unit={unit!r} is not loss, share, rate or bytes; use one of them")


def table_cells(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of text: the mixers asked for, then the controls.

    A mixer in `results["missing"]` keeps its row, with "not trained" in it.
    """
    config = results["config"]
    lengths = {
        "length": human_tokens(int(config["length"])),
        "long": human_tokens(int(config["long_context"])),
    }
    headings = ["mixer", *(column.title.format(**lengths) for column in COLUMNS)]
    missing = results.get("missing", {})
    rows = []
    for mixer in config["mixers"]:
        if mixer in missing:
            rows.append([f"{mixer} (not trained)", *[MISSING] * len(COLUMNS)])
        elif mixer in results["mixers"]:
            rows.append(_row(mixer, results["mixers"][mixer]))
    for control in config["controls"]:
        if control in results["controls"]:
            rows.append(_row(ROW_TITLES[control], results["controls"][control]))
    return headings, rows


def has_documents(results: Mapping[str, Any]) -> bool:
    """Whether held-out documents were measured, which the table is about."""
    return any("overall" in metrics for metrics in results["mixers"].values())


def caption(results: Mapping[str, Any]) -> str:
    """What the numbers are, in two sentences."""
    config = results["config"]
    counts = [metrics.get("recall", {}) for metrics in results["mixers"].values()]
    questions = max((c.get("num_queries_outside_window", 0) for c in counts), default=0)
    return (
        f"Window {config['window_size']:,}, {config['num_sinks']:,} sinks, "
        f"chunk {config['chunk_size']:,}; documents of {int(config['length']):,} tokens. "
        "Loss in nats a token (text: every token; recall documents: the answers); beyond the "
        f"window: from position {config['window_size']:,} on. Recall: exact match of "
        f"{questions:,.0f} {'answer' if questions == 1 else 'answers'} whose evidence lies outside "
        "the window. Cache: one sequence, "
        f"{config['cache_element_bytes']} bytes an element, memory state in float32."
    )


def gap_line(results: Mapping[str, Any]) -> str:
    """How much of the window's loss the trained mixers win back; empty where none is measured."""
    parts = []
    for name, metrics in results["mixers"].items():
        gap = metrics.get("gap_closed_beyond_window", {})
        if "overall" in gap:
            kinds = ", ".join(f"{k} {v:.0%}" for k, v in gap.items() if k != "overall")
            parts.append(f"{name} {gap['overall']:.0%} ({kinds})")
    if not parts:
        return ""
    return f"Gap in loss beyond the window, from swa to full, closed by: {'; '.join(parts)}."


def markdown_table(results: Mapping[str, Any]) -> str:
    """The table as GitHub Markdown, with its caption and the mixers that are missing."""
    headings, rows = table_cells(results)
    widths = [max(len(line[i]) for line in [headings, *rows]) for i in range(len(headings))]
    lines = [_markdown_line(headings, widths), _markdown_rule(widths)]
    lines += [_markdown_line(row, widths) for row in rows]
    lines += ["", caption(results)]
    if gap := gap_line(results):
        lines += ["", gap]
    lines += [
        f"\nNot measured: `{name}`: {why}" for name, why in results.get("missing", {}).items()
    ]
    return "\n".join(lines) + "\n"


def terminal_table(results: Mapping[str, Any]) -> RichTable:
    """The same table for `rich.print`, within 80 columns; a line sets the controls off."""
    headings, rows = table_cells(results)
    table = RichTable(
        title="AllMem evaluation",
        caption=f"{caption(results)} {gap_line(results)}".rstrip(),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for index, heading in enumerate(headings):
        justify: JustifyMethod = "right" if index else "left"
        lines = heading.replace(" ", "\n")
        table.add_column(lines, justify=justify, vertical="bottom", no_wrap=True)
    num_controls = sum(1 for name in results["config"]["controls"] if name in results["controls"])
    for index, row in enumerate(rows):
        table.add_row(*row, end_section=index == len(rows) - num_controls - 1)
    return table


def _row(title: str, metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    values = [metrics.get(column.task, {}).get(column.metric) for column in COLUMNS]
    return [title, *(format_value(v, c.unit) for v, c in zip(values, COLUMNS, strict=True))]


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _markdown_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cells[0].ljust(widths[0])]
    padded += [c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)]
    return "| " + " | ".join(padded) + " |"


def _markdown_rule(widths: Sequence[int]) -> str:
    return "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
