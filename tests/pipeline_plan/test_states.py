"""Bytes of weights, gradients and optimizer against DeepSpeed's real engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.planning.states import states

ROOT = Path(__file__).resolve().parents[2]
STAGES = [
    (0, "float32"),
    *((stage, dtype) for stage in (1, 2, 3) for dtype in ("float32", "bfloat16")),
]


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(ranks, what `states_worker.py` noted for each stage, type and number of passes)."""
    ranks: int = request.param
    out = tmp_path_factory.mktemp("states") / "states.json"
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    worker = str(Path(__file__).with_name("states_worker.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, worker, str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return ranks, json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize(("zero_stage", "dtype"), STAGES)
def test_states_are_those_of_the_real_engine(
    measured: Any, zero_stage: int, dtype: str, num_micro_batches: int
) -> None:
    ranks, found = measured
    real = found[f"{zero_stage} {dtype} {num_micro_batches}"]
    predicted = states(
        trained=real["trained"],
        frozen=real["frozen"],
        element=4 if dtype == "float32" else 2,
        zero_stage=zero_stage,
        zero_size=ranks,
        num_micro_batches=num_micro_batches,
        kind="cpu",
    )
    always = predicted.held
    if zero_stage == 3 or (zero_stage, dtype) == (1, "bfloat16"):
        always += predicted.gradients
    if zero_stage == 3:
        always += predicted.buffers
    assert always == pytest.approx(real["held"], rel=0.02)
    # what gloo allocates by itself is no tensor
    by_gloo = real["trained"] * (4 if dtype == "float32" else 2) if zero_stage == 3 else 0
    for moment in ("reduction", "step"):
        total = predicted.held + getattr(predicted, moment)
        total -= by_gloo if ranks > 1 and moment == "reduction" else 0
        # of the real step's tensors one parameter's or two more may be alive: a tenth of all each
        assert total == pytest.approx(real[moment], rel=0.13), moment
