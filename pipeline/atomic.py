"""Files and folders that appear whole or not at all, and errors of a disk in words."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors

from allmem_hf.files import OLD_SUFFIX, replace_folder, restore_folders, sync

UNFINISHED = ".unfinished-"
"""Names of files and folders that are being written begin with this."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary neighbour, flush it, and rename it to `path`.

    Works for files and for folders. A folder that stands at `path` is `.NAME.old` for a moment;
    `complete_checkpoints` and `remove_unfinished` put it back after a kill in that moment.

    Raises:
        OSError: the disk is full or not writable; nothing is left behind, `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{UNFINISHED}{path.name}-{os.getpid()}"
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
    write_atomically(path, lambda temporary: write_text(temporary, text))


def write_text(path: Path, text: str) -> None:
    """Write a text file, not atomically."""
    path.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Delete a file or folder that may be there; a folder loses its name first."""
    if path.is_dir() and not path.is_symlink():
        if not path.name.startswith(UNFINISHED):
            renamed = path.parent / f"{UNFINISHED}deleted-{path.name}-{os.getpid()}"
            shutil.rmtree(renamed, ignore_errors=True)
            path = path.rename(renamed)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Delete what killed processes left behind; a folder that lost its name gets it back."""
    if folder.is_dir():
        restore_folders(folder)
        for pattern in (f"{UNFINISHED}*", f".*{OLD_SUFFIX}"):
            for path in folder.glob(pattern):
                remove(path)
