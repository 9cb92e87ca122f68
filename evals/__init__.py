"""Scores of long-context evaluation, free of torch: numbers in, metrics and tables out."""

from evals.config import CONTROLS, KINDS, MIXERS, EvalConfig

__all__ = ["CONTROLS", "KINDS", "MIXERS", "EvalConfig"]
