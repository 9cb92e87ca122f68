"""Saving while training goes on: the same bytes, errors in time, nothing unpickled."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint import load_checkpoint, load_state, write_shard
from pipeline.context import StageContext
from pipeline.run import main
from pipeline.saving import Saver

STEPS = 24


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> list[str]:
    """A prepared run with a checkpoint in every second step of `pretrain`."""
    prepared = tmp_path_factory.mktemp("saving")
    every = ["pretrain.checkpoint_every=2", "pretrain.keep_last=100", f"pretrain.steps={STEPS}"]
    words = [*tiny_overrides, "stage=pretrain", *every]
    assert main([*words, "stage=prepare", f"run.dir={prepared}"]) == 0
    return [*words, f"run.dir={prepared}"]


def folder(words: list[str], tmp_path: Path) -> list[str]:
    """The words for another folder with the same shards."""
    prepared = Path(words[-1].removeprefix("run.dir="))
    (tmp_path / "prepare").symlink_to(prepared / "prepare")
    return [*words[:-1], f"run.dir={tmp_path}"]


@pytest.fixture
def limits() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def in_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Do something when a step is logged."""
    log = StageContext.log

    def log_and_act(self: StageContext, number: int, values: Any) -> None:
        log(self, number, values)
        if number == step:
            action()

    monkeypatch.setattr(StageContext, "log", log_and_act)


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_checkpoint_written_while_training_goes_on_has_the_same_bytes(
    words: list[str], tmp_path: Path, zero_stage: int, monkeypatch: pytest.MonkeyPatch
):
    def write_late(*args: Any, **options: Any) -> None:
        time.sleep(0.1)  # some steps further
        write_shard(*args, **options)

    monkeypatch.setattr("pipeline.saving.write_shard", write_late)
    folders = tmp_path / "true", tmp_path / "false"
    for path in folders:
        path.mkdir()
        how = [f"run.async_checkpoints={path.name}", f"parallel.zero_stage={zero_stage}"]
        assert main([*folder(words, path), *how]) == 0
    one, other = (path / "pretrain" / "checkpoints" for path in folders)
    assert sorted(os.listdir(one)) == [f"step_{step:08d}" for step in range(2, STEPS + 1, 2)]
    for path in one.iterdir():
        for file in path.iterdir():
            assert file.read_bytes() == (other / path.name / file.name).read_bytes(), file


def test_a_full_disk_ends_the_run_at_the_next_step_and_leaves_earlier_checkpoints(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    limits: None,
):
    words = folder(words, tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    before = tmp_path / "pretrain" / "checkpoints" / "step_00000006"

    def fill() -> None:
        while not before.is_dir():
            time.sleep(0.001)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit))

    with monkeypatch.context() as patched:
        in_step(patched, 7, fill)
        assert main(words) == 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "File too large while saving" in errors[0]
    assert "step_00000008" in errors[0]
    lines = (tmp_path / "pretrain" / "metrics.jsonl").read_text().splitlines()
    assert 8 <= json.loads(lines[-1])["step"] <= 10
    checkpoints = tmp_path / "pretrain" / "checkpoints"
    assert sorted(os.listdir(checkpoints)) == [f"step_0000000{step}" for step in (2, 4, 6)]
    for path in checkpoints.iterdir():
        load_checkpoint(path)
    assert main(words) == 0


def test_an_error_of_the_loop_waits_for_the_checkpoint_under_way(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    words = folder(words, tmp_path)
    save = Saver.save

    def save_and_fail(self: Saver, step: int, state: Any) -> None:
        save(self, step, state)
        if step == 8:
            raise ValueError("in the step of a save")

    with monkeypatch.context() as patched:
        patched.setattr(Saver, "save", save_and_fail)
        assert main(words) == 2
    newest = sorted((tmp_path / "pretrain" / "checkpoints").iterdir())[-1]
    assert newest.name == "step_00000008"
    assert load_checkpoint(newest).step == 8


def test_resuming_unpickles_nothing(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    words = folder(words, tmp_path)
    assert main(words) == 0
    stage = tmp_path / "pretrain"
    (stage / "DONE.json").unlink()
    shutil.rmtree(stage / "checkpoints" / f"step_{STEPS:08d}")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a file was unpickled")

    with monkeypatch.context() as patched:
        for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads")):
            patched.setattr(module, name, refuse)
        patched.setattr(pickle, "Unpickler", refuse)
        assert main(words) == 0
    assert (stage / "DONE.json").is_file()


def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_name(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from safetensors.torch import load_file, save_file

    words = folder(words, tmp_path)
    assert main(words) == 0
    (tmp_path / "pretrain" / "DONE.json").unlink()
    file = sorted((tmp_path / "pretrain" / "checkpoints").iterdir())[-1] / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("model.norm.weight")
    save_file(tensors, file)
    state = load_state(file.parent)
    state["files"][file.name] = file.stat().st_size
    (file.parent / "state.json").write_text(json.dumps(state))
    assert main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "lacks model.norm.weight" in error
    assert "delete the folder" in error


def test_the_checkpoint_of_the_lowest_held_out_loss_stays_and_is_exported(
    tmp_path: Path, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
):
    words = [
        *tiny_overrides,
        "stage=all",
        "stages=[prepare,pretrain,convert,export]",
        "convert.steps=10",
        "convert.checkpoint_every=2",
        "convert.keep_last=1",
        "convert.keep_best=1",
        "convert.eval_every=5",
        "convert.lr=0.05",  # too high: the loss rises from the first step on
        "convert.decay_fraction=0",
        "convert.warmup_fraction=0.9",
        f"run.dir={tmp_path}",
    ]
    assert main([*words, "run.checkpoint=best"]) == 0
    lines = (tmp_path / "convert" / "metrics.jsonl").read_text().splitlines()
    losses = {line["step"]: line["eval/loss"] for line in map(json.loads, lines)
              if "eval/loss" in line}  # fmt: skip
    assert sorted(losses) == [2, 4, 5, 6, 8, 10]  # every 5 steps, and at each checkpoint
    lowest = min((loss, step) for step, loss in losses.items() if step != 5)[1]
    assert lowest != 10
    checkpoints = tmp_path / "convert" / "checkpoints"
    best = f"step_{lowest:08d}"
    assert sorted(os.listdir(checkpoints)) == ["best.json", best, "step_00000010"]
    named = json.loads((checkpoints / "best.json").read_text())
    assert named == {"metric": "eval/loss", "checkpoints": [
        {"folder": best, "loss": losses[lowest]}]}  # fmt: skip
    saved = load_checkpoint(checkpoints / best).model
    exported = load_file_of(tmp_path / "export")
    for name, tensor in saved.items():
        torch.testing.assert_close(exported[name].float(), tensor)
    capsys.readouterr()
    assert main([*words, "run.checkpoint=newest"]) == 0
    assert "export: again, because" in capsys.readouterr().err
    newest = load_checkpoint(checkpoints / "step_00000010").model
    name = next(iter(newest))
    torch.testing.assert_close(load_file_of(tmp_path / "export")[name].float(), newest[name])


def load_file_of(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")
