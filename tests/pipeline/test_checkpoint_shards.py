"""Checkpoints of several writers: whole, read tensor by tensor, damage named with its mend."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.checkpoint import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    finish_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    model_files,
    save_checkpoint,
    write_shard,
)

WRITERS = 3


def tensors(number: int) -> dict[str, Tensor]:
    return {f"t{i}": torch.full((4, i + 1), float(10 * number + i)) for i in range(7)}


def write(folder: Path, writers: list[int], step: int = 5) -> Path:
    """An unfinished checkpoint with the files of some of three writers."""
    temporary = folder / f".unfinished-step_{step:08d}-x"
    for writer in writers:
        mine = {name: t for i, (name, t) in enumerate(tensors(1).items()) if i % WRITERS == writer}
        moments = {f"exp_avg.{name}": tensor + 1 for name, tensor in mine.items()}
        write_shard(temporary, writer=writer, num_writers=WRITERS, model=mine, optimizer=moments)
    return temporary


def finish(temporary: Path, step: int = 5) -> Path:
    path = temporary.parent / f"step_{step:08d}"
    writers = {name: i % WRITERS for i, name in enumerate(tensors(1))}
    moments = {f"exp_avg.{name}": writer for name, writer in writers.items()}
    finish_checkpoint(
        temporary,
        path,
        state={"step": step},
        num_writers=WRITERS,
        writer_of={MODEL_FILE: writers, OPTIMIZER_FILE: moments},
    )
    return path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return finish(write(tmp_path, [2, 0, 1]))


def test_tensors_of_several_writers_come_back(sharded: Path):
    saved = load_checkpoint(sharded)
    assert saved.step == 5
    for name, tensor in tensors(1).items():
        torch.testing.assert_close(saved.model[name], tensor, rtol=0, atol=0)
        torch.testing.assert_close(saved.optimizer[f"exp_avg.{name}"], tensor + 1, rtol=0, atol=0)
    assert len(saved.model) == len(saved.optimizer) == 7


def test_the_index_is_as_hugging_face_has_it(sharded: Path):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        torch.testing.assert_close(load_file(sharded / file)[name], tensors(1)[name])
    assert set(index["weight_map"]) == set(tensors(1))
    assert [file.name for file in model_files(sharded)] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]


def test_moments_that_nobody_asks_for_are_not_opened(sharded: Path):
    for file in sharded.glob("optimizer*"):
        file.unlink()
    assert set(load_checkpoint(sharded, with_optimizer=False).model) == set(tensors(1))


def test_a_file_that_another_node_keeps_to_itself_is_named(tmp_path: Path):
    temporary = write(tmp_path, [0, 2])
    with pytest.raises(OSError, match=r"model-00002-of-00003.* system that all nodes share"):
        finish(temporary)
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("kind", ["model", "optimizer"])
@pytest.mark.parametrize("damage", ["gone", "cut", "foreign", "empty"])
def test_a_damaged_file_is_one_clear_error(sharded: Path, number: int, kind: str, damage: str):
    file = sharded / f"{kind}-0000{number}-of-00003.safetensors"
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-1])
    else:  # of the right size
        file.write_bytes((b"PK\x03\x04" if damage == "foreign" else b"\0\0\0\0") * len(content))
        os.truncate(file, len(content))
    with pytest.raises(ValueError, match=r"step_00000005 cannot be read .*delete the folder to go"):
        load_checkpoint(sharded)


def test_files_of_an_earlier_program_are_read(tmp_path: Path):
    path = tmp_path / "step_00000007"
    path.mkdir()
    save_file(tensors(1), path / MODEL_FILE)
    save_file(tensors(2), path / OPTIMIZER_FILE)
    (path / "state.json").write_text(json.dumps({"step": 7, "format_version": 1}))
    saved = load_checkpoint(latest_checkpoint(tmp_path))  # type: ignore[arg-type]
    assert saved.step == 7
    assert all(torch.equal(saved.model[name], tensor) for name, tensor in tensors(1).items())


def test_one_writers_checkpoint_has_the_names_and_version_of_earlier_programs(tmp_path: Path):
    path = save_checkpoint(
        tmp_path, step=3, model=tensors(1), optimizer=tensors(2), state={}, keep_last=1
    )
    assert sorted(os.listdir(path)) == [MODEL_FILE, OPTIMIZER_FILE, "state.json"]
    assert json.loads((path / "state.json").read_text())["format_version"] == 1


def test_folders_that_are_no_checkpoints_are_left_alone(tmp_path: Path, sharded: Path):
    for name in ("step_old", "step_00000099", "step_5"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_old" / "state.json").write_text("{}")
    assert latest_checkpoint(tmp_path) == sharded
