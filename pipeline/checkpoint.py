"""Checkpoints that do not depend on how many ranks wrote them.

A checkpoint is a folder `step_00000123/` with `model.safetensors` (the trained weights),
`optimizer.safetensors` (the moments), both as full float32 tensors under Hugging Face names, and
`state.json` (step, tokens, the loader's state, the configuration). Several writers each write a
`model-00001-of-00004.safetensors` and an `optimizer-…` with some of the tensors, and
`model.safetensors.index.json` says which is where, as Hugging Face has it. All is written under
another name, flushed to the disk and renamed, so a folder with this name is whole. Readers take
tensors one by one; nothing is unpickled.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from allmem_hf.files import replace_folder, restore_folders, save_tensors, sync
from pipeline.atomic import UNFINISHED, disk_error, remove, write_text

FORMAT_VERSION = 1
"""Of a checkpoint with one file of each kind."""
SHARDED_VERSION = 2
"""Of a checkpoint with several."""
STATE_FILE = "state.json"
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"

_NAME = re.compile(r"step_\d{8,}")


class StoredTensors(Mapping[str, Tensor]):
    """Tensors of safetensors files, each read when it is asked for.

    Args:
        files: whose headers are read and checked now.

    Raises:
        SafetensorError, OSError: a file is missing, truncated or of another format.
        ValueError: two files hold the same name.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._handles: dict[str, Any] = {}
        for file in files:
            handle = safetensors.safe_open(file, framework="pt")
            for name in handle.keys():  # noqa: SIM118 - a handle is no mapping
                if name in self._handles:
                    raise ValueError(f"{name} stands in two files, one of them {file.name}")
                self._handles[name] = handle

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._handles[name].get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._handles  # the mixin would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that has been opened."""

    path: Path
    """Its folder."""
    model: Mapping[str, Tensor]
    """Trained weights under Hugging Face names, float32; read when asked for."""
    optimizer: Mapping[str, Tensor]
    """Moments under `exp_avg.NAME` and `exp_avg_sq.NAME`, float32; read when asked for."""
    state: dict[str, Any]
    """`step`, `tokens`, `loader`, `config`, …"""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])


def shard_name(file: str, writer: int, num_writers: int) -> str:
    """`model.safetensors` → `model-00002-of-00004.safetensors` of writer 1; one writer keeps it."""
    if num_writers == 1:
        return file
    stem, _, suffix = file.rpartition(".")
    return f"{stem}-{writer + 1:05d}-of-{num_writers:05d}.{suffix}"


def write_shard(
    folder: Path,
    *,
    writer: int,
    num_writers: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
) -> None:
    """Write one writer's files into an unfinished checkpoint and flush them to the disk.

    A file takes its name when it is whole, so files that are there are whole, whoever wrote them.

    Args:
        folder: made where it is missing.
        writer: from 0 on.
        num_writers: of the checkpoint.
        model: this writer's weights, on the CPU, by Hugging Face name.
        optimizer: this writer's moments.

    Raises:
        OSError, SafetensorError: the disk is full or not writable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in ((MODEL_FILE, model), (OPTIMIZER_FILE, optimizer)):
        path = folder / shard_name(file, writer, num_writers)
        partial = path.with_name(f"{path.name}.part")
        save_tensors(_contiguous(tensors), partial)
        sync(partial)
        partial.replace(path)


def shard_files(num_writers: int) -> list[str]:
    """Names of all weight and moment files of a checkpoint."""
    return [
        shard_name(file, writer, num_writers)
        for file in (MODEL_FILE, OPTIMIZER_FILE)
        for writer in range(num_writers)
    ]


def finish_checkpoint(
    temporary: Path,
    path: Path,
    *,
    state: Mapping[str, Any],
    num_writers: int,
    writer_of: Mapping[str, Mapping[str, int]],
) -> None:
    """Give an unfinished checkpoint its state and its name; one process does, after all writers.

    Args:
        temporary: the folder with every writer's files, flushed.
        path: `…/step_XXXXXXXX`.
        state: what `state.json` holds, `step` among it.
        num_writers: whose files must be there.
        writer_of: writer of each tensor, by `MODEL_FILE` and `OPTIMIZER_FILE`; for the indices.

    Raises:
        OSError: a writer's file is not there, or the disk is full.
    """
    missing = [name for name in shard_files(num_writers) if not (temporary / name).is_file()]
    if missing:
        raise OSError(
            errno.ENOENT,
            f"{missing[0]} of another rank is not in {path.parent}; run.dir must be on a file "
            "system that all nodes share",
        )
    if num_writers > 1:
        for file, writers in writer_of.items():
            places = {name: shard_name(file, writers[name], num_writers) for name in writers}
            size = sum((temporary / name).stat().st_size for name in set(places.values()))
            index = {"metadata": {"total_size": size}, "weight_map": places}
            write_text(temporary / f"{file}.index.json", json.dumps(index, indent=1))
            sync(temporary / f"{file}.index.json")
    full = {
        **state,
        "files": {name: (temporary / name).stat().st_size for name in shard_files(num_writers)},
        "format_version": FORMAT_VERSION if num_writers == 1 else SHARDED_VERSION,
    }
    write_text(temporary / STATE_FILE, json.dumps(full, indent=1, sort_keys=True))
    sync(temporary / STATE_FILE)
    sync(temporary)
    replace_folder(temporary, path)


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep_last: int,
) -> Path:
    """Write `folder/step_XXXXXXXX` in one process and delete the oldest beyond `keep_last`.

    Raises:
        OSError: the disk is full; earlier checkpoints are untouched.
    """
    path = checkpoint_path(folder, step)
    temporary = folder / f"{UNFINISHED}{path.name}-{os.getpid()}"
    remove(temporary)
    try:
        write_shard(temporary, writer=0, num_writers=1, model=model, optimizer=optimizer)
        full = {**state, "step": step}
        finish_checkpoint(temporary, path, state=full, num_writers=1, writer_of={})
    except (OSError, safetensors.SafetensorError) as error:
        remove(temporary)
        raise disk_error(error, path) from error
    for old in complete_checkpoints(folder)[:-keep_last]:
        remove(old)
    return path


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def checkpoint_path(folder: Path, step: int) -> Path:
    """`folder/step_XXXXXXXX`."""
    return folder / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step_"))


def complete_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, the oldest first."""
    restore_folders(folder)
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if (path / STATE_FILE).is_file()), key=step_of)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    found = complete_checkpoints(folder)
    return found[-1] if found else None


