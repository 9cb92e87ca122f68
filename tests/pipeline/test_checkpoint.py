"""Checkpoints: whole or not there, never unpickled, refused for another configuration."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.atomic import remove_unfinished, write_json
from pipeline.checkpoint import (
    complete_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    refuse_other_config,
    save_checkpoint,
)
from pipeline.metrics_log import MetricsLog, read_lines
from pipeline.run import main


def tensors(seed: int, numel: int = 1000) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(numel, generator=generator), "b.c": torch.eye(3)}


def save(folder: Path, step: int, keep_last: int = 2, numel: int = 1000) -> Path:
    return save_checkpoint(
        folder,
        step=step,
        model=tensors(step, numel),
        optimizer=tensors(step + 1, numel),
        state={"tokens": step * 10},
        keep_last=keep_last,
    )


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Let the operating system refuse to make any file larger, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_round_trip_is_exact(tmp_path: Path):
    loaded = load_checkpoint(save(tmp_path, 5))
    assert loaded.step == 5
    assert loaded.state["tokens"] == 50
    for saved, got in ((tensors(5), loaded.model), (tensors(6), loaded.optimizer)):
        assert all(torch.equal(saved[name], got[name]) for name in saved)


def test_all_files_have_the_permissions_that_the_umask_leaves(tmp_path: Path):
    before = os.umask(0o027)
    try:
        path = save(tmp_path, 5)
    finally:
        os.umask(before)
    assert len(list(path.iterdir())) == 3
    assert {oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == {"0o640"}


def test_the_oldest_go_and_the_newest_is_found(tmp_path: Path):
    for step in (5, 10, 15, 100):
        save(tmp_path, step)
    assert [path.name for path in complete_checkpoints(tmp_path)] == [
        "step_00000015",
        "step_00000100",
    ]
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000100"
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_saving_a_step_again_replaces_it(tmp_path: Path):
    save(tmp_path, 5)
    path = save(tmp_path, 5, numel=7)
    assert load_checkpoint(path).model["a"].numel() == 7
    assert os.listdir(tmp_path) == ["step_00000005"]


def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path: Path):
    save(tmp_path, 5)
    with largest_file(100_000), pytest.raises(OSError, match=r"while saving .*free some space"):
        save(tmp_path, 10, numel=100_000)
    assert os.listdir(tmp_path) == ["step_00000005"]
    assert load_checkpoint(tmp_path / "step_00000005").step == 5


def test_a_really_full_disk_leaves_nothing_that_looks_whole(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        save(disk / "checkpoints", 5, numel=5_000)
        with pytest.raises(OSError, match=r"No space left on device while saving .*run.dir"):
            save(disk / "checkpoints", 10, numel=60_000)
        assert os.listdir(disk / "checkpoints") == ["step_00000005"]
        with pytest.raises(OSError, match="No space left on device"):
            write_json(disk / "DONE.json", {"filler": "x" * 400_000})
        assert not (disk / "DONE.json").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_what_a_killed_process_left_is_removed(tmp_path: Path):
    save(tmp_path, 5)
    (tmp_path / ".unfinished-step_00000010-77").mkdir()
    (tmp_path / ".unfinished-step_00000010-77" / "model.safetensors").write_bytes(b"half")
    remove_unfinished(tmp_path)
    assert os.listdir(tmp_path) == ["step_00000005"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_truncated_file_is_one_clear_error(tmp_path: Path, file: str):
    path = save(tmp_path, 5)
    content = (path / file).read_bytes()
    (path / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"step_00000005 cannot be read .*delete the folder"):
        load_checkpoint(path)


def test_another_format_version_is_refused(tmp_path: Path):
    path = save(tmp_path, 5)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format_version": 99}))
    with pytest.raises(ValueError, match="format_version=99"):
        load_checkpoint(path)


def test_the_differing_key_is_named(tmp_path: Path):
    path = tmp_path / "convert" / "checkpoints" / "step_00000005"
    with pytest.raises(ValueError, match=r"made with convert.lr=0.1, this run has convert.lr=0.2"):
        refuse_other_config(path, {"a": 1, "convert.lr": 0.1}, {"a": 1, "convert.lr": 0.2})
    with pytest.raises(ValueError, match=r'b=1, this run has b="\(not set\)"'):
        refuse_other_config(path, {"b": 1}, {})
    refuse_other_config(path, {"a": 1}, {"a": 1})
    # a key that an earlier program did not know
    refuse_other_config(path, {}, {"mixer.memory.momentum": True})
    with pytest.raises(ValueError, match=r"mixer\.memory\.momentum=true, this run has .*=false"):
        refuse_other_config(path, {}, {"mixer.memory.momentum": False})


def test_no_checkpoint_is_unpickled():
    import pipeline.checkpoint as module

    source = Path(str(module.__file__)).read_text()
    assert "torch.load" not in source
    assert "pickle" not in source.replace("unpickled", "")


def test_metrics_on_a_full_disk_are_one_clear_error(tmp_path: Path):
    log = MetricsLog(tmp_path / "metrics.jsonl")

    def write_many() -> None:
        for step in range(1, 100):
            log.write(step, {"train/loss": 1.0})

    with largest_file(200), pytest.raises(OSError, match=r"while saving .*metrics\.jsonl.*free"):
        write_many()
    log.close()
    whole = list(read_lines(tmp_path / "metrics.jsonl"))
    assert 0 < len(whole) < 100
    log.truncate_after(2)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


def test_run_reports_a_full_disk_in_one_line(
    tmp_path: Path, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
):
    words = [*tiny_overrides, f"run.dir={tmp_path}", "pretrain.steps=2"]
    assert main([*words, "stage=prepare"]) == 0
    capsys.readouterr()
    with largest_file(100_000):
        assert main([*words, "stage=pretrain"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "File too large while saving" in errors[0]
    assert complete_checkpoints(tmp_path / "pretrain" / "checkpoints") == []
    assert not (tmp_path / "pretrain" / "DONE.json").exists()
    assert main([*words, "stage=pretrain"]) == 0


def test_a_kill_while_a_step_is_replaced_does_not_lose_it(tmp_path: Path):
    path = save(tmp_path, 5)
    for find in (lambda: latest_checkpoint(tmp_path), lambda: remove_unfinished(tmp_path)):
        path.rename(tmp_path / ".step_00000005.old")  # killed between the two renames
        (tmp_path / ".unfinished-step_00000005-77").mkdir(exist_ok=True)
        find()
        assert load_checkpoint(path).step == 5
    assert os.listdir(tmp_path) == ["step_00000005"]
    (tmp_path / ".step_00000005.old").mkdir()  # killed after them
    remove_unfinished(tmp_path)
    assert os.listdir(tmp_path) == ["step_00000005"]


def test_earlier_programs_auto_counts_as_what_it_meant(tmp_path: Path):
    def old(dtype: str, device: str) -> dict[str, str]:
        return {"parallel.dtype": dtype, "parallel.device": device}

    now = {"parallel.dtype": "float32"}
    for device in ("auto", "cpu"):
        refuse_other_config(tmp_path, old("auto", device), now)
    refuse_other_config(tmp_path, old("float32", "cuda"), now)
    for stored in (old("auto", "cuda"), old("bfloat16", "auto")):
        with pytest.raises(ValueError, match=r'dtype="bfloat16", this run has .*"float32"'):
            refuse_other_config(tmp_path, stored, now)
