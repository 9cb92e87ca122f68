"""Two ranks equal one: losses, checkpoints, and going on with another number of ranks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.run import main

ROOT = Path(__file__).resolve().parents[2]


def on_two_ranks(words: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Call the command line under torchrun."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [sys.executable, *launch, "-m", "pipeline.run", *words],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_overrides: list[str],
    environment: dict[str, str],
) -> tuple[Path, Path, list[str]]:
    """The same run by one rank and by two."""
    folder = tmp_path_factory.mktemp("ranks")
    words = [
        *tiny_overrides,
        "stage=all",
        "stages=[prepare,pretrain,convert]",
        "parallel.timeout_s=60",
    ]
    one, two = folder / "one", folder / "two"
    assert main([*words, f"run.dir={one}"]) == 0
    done = on_two_ranks([*words, f"run.dir={two}"], environment)
    assert done.returncode == 0, done.stderr
    (folder / "two.err").write_text(done.stderr, encoding="utf-8")
    return one, two, words


@pytest.mark.parametrize("stage", ["pretrain", "convert"])
def test_two_ranks_have_the_losses_of_one(
    folders: tuple[Path, Path, list[str]],
    stage: str,
    metrics_of: Callable[[Path], list[dict[str, Any]]],
):
    one, two, _ = folders
    for mine, theirs in zip(metrics_of(one / stage), metrics_of(two / stage), strict=True):
        for key in ("step", "tokens", "loss_tokens", "train/lr"):
            assert mine[key] == theirs[key]
        for key in ("train/loss", "train/grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=2e-3, abs=1e-7)


def test_two_ranks_print_what_one_would(folders: tuple[Path, Path, list[str]]):
    lines = (folders[1].parent / "two.err").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if "Warning" in line] == []
    assert len([line for line in lines if line.startswith("pretrain: complete")]) == 1


def test_a_checkpoint_of_two_ranks_goes_on_with_one(
    folders: tuple[Path, Path, list[str]],
    metrics_of: Callable[[Path], list[dict[str, Any]]],
):
    import shutil

    one, two, words = folders
    stage = two / "pretrain"
    wanted = metrics_of(one / "pretrain")
    shutil.rmtree(stage / "checkpoints" / "step_00000008")
    (stage / "DONE.json").unlink()
    words = [*words, f"run.dir={two}", "stage=pretrain"]
    assert main(words) == 0
    got = metrics_of(stage)
    assert [line["step"] for line in got] == [line["step"] for line in wanted]
    assert got[-1]["train/loss"] == pytest.approx(wanted[-1]["train/loss"], rel=2e-4)


def test_a_batch_that_does_not_split_is_refused(
    folders: tuple[Path, Path, list[str]], environment: dict[str, str], tmp_path: Path
):
    one, _, words = folders
    (tmp_path / "prepare").symlink_to(one / "prepare")
    words = [*words, f"run.dir={tmp_path}", "stage=pretrain", "pretrain.batch_size=3"]
    done = on_two_ranks(words, environment)
    assert done.returncode != 0
    assert "error: pretrain.batch_size=3 does not split over 2 data-parallel" in done.stderr
    assert not (tmp_path / "pretrain" / "DONE.json").exists()
