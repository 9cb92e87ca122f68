"""RULER's scores, as `scripts/eval` of NVIDIA/RULER c3f5e3b computes them."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")


def _clean(prediction: str) -> str:
    return _CONTROL.sub("\n", prediction.strip()).strip().lower()


def share_found(prediction: str, answers: Sequence[str]) -> float:
    """Share of the references that occur in the prediction, case aside."""
    text = _clean(prediction)
    return sum(answer.lower() in text for answer in answers) / len(answers)


def any_found(prediction: str, answers: Sequence[str]) -> float:
    """1 where one of the references occurs in the prediction, case aside."""
    text = _clean(prediction)
    return float(any(answer.lower() in text for answer in answers))
