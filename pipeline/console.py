"""What a person sees: a progress bar in a terminal, plain lines elsewhere; rank 0 only."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Advance(Protocol):
    """Tells how far the work is: units done so far, a few words, all units where they change."""

    def __call__(self, done: int, note: str = "", total: int | None = None) -> None: ...


class Reporter:
    """Speaks on rank 0 only."""

    def __init__(self, *, enabled: bool = True, every_s: float = 10.0) -> None:
        """Args: enabled: rank 0; every_s: seconds between plain progress lines."""
        self._enabled = enabled
        self._every_s = every_s
        self._console = Console(stderr=True, highlight=False)
        self._console.soft_wrap = not self._console.is_terminal  # a log's lines stay whole

    def say(self, line: str) -> None:
        """Print one line."""
        if self._enabled:
            self._console.print(line, markup=False)

    @contextlib.contextmanager
    def progress(self, title: str, total: int | None) -> Iterator[Advance]:
        """Show progress of `total` units while the block runs."""
        if not self._enabled:
            yield _silent
        elif self._console.is_terminal and sys.stderr.isatty():
            with self._bar(title, total) as advance:
                yield advance
        else:
            yield self._plain(title, total)

    @contextlib.contextmanager
    def _bar(self, title: str, total: int | None) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self._console, refresh_per_second=4) as bar:
            task = bar.add_task(title, total=total, note="")

            def advance(done: int, note: str = "", total: int | None = None) -> None:
                bar.update(task, completed=done, note=note, total=total)

            yield advance

    def _plain(self, title: str, total: int | None) -> Advance:
        last, whole = time.monotonic(), total

        def advance(done: int, note: str = "", total: int | None = None) -> None:
            nonlocal last, whole
            whole = whole if total is None else total
            now = time.monotonic()
            if now - last < self._every_s and done != whole:
                return
            last = now
            of = f"/{whole}" if whole is not None else ""
            self.say(f"{title} {done}{of}  {note}".rstrip())

        return advance


def _silent(done: int, note: str = "", total: int | None = None) -> None:
    del done, note, total
