"""Weights on disk, readable by whom the umask says, and folders that are replaced whole."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes a safetensors file with the permissions of any other new file.

    safetensors fills a private temporary file (mode 0600) and gives it the name, so that on a
    shared disk nobody but its owner could read it.

    Args:
        tensors: contiguous, on the CPU, by name.
        path: of the file; one that is there is replaced and keeps its permissions.

    Raises:
        OSError, SafetensorError: the disk is full or not writable; what is at `path` is not whole.
    """
    path.touch()  # the system makes the permissions: umask, or the folder's own list
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(mode)


OLD_SUFFIX = ".old"
"""`.NAME.old` is the folder that stood at NAME while `replace_folder` gives the name away."""


def sync(path: Path) -> None:
    """Makes the system write a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_folder(new: Path, path: Path) -> None:
    """Gives `new` the name `path`; a folder that stood there is deleted only afterwards.

    No system call exchanges two folders' names everywhere, so for a moment the old one is named
    `.NAME.old` and nothing stands at `path`. After a kill in that moment `restore_folder` helps.

    Args:
        new: a whole folder on the same disk, flushed.
        path: the name it takes.

    Raises:
        OSError: a rename failed; what stood at `path` stands there again.
    """
    old = _old(path)
    restore_folder(path)
    if old.is_dir():
        shutil.rmtree(old)
    while True:
        if path.is_dir():
            path.rename(old)
        try:
            new.rename(path)
            break
        except OSError as error:
            restore_folder(path)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else a reader was first
                raise
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)  # what stays of it goes with the next one


def restore_folder(path: Path) -> None:
    """Puts a folder back that a process killed inside `replace_folder` left as `.NAME.old`.

    To be called before `path` is read or written; does nothing where a folder has the name.

    Raises:
        OSError: the folder's parent is not writable.
    """
    old = _old(path)
    if path.exists() or not old.is_dir():
        return
    try:
        old.rename(path)
    except OSError:
        if not path.exists():  # else another process was first
            raise


def restore_folders(parent: Path) -> None:
    """`restore_folder` for every `.NAME.old` in `parent`."""
    for old in sorted(parent.glob(f".*{OLD_SUFFIX}")):
        restore_folder(parent / old.name[1 : -len(OLD_SUFFIX)])


def _old(path: Path) -> Path:
    return path.parent / f".{path.name}{OLD_SUFFIX}"
