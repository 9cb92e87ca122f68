"""`metrics.jsonl`: one JSON object a line, the first record of what a stage reports."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from pipeline.atomic import disk_error, write_atomically


def read_lines(path: Path, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """(offset behind the line, its object) of each whole line from byte `start` on.

    A last line without its newline, as a killed process leaves it, is not given.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        file.seek(start)
        offset = start
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            offset += len(raw)
            yield offset, json.loads(raw)


class MetricsLog:
    """Appends to `metrics.jsonl`; does nothing on ranks other than 0."""

    def __init__(self, path: Path, *, enabled: bool = True) -> None:
        """Args: path: the file; enabled: whether this rank writes."""
        self.path = path
        self._enabled = enabled
        self._file: FileIO | None = None

    def truncate_after(self, step: int) -> None:
        """Drop lines of steps after `step`, which a resumed run will write again."""
        if not self._enabled or not self.path.exists():
            return
        self.close()
        kept = [line for _, line in read_lines(self.path) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(self.path, lambda file: _write(file, text))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line, and hand it to the operating system at once.

        `time` (seconds since 1970) tells dashboards when it was, however late they hear of it.
        Numbers that are not finite, which JSON does not know, become null.

        Raises:
            OSError: the disk is full.
        """
        if not self._enabled:
            return
        known = {key: None if _is_unknown(value) else value for key, value in values.items()}
        stamped = {"step": step, "time": round(time.time(), 3), **known}
        line = (json.dumps(stamped, allow_nan=False) + "\n").encode()
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("ab", buffering=0)
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise disk_error(error, self.path) from error

    def close(self) -> None:
        """Close the file; a later `write` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _is_unknown(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
