"""Numbers of the AllMem paper (arXiv 2602.13680), beside which a run's own may be put.

They come from other hardware, data and training; a run is measured against them, not reproduced.
"""

from __future__ import annotations

SOURCE = "AllMem, arXiv 2602.13680"
SIZES: tuple[str, ...] = ("0.6B", "1.7B")
MIXERS: tuple[str, ...] = ("full", "swa", "mamba2", "allmem")

SHORT_SETTING = "W = 2048, 128 sinks"
SHORT: dict[str, tuple[str, dict[str, tuple[float, float]]]] = {
    "ceval": ("C-Eval", {"0.6B": (40.6, 42.2), "1.7B": (58.0, 58.9)}),
    "arc_easy": ("ARC-E", {"0.6B": (70.0, 70.2), "1.7B": (84.5, 84.7)}),
    "arc_challenge": ("ARC-C", {"0.6B": (55.0, 54.6), "1.7B": (74.2, 74.4)}),
    "hellaswag": ("HellaSwag", {"0.6B": (40.8, 41.4), "1.7B": (59.4, 59.4)}),
    "winogrande": ("WinoGrande", {"0.6B": (50.6, 52.2), "1.7B": (53.0, 53.9)}),
    "mmlu_redux": ("MMLU-Redux", {"0.6B": (44.9, 47.05), "1.7B": (66.5, 67.3)}),
    "gpqa_diamond": ("GPQA-Diamond", {"0.6B": (24.6, 25.1), "1.7B": (28.9, 28.79)}),
    "ifeval": ("IFEval", {"0.6B": (60.6, 58.4), "1.7B": (68.6, 69.0)}),
    "math_500": ("MATH-500", {"0.6B": (48.8, 49.8), "1.7B": (73.6, 74.4)}),
    "livecodebench": ("LiveCodeBench v5", {"0.6B": (13.8, 14.3), "1.7B": (25.5, 25.0)}),
}
"""Short tasks: name in print, and by size the scores of (full, allmem)."""

LONGBENCH_SETTING = "W = 4096"
LONGBENCH_AVERAGE: dict[str, tuple[float, ...]] = {
    "0.6B": (28.16, 25.71, 27.01, 27.33),
    "1.7B": (33.55, 30.31, 31.57, 32.12),
}
"""Mean over the six sets, in the order of `MIXERS`."""

LONG_SETTING = "W = 8192, 128k tokens"
LONG: dict[str, dict[str, tuple[float, ...]]] = {
    "infinitebench/longbook_qa_eng": {
        "0.6B": (1.76, 3.7, 6.0, 8.53),
        "1.7B": (2.43, 4.16, 5.4, 7.84),
    },
    "infinitebench/longbook_qa_chn": {
        "0.6B": (2.18, 4.05, 8.5, 12.54),
        "1.7B": (2.42, 4.48, 5.4, 12.74),
    },
    "lveval": {"0.6B": (5.16, 3.27, 3.97, 4.52), "1.7B": (5.29, 3.76, 4.36, 5.56)},
}
"""Scores in the order of `MIXERS`; `lveval` is the mean over its 11 sets at 128k."""
