"""The thread that ships a stage to MLflow, and gives up in time: it never stops or slows a run."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Protocol

from pipeline.schema import TrackingSettings

_LAST_TRIES = 3
_warned: set[str] = set()  # servers that this process has told the user of


class Recorder(Protocol):
    """Writes to a server; each call raises what the server makes it raise."""

    def ship(self) -> None:
        """Send the metrics that are new."""

    def ship_files(self) -> None:
        """Send the files that are new."""

    def close(self, status: str) -> None:
        """Send what a finished stage has, and end its run."""


class Shipper:
    """Asks for a recorder, lets it send every few seconds, and asks anew after a failure."""

    def __init__(
        self,
        connect: Callable[[], Recorder],
        settings: TrackingSettings,
        *,
        uri: str,
        say: Callable[[str], None],
        place: str,
    ) -> None:
        """Prepare a thread.

        Args:
            connect: makes a recorder; raises while the server is away.
            settings: how often, and how long the end waits.
            uri: the server, for the user.
            say: prints a line.
            place: the folder in which everything stays, for the user.
        """
        self._connect, self._settings, self._uri, self._say = connect, settings, uri, say
        self._place = place
        self._status: str | None = None
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._recorder: Recorder | None = None
        self._failing = True
        self._files_failed = False
        self._complete = False

    def start(self) -> None:
        """Begin shipping."""
        self._thread.start()

    def finish(self, status: str) -> bool:
        """Send the rest and close the run, for at most `tracking.flush_s` seconds.

        A server that did not answer the last time is asked once more, not longer.

        Returns:
            whether the server has everything.
        """
        self._status = status
        self._wake.set()
        self._thread.join(self._settings.flush_s)
        return self._complete

    def _work(self) -> None:
        deadline, tries = math.inf, 0
        while True:
            ending = self._status is not None
            if ending:
                deadline = min(deadline, time.monotonic() + self._settings.flush_s)
            try:
                self._send(ending)
                if self._complete:
                    return
                self._failing = False
            except Exception as error:  # noqa: BLE001 - tracking must never stop a run
                self._warn(error)
                self._recorder = None  # the next try asks the server anew how far it is
                self._failing = self._failing or not ending
            tries += ending
            if time.monotonic() >= deadline or tries >= (1 if self._failing else _LAST_TRIES):
                return
            if ending:
                time.sleep(min(1.0, self._settings.interval_s))
            else:
                self._wake.wait(self._settings.interval_s)

    def _send(self, ending: bool) -> None:
        if self._recorder is None:
            self._recorder = self._connect()
        self._recorder.ship()
        if ending or not self._files_failed:  # after a failure not before the stage's end
            self._files_failed = True
            self._recorder.ship_files()
            self._files_failed = False
        if ending:
            self._recorder.close(self._status or "FINISHED")
            self._complete = True

    def _warn(self, error: Exception) -> None:
        if self._uri not in _warned:
            _warned.add(self._uri)
            line = " ".join(str(error).split())
            self._say(
                f"MLflow at {self._uri} does not take what it is sent "
                f"({line[:120]}{'…' if len(line) > 120 else ''}); it stays in {self._place} and "
                "is sent later"
            )
