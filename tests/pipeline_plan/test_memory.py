"""Predicted peaks against measured ones of real trainings, within 15 % (`docs/plan.md`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.pipeline_plan.cases import CASES, Case, measure, predict

TOLERANCE = 0.15

QUICK = Case(name="quick", length=1024)
"""Tensors of 400 MB: the few MB that libraries take meanwhile show, but seconds are enough."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and runs."""
    return tmp_path_factory.mktemp("memory")


def test_a_small_training_takes_what_the_plan_says(folder: Path) -> None:
    assert predict(QUICK, folder).peak == pytest.approx(measure(QUICK, folder), rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_training_takes_what_the_plan_says(case: Case, folder: Path) -> None:
    assert predict(case, folder).peak == pytest.approx(measure(case, folder), rel=TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_a_gpu_training_takes_what_the_plan_says(recompute: bool, folder: Path) -> None:
    words = ("parallel.dtype=bfloat16", f"parallel.recompute={str(recompute).lower()}")
    case = Case(name=f"gpu_{recompute}".lower(), length=32768, window=2048, chunk=512, words=words)
    gpu = "h200" if torch.cuda.get_device_properties(0).total_memory > 100e9 else "h100"
    predicted = predict(case, folder, gpu).peak
    assert predicted == pytest.approx(measure(case, folder), rel=TOLERANCE)
