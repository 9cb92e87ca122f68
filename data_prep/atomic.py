"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
"""End of the names of files that are being written."""


class AtomicFile:
    """A file that appears under its name only once it is whole and on disk.

    Errors of the disk come as `OSError` with the mend, and nothing is left under either name.

    Args:
        path: where it is to appear.
        owner: part of the temporary name, where several processes may write the same file.
    """

    def __init__(self, path: Path, *, owner: str = "") -> None:
        self._path = path
        self._partial = path.with_name(f"{path.name}{owner}{PARTIAL}")
        self._error: OSError | None = None
        with self._explained():
            self._stream = open(self._partial, "wb")  # noqa: SIM115 - until commit or abandon

    def write(self, data: Any) -> int:
        """Appends bytes."""
        with self._explained():
            return self._stream.write(data)

    def commit(self) -> None:
        """Flushes to the disk and gives the file its name."""
        with self._explained():
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            os.replace(self._partial, self._path)
            _sync_folder(self._path.parent)

    def abandon(self) -> None:
        """Deletes what was written."""
        with contextlib.suppress(OSError):  # what is buffered may not fit; it goes anyway
            self._stream.close()
        self._partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        if self._error is not None:  # a writer above may flush once more while it unwinds
            raise self._error
        try:
            yield
        except OSError as error:
            if hasattr(self, "_stream"):
                self.abandon()
            self._error = OSError(
                error.errno,
                f"could not write {self._path.name} ({error.strerror}); free space in "
                f"{self._path.parent} and run the same command again, finished shards are kept",
            )
            raise self._error from error


@contextlib.contextmanager
def atomic_file(path: Path, *, owner: str = "") -> Iterator[AtomicFile]:
    """An `AtomicFile` that is committed where the block ends well, and abandoned otherwise.

    Raises:
        OSError: with the mend, where the disk is full; nothing is left under either name.
    """
    file = AtomicFile(path, owner=owner)
    try:
        yield file
    except BaseException:
        file.abandon()
        raise
    file.commit()


def write_atomic(path: Path, data: bytes, *, owner: str = "") -> None:
    """Writes a small file whole or not at all."""
    with atomic_file(path, owner=owner) as stream:
        stream.write(data)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
