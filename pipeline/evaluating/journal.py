"""Answers on disk, one line each: a killed evaluation never computes a finished one again.

`evaluate/journal/SUBJECT/TASK/KEY/rank_00000.jsonl`, where KEY stands for everything that decides
an answer but the question itself: weights, mixer, precision, device, program, sampling. Each rank
appends to its own file and reads all of them, so that another number of ranks goes on from them. A
line also holds a digest of its question; an answer to another question is not taken.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from pipeline.atomic import disk_error

_KEY_LETTERS = 16


@dataclass(frozen=True, kw_only=True)
class Question:
    """What an answer belongs to."""

    id: str
    """The example's name within its task."""
    sample: int
    """Which of several samplings."""
    digest: str
    """Of all that is asked (`digest_of`)."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One line of a journal."""

    question: Question
    value: Any
    """What the model gave, as plain JSON."""

    def to_line(self) -> bytes:
        """The line, newline included."""
        asked = self.question
        line = {"id": asked.id, "sample": asked.sample, "asked": asked.digest, "value": self.value}
        return (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")

    @classmethod
    def from_line(cls, line: bytes) -> Answer:
        """The inverse of `to_line`. Raises: ValueError or KeyError: not such a line."""
        stored = json.loads(line.decode("utf-8", "surrogatepass"))
        question = Question(id=stored["id"], sample=stored["sample"], digest=stored["asked"])
        return cls(question=question, value=stored["value"])


def digest_of(*parts: Any) -> str:
    """A short digest of plain values, token ids or texts."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class Journal:
    """The answers of one subject to one task."""

    def __init__(self, root: Path, subject: str, task: str, key: str, *, rank: int) -> None:
        """Args: root: `evaluate/journal`; key: a digest; rank: whose file is appended to."""
        self.folder = root / subject / task.replace("/", "__") / key[:_KEY_LETTERS]
        self.path = self.folder / f"rank_{rank:05d}.jsonl"
        self._file: FileIO | None = None

    def read(self) -> dict[Question, Any]:
        """Answers of all ranks, those of earlier runs too.

        Raises:
            ValueError: a line, other than one that a killed process left unfinished, is broken.
        """
        answers: dict[Question, Any] = {}
        for path in sorted(self.folder.glob("rank_*.jsonl")):
            for number, line in _whole_lines(path):
                try:
                    answer = Answer.from_line(line)
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{path} line {number} is no answer ({error}); remove that line"
                    ) from error
                answers[answer.question] = answer.value
        return answers

    def append(self, answers: Sequence[Answer]) -> None:
        """Write finished answers and wait until the disk has them.

        Raises:
            OSError: the disk is full.
        """
        if not answers:
            return
        data = b"".join(answer.to_line() for answer in answers)
        try:
            if self._file is None:
                self._file = self._opened()
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise disk_error(error, self.path) from error

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> FileIO:
        """The rank's file, without the torn line that a killed process may have left at its end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            whole = sum(len(line) + 1 for _, line in _whole_lines(self.path))
            if whole < self.path.stat().st_size:
                os.truncate(self.path, whole)
        return self.path.open("ab", buffering=0)


def _whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of the lines that end in a newline."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                yield number, line[:-1]
