"""Functions of `slurm/common.sh`, each in a bash of its own; no Slurm."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT


def bash(text: str, **env: str) -> str:
    """What a text prints after `source slurm/common.sh`.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    keep = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    return subprocess.run(
        ["bash", "-c", f"source {ROOT}/slurm/common.sh\n{text}"],
        env={**keep, "SLURM_JOB_ID": "7", **env},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    ).stdout.strip()


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("run.dir=a recipe=b run.dir=c", "c"),
        ("recipe=b", ""),
        ("other.run.dir=a run.dir=x=y", "x=y"),
        (r"""run.dir="'/my runs/it\'s'" """, "/my runs/it's"),
    ],
)
def test_the_last_value_of_a_key_counts_without_its_quotes(words: str, value: str) -> None:
    assert bash(f"last_value run.dir {words}") == value


def test_failures_count_until_a_checkpoint_or_a_finished_stage(tmp_path: Path) -> None:
    def failure(job: str = "7") -> str:
        return bash(f"run_dir='{tmp_path}'; count_failure", SLURM_JOB_ID=job)

    assert [failure(), failure()] == ["1", "2"]
    assert failure("8") == "1"  # another job
    time.sleep(0.05)
    (tmp_path / "convert" / "checkpoints" / "step_00000050").mkdir(parents=True)
    assert failure() == "1"
    assert failure() == "2"
    time.sleep(0.05)
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "metrics.jsonl").touch()
    assert failure() == "3"
    time.sleep(0.05)
    (tmp_path / "sft" / "DONE.json").touch()
    assert failure() == "1"


def test_a_script_says_that_it_is_for_sbatch() -> None:
    keep = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    for name in ("evaluate.sh", "convert_qwen3_8b.sh"):
        done = subprocess.run(
            [str(ROOT / "slurm" / name)], env=keep, capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 2
        assert "this is a job script: sbatch" in done.stderr
