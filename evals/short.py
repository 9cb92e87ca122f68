"""The paper's short tasks by name: which task of lm-evaluation-harness, shots, metric, sampling.

LiveCodeBench v5, the last of the paper's table, is not in the harness:
docs/running-evaluations.md has the bridge to its own runner.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ShortTask:
    """One row of the paper's table of short tasks."""

    harness: str
    """Task or group of lm-evaluation-harness."""
    folders: tuple[str, ...]
    """Folders under `lm_eval/tasks` that define it."""
    metrics: tuple[str, ...]
    """`metric,filter` of the harness; the first is the headline."""
    dataset: str
    """The data set's name on the hub."""
    files: tuple[str, ...] = ()
    """Single files that can stand for it."""
    split: str = "test"
    """The split that a single file is."""
    num_fewshot: int = 0
    """Solved examples before the question."""
    chat: bool = False
    """Whether a chat model's template goes around the question."""
    num_samples: int = 1
    """Samplings whose scores are averaged."""
    temperature: float | None = None
    """Of the sampling; None is the harness's own, mostly greedy."""
    top_p: float = 1.0
    """Share of the probability that is sampled from."""

    def label(self, metric: str) -> str:
        """The name in `results.json` of one of `metrics`: without its filter, if it is the first
        or has none that tells it from another."""
        column, _, chosen = metric.partition(",")
        plain = metric == self.metrics[0] or chosen in ("none", "default")
        return column if plain else f"{column}_{chosen}"


_ACC = ("acc,none", "acc_norm,none")

SHORT_TASKS: dict[str, ShortTask] = {
    "ceval": ShortTask(
        harness="ceval-valid",
        folders=("ceval",),
        metrics=_ACC,
        dataset="ceval/ceval-exam",
        num_fewshot=5,
    ),
    "arc_easy": ShortTask(
        harness="arc_easy",
        folders=("arc",),
        metrics=_ACC,
        dataset="allenai/ai2_arc",
        files=("arc-easy.test.jsonl", "arc_easy.jsonl"),
    ),
    "arc_challenge": ShortTask(
        harness="arc_challenge",
        folders=("arc",),
        metrics=_ACC,
        dataset="allenai/ai2_arc",
        files=("arc-challenge.test.jsonl", "arc_challenge.jsonl"),
    ),
    "hellaswag": ShortTask(
        harness="hellaswag",
        folders=("hellaswag",),
        metrics=_ACC,
        dataset="Rowan/hellaswag",
        files=("hellaswag_val_full.txt.bz2", "hellaswag_val_full.txt", "hellaswag.jsonl"),
        split="validation",
    ),
    "winogrande": ShortTask(
        harness="winogrande",
        folders=("winogrande",),
        metrics=("acc,none",),
        dataset="allenai/winogrande",
        files=("winogrande.test.jsonl", "winogrande.jsonl"),
        split="validation",
    ),
    "piqa": ShortTask(
        harness="piqa",
        folders=("piqa",),
        metrics=_ACC,
        dataset="baber/piqa",
        files=("piqa.test.jsonl", "piqa.jsonl"),
        split="validation",
    ),
    "openbookqa": ShortTask(
        harness="openbookqa",
        folders=("openbookqa",),
        metrics=_ACC,
        dataset="allenai/openbookqa",
        files=("openbookqa.test.jsonl", "openbookqa.jsonl"),
    ),
    "mmlu_redux": ShortTask(
        harness="mmlu_redux_generative",
        folders=("mmlu-redux/generative",),
        metrics=("exact_match,default",),
        dataset="fxmarty/mmlu-redux-2.0-ok",
        chat=True,
    ),
    "gpqa_diamond": ShortTask(
        harness="gpqa_diamond_cot_zeroshot",
        folders=("gpqa/cot_zeroshot",),
        metrics=("exact_match,flexible-extract", "exact_match,strict-match"),
        dataset="Idavidrein/gpqa",
        chat=True,
        num_samples=10,
        temperature=0.7,
        top_p=0.8,
    ),
    "ifeval": ShortTask(
        harness="ifeval",
        folders=("ifeval",),
        metrics=(
            "prompt_level_strict_acc,none",
            "inst_level_strict_acc,none",
            "prompt_level_loose_acc,none",
            "inst_level_loose_acc,none",
        ),
        dataset="google/IFEval",
        chat=True,
    ),
    "math_500": ShortTask(
        harness="hendrycks_math500",
        folders=("hendrycks_math",),
        metrics=("exact_match,none",),
        dataset="HuggingFaceH4/MATH-500",
        files=("math500_test.json", "math_500.jsonl"),
        chat=True,
    ),
}
"""By the name in `eval.short_tasks`."""
