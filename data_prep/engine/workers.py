"""Workers that share the work over a file system: waiting for what the others have to do."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.config import PrepareConfig
from data_prep.engine.streams import Stream, Used, unit_state

Say = Callable[[str], None]
_POLL_S = (0.1, 5.0)
_SAY_EVERY_S = 30.0


class WorkerFailedError(ValueError):
    """Another worker has ended with an error that somebody must mend."""


class Fellows:
    """Tells other workers that this one has failed, and hears of it from them.

    Args:
        config: the workers.
        work: folder of the work files.
    """

    def __init__(self, config: PrepareConfig, work: Path) -> None:
        self._config, self._work = config, work

    def start(self) -> None:
        """Notes that this worker is at it, in the file system's own time."""
        if self._config.num_workers > 1:
            self._work.mkdir(parents=True, exist_ok=True)
            self._file(self._config.worker_rank, "failed").unlink(missing_ok=True)
            self._file(self._config.worker_rank, "started").write_text("")

    def agree(self, digest: str) -> None:
        """Makes sure that all workers have found the same units; the first one's list counts.

        Raises:
            ValueError: files have come, gone or changed their size since.
        """
        if self._config.num_workers == 1:
            return
        agreed = self._work / "units.sha256"
        own = self._file(self._config.worker_rank, "units")
        own.write_text(digest)
        with contextlib.suppress(FileExistsError):
            os.link(own, agreed)  # whole at once, and only if nobody was first
        if agreed.read_text() != digest:
            raise ValueError(
                f"worker {self._config.worker_rank} finds other files than the first worker did: "
                f"some have come, gone or grown; put them back, or delete {self._work.parent} "
                "and start all workers again"
            )

    def failed(self, error: Exception) -> None:
        """Notes why this worker ends."""
        if self._config.num_workers > 1 and not isinstance(
            error, (WorkersMissingError, WorkerFailedError)
        ):
            with contextlib.suppress(OSError):  # the disk may be what has failed
                self._file(self._config.worker_rank, "failed").write_text(str(error))

    def check(self, workers: Sequence[int]) -> None:
        """Whether any of these has failed since this one started.

        Raises:
            WorkerFailedError: one has.
        """
        own = self._file(self._config.worker_rank, "started")
        for worker in workers:
            file = self._file(worker, "failed")
            try:
                if file.stat().st_mtime_ns < own.stat().st_mtime_ns:
                    continue  # of an earlier call
                text = file.read_text()
            except FileNotFoundError:
                continue
            raise WorkerFailedError(f"worker {worker} of {self._config.num_workers} failed: {text}")

    def _file(self, worker: int, what: str) -> Path:
        return self._work / f"{what}.worker{worker}of{self._config.num_workers}"


class WorkersMissingError(TimeoutError):
    """Others have not done their part; this worker has."""


def owner_of(config: PrepareConfig) -> str:
    """Part of the names of temporary files, so that workers leave each other's alone."""
    if config.num_workers == 1:
        return ""
    return f".worker{config.worker_rank}of{config.num_workers}"


@dataclass(frozen=True)
class Missing:
    """What others have to do."""

    tasks: Sequence[int]
    """Numbers of tasks; task n is worker n % num_workers' to do."""
    done: int = 0
    """Grows as they get on with it."""


def wait_for_others(
    config: PrepareConfig,
    what: str,
    missing: Callable[[], Missing],
    say: Say | None,
    fellows: Fellows,
) -> None:
    """Returns when nothing is missing.

    Args:
        config: `wait_s` and the workers.
        what: that is waited for, in words.
        missing: looks.
        say: told every half minute.
        fellows: the others.

    Raises:
        WorkersMissingError: nothing was done for `wait_s` seconds.
        WorkerFailedError: a worker that is waited for has failed.
    """
    pause, longest = _POLL_S
    last_change = last_said = time.monotonic()
    before: tuple[int, int] | None = None
    while (found := missing()).tasks:
        now = time.monotonic()
        if (len(found.tasks), found.done) != before:
            before, last_change = (len(found.tasks), found.done), now
        workers = sorted({task % config.num_workers for task in found.tasks})
        fellows.check(workers)
        words = (
            f"{len(found.tasks)} {what} of worker{'s' if len(workers) > 1 else ''} "
            f"{', '.join(map(str, workers[:20]))}{' …' if len(workers) > 20 else ''}"
        )
        if now - last_change >= config.wait_s:
            raise WorkersMissingError(
                f"worker {config.worker_rank} of {config.num_workers} has done its part; missing: "
                f"{words}; run stage=prepare with data.worker_rank={workers[0]} too, then this one "
                "again"
            )
        if say is not None and now - last_said >= _SAY_EVERY_S:
            say(f"worker {config.worker_rank}: waiting for {words}")
            last_said = now
        time.sleep(min(pause, max(config.wait_s - (now - last_change), 0.01)))
        pause = min(2 * pause, longest)


class MissingUnits:
    """Units of phase 1 that are not whole and count.

    Args:
        streams: all streams.
        work: folder of the work files.
    """

    def __init__(self, streams: list[Stream], work: Path) -> None:
        self._streams, self._work = streams, work
        self._whole: dict[tuple[int, int], Used] = {}
        self._parts = 0

    def __call__(self) -> Missing:
        """Their numbers, counted over all streams; `done` counts their parts."""
        found: list[int] = []
        offset = 0
        self._parts = 0
        for stream in self._streams:
            found += [offset + unit for unit in self._of(stream)]
            offset += len(stream.units)
        return Missing(found, self._parts)

    def _of(self, stream: Stream) -> list[int]:
        """Missing units of a stream before its cut."""
        missing: list[int] = []
        used = Used()
        for unit in range(len(stream.units)):
            key = (stream.number, unit)
            if key not in self._whole:
                state = unit_state(self._work, stream, unit, stamp=None)
                self._parts += len(state.parts)
                if state.complete:
                    self._whole[key] = state.used
            if key in self._whole:
                used += self._whole[key]
                if not missing and stream.reached(used):
                    break
            else:
                missing.append(unit)
        # What a unit holds that is missing nobody knows; units behind it may not be needed.
        return missing[:1] if stream.limited else missing
