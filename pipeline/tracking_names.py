"""Names of metrics in MLflow: sections in the order in which a person looks for them.

MLflow's charts stand in sections, sorted by name, by what comes before a name's last `/`.
`metrics.jsonl` keeps its own names; here they get the section in which they are shown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

LOGGED_STEP = "train: progress/logged_step"
"""Metric that says up to which step a run is shipped."""

LOGGED_SAMPLE = "train: progress/logged_sample"
"""The same for the machine's metrics, which are numbered by sample."""

SECTIONS = {
    "tokens_per_s": "throughput/tokens_per_s",
    "flops_per_s": "throughput/flops_per_s",
    "mfu": "throughput/mfu",
    "tokens": "train: progress/tokens",
    "loss_tokens": "train: progress/loss_tokens",
    "skipped_steps": "train: progress/skipped_steps",
    "loss_spikes": "train: progress/loss_spikes",
}
"""Where names of `metrics.jsonl` that have no section go."""

HEADLINES = (
    "train/loss",
    "train/kl",
    "train/grad_norm",
    "train/lr",
    "eval/loss",
    "tokens_per_s",
    "mfu",
    "memory/alpha_abs/mean",
    "memory/eta/mean",
    "memory/mu/mean",
)
"""Metrics of training that the parent run gets too, under the stage's name."""

EVALUATION_HEADLINES = tuple(
    f"{mixer}/{ending}"
    for mixer in ("full", "swa", "mamba2", "allmem")
    for ending in ("overall/loss_beyond_window", "recall/exact_match_outside_window")
)
"""An evaluation's metrics, `MIXER/TASK/METRIC`, that the parent gets too."""


def metric_name(name: str) -> str:
    """A name that MLflow takes: letters, digits and `_-. :/`; `@` becomes `_`."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def is_headline(name: str) -> bool:
    """Whether the parent run gets a metric, too."""
    return name in HEADLINES or name in EVALUATION_HEADLINES


def shown_name(name: str) -> str:
    """The name in MLflow of a metric of `metrics.jsonl`, with its section.

    `MIXER/TASK/METRIC` of an evaluation's headline becomes `eval/MIXER METRIC`, so that the mixers
    stand side by side.
    """
    if name in EVALUATION_HEADLINES:
        mixer, _, metric = name.split("/")
        return metric_name(f"eval/{mixer} {metric}")
    if name.startswith("memory/"):
        # all behind the losses; means first
        _, kind, what = name.split("/", 2)
        section = "train: memory" if what == "mean" else "train: memory spread"
        section = "train: memory by layer" if what.startswith("layer_") else section
        return metric_name(f"{section}/{kind} {what}")
    return metric_name(SECTIONS.get(name, name))


def child_values(line: Mapping[str, Any], *, of_evaluation: bool) -> dict[str, Any]:
    """A line of `metrics.jsonl` as the stage's own run gets it.

    Of an evaluation's hundreds of numbers only the headlines: each mixer's run has its own.
    """
    values = {LOGGED_STEP: line["step"]}
    for name, value in line.items():
        if name not in ("step", "time") and (not of_evaluation or is_headline(name)):
            values[shown_name(name)] = value
    return values


def parent_values(line: Mapping[str, Any], label: str) -> dict[str, Any]:
    """The headlines of a line as the recipe's run gets them: `train/loss convert`."""
    values = {parent_name(LOGGED_STEP, label): line["step"]}
    for name, value in line.items():
        if is_headline(name):
            values[parent_name(shown_name(name), label)] = value
    return values


def parent_name(shown: str, label: str) -> str:
    """A stage's metric in the recipe's run: in the same section, with the stage's label."""
    return shown if label == "evaluate" else f"{shown} {label}"
