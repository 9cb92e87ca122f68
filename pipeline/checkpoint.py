"""Checkpoints that do not depend on how many ranks wrote them.

A checkpoint is a folder `step_00000123/` with `model.safetensors` (the trained weights),
`optimizer.safetensors` (the moments), both as full float32 tensors under Hugging Face names, and
`state.json` (step, tokens, the loader's state, the configuration). It is written under another
name, flushed to the disk and renamed, so a folder with this name is whole; nothing is unpickled.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from allmem_hf.files import OLD_SUFFIX, replace_folder, restore_folders, save_tensors, sync

FORMAT_VERSION = 1
STATE_FILE = "state.json"
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
_UNFINISHED = ".unfinished-"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint in memory."""

    path: Path
    """Its folder."""
    model: dict[str, Tensor]
    """Trained weights under Hugging Face names, float32."""
    optimizer: dict[str, Tensor]
    """Moments under `exp_avg.NAME` and `exp_avg_sq.NAME`, float32."""
    state: dict[str, Any]
    """`step`, `tokens`, `loader`, `config`, …"""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary neighbour, flush it, and rename it to `path`.

    Works for files and for folders. A folder that stands at `path` is `.NAME.old` for a moment;
    `complete_checkpoints` and `remove_unfinished` put it back after a kill in that moment.

    Raises:
        OSError: the disk is full or not writable; nothing is left behind, `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{_UNFINISHED}{path.name}-{os.getpid()}"
    remove(temporary)
    try:
        write(temporary)
        if temporary.is_dir():
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    sync(file)
        sync(temporary)
        if temporary.is_dir():
            replace_folder(temporary, path)
        else:
            temporary.replace(path)
            sync(path.parent)
    except (OSError, safetensors.SafetensorError) as error:
        remove(temporary)
        raise disk_error(error, path) from error


def disk_error(error: Exception, path: Path) -> OSError:
    """The same error with the path and a mend in its text; a full disk is named as such."""
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    number = number or (errno.ENOSPC if "No space left" in text or "os error 28" in text else None)
    number = number or (errno.EFBIG if "File too large" in text or "os error 27" in text else None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(path.parent).free / 2**20
        return OSError(
            number,
            f"{os.strerror(number)} while saving {path} ({free:.1f} MiB free); free some space "
            "or set run.dir to a larger disk, then run the same command again",
        )
    return OSError(
        number or errno.EIO, f"cannot save {path}: {text}; check the folder's permissions"
    )


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Delete a file or folder that may be there; a folder loses its name first."""
    if path.is_dir() and not path.is_symlink():
        if not path.name.startswith(_UNFINISHED):
            renamed = path.parent / f"{_UNFINISHED}deleted-{path.name}-{os.getpid()}"
            shutil.rmtree(renamed, ignore_errors=True)
            path = path.rename(renamed)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Delete what killed processes left behind; a folder that lost its name gets it back."""
    if folder.is_dir():
        restore_folders(folder)
        for pattern in (f"{_UNFINISHED}*", f".*{OLD_SUFFIX}"):
            for path in folder.glob(pattern):
                remove(path)


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep_last: int,
) -> Path:
    """Write `folder/step_XXXXXXXX` and delete the oldest beyond `keep_last`; rank 0 only.

    Raises:
        OSError: the disk is full; earlier checkpoints are untouched.
    """
    path = folder / f"step_{step:08d}"

    def write(temporary: Path) -> None:
        temporary.mkdir(parents=True)
        save_tensors(_contiguous(model), temporary / MODEL_FILE)
        save_tensors(_contiguous(optimizer), temporary / OPTIMIZER_FILE)
        full = {**state, "step": step, "format_version": FORMAT_VERSION}
        _write_text(temporary / STATE_FILE, json.dumps(full, indent=1, sort_keys=True))

    write_atomically(path, write)
    for old in complete_checkpoints(folder)[:-keep_last]:
        remove(old)
    return path


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def complete_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, the oldest first."""
    restore_folders(folder)
    found = sorted(folder.glob("step_*")) if folder.is_dir() else []
    return [path for path in found if (path / STATE_FILE).is_file()]


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    found = complete_checkpoints(folder)
    return found[-1] if found else None


def load_checkpoint(path: Path, *, with_optimizer: bool = True) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        ValueError: a file is missing, truncated or of another format version.
    """
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        model = load_file(path / MODEL_FILE)
        optimizer = load_file(path / OPTIMIZER_FILE) if with_optimizer else {}
    except (OSError, json.JSONDecodeError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"checkpoint {path} cannot be read ({error}); delete the folder to go on from the one "
            "before it"
        ) from error
    version = state.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"checkpoint {path} has format_version={version}, this program reads {FORMAT_VERSION}; "
            "use the version that wrote it or another run.dir"
        )
    return Checkpoint(path=path, model=model, optimizer=optimizer, state=state)


def refuse_other_config(path: Path, stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Compare two flat configurations.

    Earlier programs noted `parallel.device` and an unresolved `parallel.dtype`: their `auto` counts
    as what it meant on that device, and as float32 where the device was `auto` too.

    Raises:
        ValueError: they differ; the message names the first differing key with both values.
    """
    stored = dict(stored)
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