def model_files(path: Path) -> list[Path]:
    """The files that hold a checkpoint's weights: `model.safetensors`, or those of its writers."""
    stem, _, suffix = MODEL_FILE.rpartition(".")
    return sorted(path.glob(f"{stem}-*-of-*.{suffix}")) or [path / MODEL_FILE]


def _open(path: Path, file: str, state: Mapping[str, Any]) -> StoredTensors:
    stem = file.partition(".")[0]
    sizes = {n: s for n, s in state.get("files", {}).items() if n.startswith(stem)}
    for name, size in sizes.items():
        if (found := (path / name).stat().st_size) != size:
            raise ValueError(f"{name} has {found} bytes instead of {size}")
    return StoredTensors([path / name for name in sizes or (file,)])


def load_state(path: Path) -> dict[str, Any]:
    """Read `state.json` of a checkpoint.

    Raises:
        ValueError: it cannot be read, or another format version wrote it.
    """
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _unreadable(path, error) from error
    version = state.get("format_version") if isinstance(state, dict) else None
    if version not in (FORMAT_VERSION, SHARDED_VERSION):
        raise ValueError(
            f"checkpoint {path} has format_version={version}, this program reads "
            f"{FORMAT_VERSION} and {SHARDED_VERSION}; use the version that wrote it or another "
            "run.dir"
        )
    return dict(state)


def load_checkpoint(path: Path, *, with_optimizer: bool = True) -> Checkpoint:
    """Open a checkpoint: its state and the headers of its files; tensors are read when asked for.

    Raises:
        ValueError: a file is missing, truncated, foreign or of another format version.
    """
    state = load_state(path)
    try:
        model = _open(path, MODEL_FILE, state)
        optimizer = _open(path, OPTIMIZER_FILE, state) if with_optimizer else {}
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise _unreadable(path, error) from error
    return Checkpoint(path=path, model=model, optimizer=optimizer, state=state)


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"checkpoint {path} cannot be read ({error}); delete the folder to go on from the one "
        "before it"
    )


_LATER_KEYS: Mapping[str, Any] = {
    "mixer.memory.momentum": True,
    "mixer.memory.writes": ["gate", "up", "down"],
    "convert.loss_beyond_window": False,
    "on_policy.loss_beyond_window": False,
    "optim.alpha_lr_factor": 1.0,
}
"""What programs did that did not have these keys yet."""


def refuse_other_config(path: Path, stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Compare two flat configurations.

    A key that earlier programs did not know counts as what they did. They also noted
    `parallel.device` and an unresolved `parallel.dtype`: their `auto` counts
    as what it meant on that device, and as float32 where the device was `auto` too.

    Raises:
        ValueError: they differ; the message names the first differing key with both values.
    """
    stored, current = {**_LATER_KEYS, **stored}, {**_LATER_KEYS, **current}
    if "parallel.device" in stored and "parallel.device" not in current:
        device = stored.pop("parallel.device")
        if stored.get("parallel.dtype") == "auto":
            stored["parallel.dtype"] = "bfloat16" if device == "cuda" else "float32"
    for key in sorted({*stored, *current}):
        before, now = stored.get(key, "(not set)"), current.get(key, "(not set)")
        if before != now:
            raise ValueError(
                f"{path} was made with {key}={json.dumps(before)}, this run has "
                f"{key}={json.dumps(now)}; give the old value, another run.dir, or delete "
                f"{path.parent.parent if path.parent.name == 'checkpoints' else path}"
            )
