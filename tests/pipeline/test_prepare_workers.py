"""`stage=prepare` of several workers on the command line: statuses, locks, one set of shards."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from pipeline.run import main
from pipeline.survival import EXIT_REQUEUE, EXIT_USER_ERROR


def shards_of(run_dir: Path) -> dict[str, bytes]:
    folder = run_dir / "prepare"
    files = [*folder.glob("*/shard-*"), folder / "manifest.json"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_workers_on_the_command_line_share_a_run(
    tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Called one after the other: each does what can be done and says who is missing."""
    words = [*tiny_overrides, "stage=prepare"]
    assert main([*words, f"run.dir={tmp_path}/one"]) == 0
    many = [*words, f"run.dir={tmp_path}/many", "data.num_workers=2", "data.wait_s=0"]
    capsys.readouterr()
    assert main([*many, "data.worker_rank=1"]) == EXIT_REQUEUE
    said = capsys.readouterr().err
    assert "prepare, worker 1: worker 1 of 2 has done its part; missing: 1 pieces of text" in said
    assert "run stage=prepare with data.worker_rank=0 too, then this one again" in said
    assert main([*many, "data.worker_rank=0"]) == EXIT_REQUEUE
    assert "shards of worker 1" in capsys.readouterr().err
    assert main([*many, "data.worker_rank=1"]) == 0
    done = tmp_path / "many" / "prepare" / "DONE.json"
    assert not done.exists()
    assert main([*many, "data.worker_rank=0"]) == 0
    assert done.exists()
    assert shards_of(tmp_path / "many") == shards_of(tmp_path / "one")
    capsys.readouterr()
    assert main([*words, f"run.dir={tmp_path}/many"]) == 0  # the same run, without workers
    assert "prepare: already complete" in capsys.readouterr().err


def test_workers_are_for_prepare_alone_and_share_no_folder_with_others(
    tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*tiny_overrides, f"run.dir={tmp_path}", "data.num_workers=3"]
    assert main([*words, "stage=all"]) == EXIT_USER_ERROR
    assert "shares the work of stage=prepare alone; stage=all" in capsys.readouterr().err
    assert main([*words, "stage=prepare", "data.worker_rank=3"]) == EXIT_USER_ERROR
    assert "worker_rank=3 with num_workers=3" in capsys.readouterr().err
    for name in (".lock", ".lock.worker2of3"):
        with (tmp_path / name).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert main([*words, "stage=prepare", "data.worker_rank=2"]) == EXIT_USER_ERROR
            assert f"is in use by another process ({name})" in capsys.readouterr().err
