"""Prompts of a task on the disk: 590 of 128k tokens would be half a gigabyte in each rank."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path

from pipeline.atomic import disk_error
from pipeline.evaluating.journal import digest_of

_NUMBER = "i"
"""Four bytes a token."""


class PromptFile:
    """Token ids of prompts, read back one prompt at a time.

    The file has no name, so that nothing of it stays when the process ends, however it ends.

    Attributes:
        lengths: tokens of each prompt.
        digests: of each prompt's tokens.
    """

    def __init__(self, folder: Path) -> None:
        """Open an empty file. Args: folder: on a disk, not in memory; made if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - as long as self
        self._starts = [0]
        self.lengths: list[int] = []
        self.digests: list[str] = []

    def append(self, tokens: Sequence[int]) -> None:
        """Add a prompt.

        Raises:
            OSError: the disk is full.
        """
        data = array(_NUMBER, tokens).tobytes()
        try:
            self._file.seek(self._starts[-1])
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise disk_error(error, self._folder / "prompts") from error
        self._starts.append(self._starts[-1] + len(data))
        self.lengths.append(len(tokens))
        self.digests.append(digest_of(list(tokens)))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[int, ...]:
        place = range(len(self))[index]
        self._file.seek(self._starts[place])
        tokens = array(_NUMBER)
        tokens.frombytes(self._file.read(self._starts[place + 1] - self._starts[place]))
        return tuple(tokens)
