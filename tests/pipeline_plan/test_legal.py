"""What the plan calls legal can be built and trained on real ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import compose
from pipeline.planning.estimate import estimate_memory
from pipeline.planning.layouts import Layout, candidates, check
from pipeline.planning.sizes import find_base
from pipeline.planning.work import Work, find_work
from pipeline.schema import RunConfig

ROOT = Path(__file__).resolve().parents[2]
RANKS = 4
WORDS = (
    "recipe=tiny",
    "run.dir=unused",
    "plan.gpu=cpu",
    f"plan.num_gpus={RANKS}",
    "stages=[prepare,pretrain,convert]",
    "plan.stage=convert",
    "data.seq_length=64",
)


def wanted() -> tuple[RunConfig, Work]:
    """The configuration and its stage `convert`."""
    config = compose([*WORDS])
    work = next(w for w in find_work(config, find_base(config).config) if w.stage == "convert")
    return config, work


def legal() -> list[Layout]:
    """Every way to split that the plan calls legal, with one sequence a pass."""
    config, work = wanted()
    found = []
    for layout in candidates(config, work):
        try:
            check(config, work, layout)
        except ValueError:
            continue
        if layout.micro_batch_size == 1:
            found.append(layout)
    return found


def name(layout: Layout) -> str:
    """`tp2-sp-cp2-a2a-recompute`."""
    words = [f"tp{layout.tp}", *(["sp"] if layout.sp else []), f"cp{layout.cp}"]
    words += [layout.cp_mode] if layout.cp > 1 else []
    return "-".join(words + (["recompute"] if layout.recompute else []))


LEGAL = legal()
PLAIN = [layout for layout in LEGAL if not layout.recompute]
RECOMPUTED = [layout for layout in LEGAL if layout.recompute]


def ask(out: Path, which: str) -> dict[str, Any]:
    """What four ranks say of each of `PLAIN` or `RECOMPUTED`: the loss of a step, or the error."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    worker = str(Path(__file__).with_name("legal_worker.py"))
    done = subprocess.run(
        [*launcher, f"--nproc-per-node={RANKS}", worker, str(out), which],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The ranks are started once for all of `PLAIN`."""
    return ask(tmp_path_factory.mktemp("legal") / "plain.json", "PLAIN")


@pytest.fixture(scope="module")
def recomputed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """And once for all of `RECOMPUTED`."""
    return ask(tmp_path_factory.mktemp("legal") / "recomputed.json", "RECOMPUTED")


def test_there_are_layouts_of_every_kind() -> None:
    kinds = {name(layout) for layout in LEGAL}
    assert {
        "tp1-cp1",
        "tp2-sp-cp2-wavefront",
        "tp1-cp2-a2a-recompute",
        "tp1-cp4-wavefront",
    } <= kinds
    assert not any(kind.startswith("tp4") for kind in kinds)  # two heads


@pytest.mark.parametrize("layout", PLAIN, ids=name)
def test_a_legal_layout_is_followed_through_the_model(layout: Layout) -> None:
    config, work = wanted()
    splits = check(config, work, layout)
    memory = estimate_memory(work, layout, splits, plan=config.plan, dtype="float32")
    assert memory.fits


@pytest.mark.slow
@pytest.mark.parametrize("layout", PLAIN, ids=name)
def test_a_legal_layout_builds_and_trains(plain: dict[str, Any], layout: Layout) -> None:
    outcome = plain[name(layout)]
    assert isinstance(outcome, float), outcome
    assert outcome > 0


@pytest.mark.slow
@pytest.mark.parametrize("layout", RECOMPUTED, ids=name)
def test_a_legal_layout_trains_with_recomputation(
    recomputed: dict[str, Any], layout: Layout
) -> None:
    outcome = recomputed[name(layout)]
    assert isinstance(outcome, float), outcome
    assert outcome > 0
