"""All stages of a recipe on four ranks that split model, sequences and weights, as on one rank."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.run import main

ROOT = Path(__file__).resolve().parents[2]
LAYOUT = [
    "parallel.tp=2",
    "parallel.sp=true",
    "parallel.cp=2",
    "parallel.zero_stage=3",
    "parallel.recompute=true",
]
TRAINING = ["pretrain", "align", "convert", "convert_mamba2", "sft"]


def on_four_ranks(words: list[str], environment: dict[str, str]) -> Any:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    return subprocess.run(
        [sys.executable, *launch, "-m", "pipeline.run", *words],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_overrides: list[str],
    environment: dict[str, str],
) -> tuple[Path, Path, list[str]]:
    """The same run by one rank and by four."""
    folder = tmp_path_factory.mktemp("layout_run")
    stages = "[prepare,pretrain,align,convert,convert@mamba2,sft,evaluate,export]"
    words = [*tiny_overrides, "stage=all", f"stages={stages}", "parallel.timeout_s=120"]
    words += ["sft.train=all", "eval.kinds=[text]", "eval.timing_repeats=0", "optim.eps=1e-4"]
    one, four = folder / "one", folder / "four"
    assert main([*words, f"run.dir={one}"]) == 0
    done = on_four_ranks([*words, *LAYOUT, f"run.dir={four}"], environment)
    assert done.returncode == 0, done.stderr
    return one, four, words


@pytest.mark.parametrize("stage", TRAINING)
def test_four_ranks_have_the_losses_of_one(
    folders: tuple[Path, Path, list[str]],
    stage: str,
    metrics_of: Callable[[Path], list[dict[str, Any]]],
):
    one, four, _ = folders
    for mine, theirs in zip(metrics_of(four / stage), metrics_of(one / stage), strict=True):
        for key in ("step", "tokens", "loss_tokens", "train/lr"):
            assert mine[key] == theirs[key]
        for key in ("train/loss", "train/grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=2e-3, abs=1e-7)


def test_four_ranks_evaluate_what_one_does(folders: tuple[Path, Path, list[str]]):
    results = [
        json.loads((folder / "evaluate" / "results.json").read_text()) for folder in folders[:2]
    ]
    one, four = ({**found["mixers"], **found["controls"]} for found in results)
    assert one.keys() == four.keys()
    for mixer in one:
        assert four[mixer].keys() == one[mixer].keys()
        for task, metrics in one[mixer].items():
            if not task.startswith("memory"):  # of a rank's own heads
                assert four[mixer][task] == pytest.approx(metrics, rel=1e-3, nan_ok=True)


@pytest.mark.parametrize("folder", ["pretrain/hf", "export"])
def test_four_ranks_export_the_weights_of_one(folders: tuple[Path, Path, list[str]], folder: str):
    one, four = (load_file(run / folder / "model.safetensors") for run in folders[:2])
    assert one.keys() == four.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(four[name], tensor, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["parallel.tp=3"], "do not divide the 1 rank(s); start a multiple of 3 ranks"),
        (["parallel.cp=2"], "torchrun --nproc-per-node=2"),
    ],
)
def test_a_layout_of_more_ranks_than_there_are_is_refused(
    folders: tuple[Path, Path, list[str]],
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
):
    assert main([*folders[2], *words, f"run.dir={folders[0]}"]) == 2
    assert message in capsys.readouterr().err
