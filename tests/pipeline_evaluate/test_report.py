"""The report holds what the results hold; its figures say what they show, in which unit."""

import json
import math
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from evals.bins import bin_edges, bin_label
from pipeline.report import (
    alpha_figure,
    distance_figure,
    position_figure,
    read_metrics,
    summary_figure,
    training_figures,
    write_report,
)

EDGES = bin_edges(256, 32, 8)
LABELS = [bin_label(EDGES, i) for i in range(len(EDGES) - 1)]


def metrics(level: float, *, alpha: bool = False) -> dict[str, dict[str, float]]:
    values: dict[str, dict[str, float]] = {
        "overall": {"loss": level, "loss_beyond_window": level + 0.1},
        "recall": {"exact_match_outside_window": 1 / level, "num_queries_outside_window": 8},
        "loss_by_position": {label: level - 0.1 * i for i, label in enumerate(LABELS)},
        "answer_loss_by_position": {LABELS[-1]: level},
        "recall_by_distance": dict.fromkeys(LABELS[1:], 1 / level),
        "speed": {"prefill_tokens_per_s": 1000 * level},
        "cache": {"bytes_at_length": 1e5 * level, "bytes_at_long_context": 1e7 * level},
    }
    if alpha:
        values["alpha_by_layer"] = {"0": 0.1, "1": 0.3}
    return values


def results(**changes: Any) -> dict[str, Any]:
    return {
        "mixers": {"full": metrics(1.0), "swa": metrics(2.0), "allmem": metrics(1.5, alpha=True)},
        "controls": {"memory_off": metrics(2.0)},
        "missing": {"mamba2": "no weights under convert_mamba2/"},
        "config": {
            "mixers": ["full", "swa", "mamba2", "allmem"],
            "controls": ["memory_off", "write_off"],
            "window_size": 32,
            "num_sinks": 2,
            "chunk_size": 16,
            "length": 256,
            "long_context": 131072,
            "cache_element_bytes": 2,
        },
        "commit": "0123abc",
        **changes,
    }


def write_metrics(path: Path, steps: int) -> Path:
    lines = [
        {"step": i, "tokens": i * 10, "train/loss": math.exp(-i / 9), "train/grad_norm": 1 / i}
        for i in range(1, steps + 1)
    ]
    path.write_text("".join(json.dumps({**line, "train/lr": 1e-3}) + "\n" for line in lines))
    return path


def test_files_hold_the_results_the_table_and_readable_pictures(tmp_path: Path) -> None:
    out = tmp_path / "evaluate"
    (out / "plots").mkdir(parents=True)
    (out / "plots" / "old.png").write_text("of an earlier evaluation")
    files = write_report(
        results(),
        out,
        {"convert": write_metrics(tmp_path / "m.jsonl", 30), "align": tmp_path / "none.jsonl"},
    )
    assert json.loads((out / "results.json").read_text()) == results()
    assert "| mamba2 (not trained)" in (out / "table.md").read_text()
    pictures = [path for path in files if path.suffix == ".png"]
    assert {path.stem for path in pictures} == {
        *(
            "summary",
            "loss_by_position",
            "recall_by_distance",
            "alpha_by_layer",
            "perplexity_by_position",
            "training_convert",
        ),
    }
    for path in pictures:
        image = matplotlib.image.imread(path)
        assert min(image.shape[:2]) > 300
        assert image.std() > 0.02
    assert {path for path in out.rglob("*") if path.is_file()} == set(files)


def axes_texts(figure: Figure) -> list[tuple[str, str]]:
    return [(axis.get_xlabel(), axis.get_ylabel()) for axis in figure.axes]


def test_axes_have_names_with_units() -> None:
    position, distance = position_figure(results()), distance_figure(results())
    alpha = alpha_figure(results())
    assert position is not None
    assert distance is not None
    assert alpha is not None
    assert axes_texts(position) == [("position in the document (tokens)", "loss (nats/token)")] * 2
    assert axes_texts(distance) == [
        ("distance from the evidence to the answer (tokens)", "exact match (share of answers)")
    ]
    assert axes_texts(alpha) == [("layer (0 is next to the embedding)", "mean |α| over channels")]
    assert all("(" in axis.get_title() for axis in summary_figure(results()).axes)


def test_lines_go_through_the_results() -> None:
    figure = distance_figure(results())
    assert figure is not None
    full = next(line for line in figure.axes[0].lines if line.get_label() == "full")
    middles = [(EDGES[i] + EDGES[i + 1] - 1) / 2 for i in range(1, len(LABELS))]
    assert list(full.get_xdata()) == middles
    assert list(full.get_ydata()) == [1.0] * len(middles)


def test_branches_of_a_stage_share_a_figure_and_stages_do_not() -> None:
    lines = [{"step": i, "train/loss": 2.0 / i, "train/lr": 1e-3} for i in range(1, 4)]
    with_alpha = [{**line, "memory/alpha_abs/mean": 0.1} for line in lines]
    figures = training_figures({"convert": with_alpha, "convert_mamba2": lines, "sft": lines})
    assert list(figures) == ["training_convert", "training_sft"]
    convert, sft = figures.values()
    assert convert is not None
    assert sft is not None
    assert [axis.get_ylabel() for axis in convert.axes] == [
        "KL to full attention (nats/token)",
        "learning rate",
        "mean |α| over channels and layers",
    ]
    assert [line.get_label() for line in convert.axes[0].lines] == ["convert", "convert_mamba2"]
    assert sft.axes[0].get_ylabel() == "next-token loss (nats/token)"


def test_a_figure_with_nothing_to_show_is_not_drawn() -> None:
    bare = {"overall": {"loss": 1.0}}
    empty = results(mixers={"full": bare}, controls={})
    assert position_figure(empty) is None
    assert distance_figure(empty) is None
    assert alpha_figure(empty) is None
    assert training_figures({"convert": [], "evaluate": [{"step": 0}]}) == {}
    assert summary_figure(empty).axes


def test_of_a_step_written_twice_the_last_line_counts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 1}\n{"step": 2, "a": 5}\n{"step": 3, "')
    assert read_metrics(path) == [{"step": 1, "a": 1}, {"step": 2, "a": 5}]


def test_a_broken_line_inside_the_metrics_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2"):
        read_metrics(path)
