"""The table says what the results say, in units that a person reads."""

import io
from typing import Any

import pytest
from rich.console import Console

from evals.table import (
    format_value,
    gap_line,
    human_bytes,
    human_tokens,
    markdown_table,
    table_cells,
    terminal_table,
)


def row(loss: float, recall: float) -> dict[str, dict[str, float]]:
    return {
        "overall": {"loss": loss, "loss_beyond_window": loss - 0.5},
        "recall": {"exact_match_outside_window": recall, "num_queries_outside_window": 20},
        "speed": {"prefill_tokens_per_s": 12345.6},
        "cache": {"bytes_at_length": 1024 * 300, "bytes_at_long_context": 17301504},
    }


def results() -> dict[str, Any]:
    return {
        "mixers": {"full": row(2.0, 0.975), "swa": row(3.0, 0.05), "allmem": row(2.5, 0.75)},
        "controls": {"memory_off": row(3.0, 0.05), "write_off": row(3.0, 0.05)},
        "missing": {"mamba2": "no weights under convert_mamba2/"},
        "config": {
            "mixers": ["full", "swa", "mamba2", "allmem"],
            "controls": ["memory_off", "write_off", "state_shuffled"],
            "window_size": 128,
            "num_sinks": 4,
            "chunk_size": 64,
            "length": 1024,
            "long_context": 131072,
            "cache_element_bytes": 2,
        },
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (17301504, "16.5 MiB")),
        *((512 * 2**20, "512 MiB"), (2**40, "1.00 TiB"), (5 * 2**50, "5120 TiB")),
    ],
)
def test_bytes_have_three_digits_and_binary_units(value: float, text: str) -> None:
    assert human_bytes(value) == text


def test_token_counts_are_short() -> None:
    assert [human_tokens(n) for n in (1024, 4096, 131072, 5000)] == [
        *("1,024", "4k", "128k", "5,000"),
    ]


def test_an_unknown_unit_is_refused_and_nothing_is_a_dash() -> None:
    assert format_value(None, "loss") == "–"
    with pytest.raises(ValueError, match="furlong"):
        format_value(1.0, "furlong")


def test_rows_are_the_mixers_then_the_controls_with_missing_ones_named() -> None:
    headings, rows = table_cells(results())
    assert headings[0] == "mixer"
    assert headings[-2:] == ["cache, 1,024", "cache, 128k"]
    assert [cells[0] for cells in rows] == [
        "full",
        "swa",
        "mamba2 (not trained)",
        "allmem",
        "allmem, memory off",
        "allmem, write off",
    ]
    assert rows[0][1:] == ["2.000", "1.500", "0.97", "12,346", "300 KiB", "16.5 MiB"]
    assert set(rows[2][1:]) == {"–"}


def test_markdown_has_one_line_a_row_and_says_what_is_missing() -> None:
    text = markdown_table(results())
    lines = text.splitlines()
    assert sum(line.startswith("|") for line in lines) == 2 + 6
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert "20 answers whose evidence lies outside the window" in text
    assert "`mamba2`: no weights under convert_mamba2/" in text


def test_the_closed_gap_is_told_in_percent() -> None:
    assert gap_line(results()) == ""
    measured = results()
    gap = {"text": 0.25, "recall": 0.8, "overall": 0.625}
    measured["mixers"]["allmem"]["gap_closed_beyond_window"] = gap
    assert gap_line(measured).endswith("closed by: allmem 62% (text 25%, recall 80%).")
    assert "allmem 62%" in markdown_table(measured)


def test_the_terminal_table_shows_every_row_unbroken_in_80_columns() -> None:
    console = Console(width=80, file=io.StringIO())
    console.print(terminal_table(results()))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    rows = [line.split() for line in lines if line.strip().startswith(("full", "swa", "allmem,"))]
    assert [row[-2:] for row in rows] == [["16.5", "MiB"]] * 4
    assert any("mamba2 (not trained)" in line for line in lines)
    assert all(len(line) <= 80 for line in lines)
