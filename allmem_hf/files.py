"""Weights on disk, readable by whom the umask says."""

from __future__ import annotations

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
