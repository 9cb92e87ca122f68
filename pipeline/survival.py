"""What happens when a run is asked to end: it saves, and its exit code says so.

SIGTERM and SIGUSR1 are noted the moment they come, whatever the main thread is at: a thread reads
them from a pipe that the operating system's side of Python fills (`signal.set_wakeup_fd`), also
while the main thread waits in a collective. Stages look at the note at points where they can stop
(`stop_if_asked`), on all ranks together: a signal to one rank stops them all. A second signal ends
the process at once.

`docs/survival.md` has the table of events and exit codes. This module imports no torch: it listens
before the slow imports begin.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from pipeline.distributed import Ranks

EXIT_USER_ERROR = 2
"""Something that the user can mend."""
EXIT_REQUEUE = 75
"""Asked to stop, and the state is on disk: the same command goes on (EX_TEMPFAIL of sysexits.h)."""
EXIT_RANK_LOST = 76
"""Another rank died; the newest checkpoint is the last that was written."""
EXIT_HANG = 77
"""The ranks waited for each other for `parallel.timeout_s`."""
EXIT_INTERRUPTED = 130
"""Ctrl-C."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_SAME_S = 1.0
"""Signals this close together are one request: a launcher and its process group both get them."""

_FLUSH_S = 2.0
"""Seconds that the buffers of a process that leaves at once have to be written."""


class StopRequested(Exception):
    """The process was asked to end; what was done is on disk."""


class MainRankFailedError(RuntimeError):
    """Another rank failed at something that all wait for; it has told the user why."""


class RankLostError(RuntimeError):
    """Another rank is gone, and the user has been told; `code` is the exit code."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def exit_code(error: BaseException) -> int:
    """The exit code of a process that ends by an error."""
    if isinstance(error, StopRequested):
        return EXIT_REQUEUE
    if isinstance(error, RankLostError):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    mendable = (ValueError, OSError, ArithmeticError, MainRankFailedError)
    return EXIT_USER_ERROR if isinstance(error, mendable) else 1


def this_rank() -> int:
    """This process's rank by the launcher's environment, also before the ranks have met."""
    rank = os.environ.get("RANK")
    if rank is None and "MASTER_ADDR" in os.environ:
        rank = os.environ.get("SLURM_PROCID")
    return int(rank or 0)


def write_line(line: str) -> None:
    """Write a line to standard error past Python's buffers, whose lock another thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


def leave(code: int, line: str = "") -> NoReturn:
    """End the process from any thread, at once, whatever the main thread waits for.

    Buffers are written first, for at most two seconds; nothing else is cleaned up.
    """

    def flush() -> None:
        with contextlib.suppress(ValueError, OSError):  # closed, or its reader has gone
            sys.stdout.flush()
            sys.stderr.flush()

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    thread.join(_FLUSH_S)
    if line:
        write_line(line)
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h")  # a progress bar hides the cursor
    os._exit(code)


class Stop:
    """Whether this process, or another rank, was asked to end."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what was asked."""
        self.reason: str | None = None
        """`SIGTERM`, or `SIGTERM on rank 3`; None as long as nobody asked."""
        self.tell: Callable[[str], None] | None = None
        """Passes a request on to the other ranks (`pipeline.crew`)."""
        self.rescue: Callable[[], None] | None = None
        """Brings to the disk what can be, before a process that lost another rank ends."""
        self._told = False
        self._since = 0.0
        self._interrupts = False
        self._own_signal = False

    @property
    def requested(self) -> bool:
        """Whether to stop at the next point where the stage can."""
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Note a request, of this process or of another rank. Safe in a signal handler."""
        if self.reason is None:
            self._since = time.monotonic()
            self.reason = reason

    def heard(self, number: int) -> None:
        """A signal came (called by the listening thread, never by a signal handler)."""
        name = signal.Signals(number).name
        if self._own_signal:  # `passed_on` made it
            self._own_signal = False
            return
        if self._told:
            if time.monotonic() - self._since >= _SAME_S:
                leave(128 + number, f"{name} again: ends at once, without saving")
            return
        self._told = True
        self.request(name)
        if this_rank() == 0:
            write_line(f"{name}: stops and saves as soon as it can; once more ends it at once")
        if self.tell is not None:
            self.tell(name)

    def passed_on(self, rank: int, name: str) -> None:
        """Another rank was asked to end: note it, and interrupt what may be interrupted."""
        if not self.requested and this_rank() == 0:
            write_line(f"{name} on rank {rank}: stops and saves as soon as it can")
        self.request(f"{name} on rank {rank}")
        if self._interrupts:
            self._own_signal = True
            _thread.interrupt_main(signal.SIGTERM)

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let a request raise `StopRequested` in the main thread at once, wherever it is.

        For work of one rank that leaves no half-written file behind when it is torn off, and that
        the same command takes up again: `prepare`.

        Raises:
            StopRequested: a request came, or had come before.
        """
        self._interrupts = True
        try:
            self.check()
            yield
            self.check()
        finally:
            self._interrupts = False

    def check(self) -> None:
        """Stop here if asked; for one rank alone (`stop_if_asked` is for ranks that must agree).

        Raises:
            StopRequested: a request has come.
        """
        if self.requested:
            raise StopRequested(f"{self.reason}: stopped; the same command goes on")

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Python's handler, in the main thread."""
        del frame
        self.request(signal.Signals(number).name)
        if self._interrupts:
            self._interrupts = False  # once: what cleans up is not to be torn off as well
            self.check()


stop = Stop()
"""The request to this process."""


def stop_if_asked(ranks: Ranks, where: str) -> None:
    """Stop all ranks if one of them was asked to; every rank must call it.

    Args:
        ranks: this process among the others.
        where: what is stopped, for the message.

    Raises:
        StopRequested: on all ranks alike.
    """
    from pipeline.distributed import sum_over_ranks

    if sum_over_ranks([float(stop.requested)], ranks.device)[0] > 0:
        raise StopRequested(f"{where}; the same command goes on")


@contextlib.contextmanager
def hearing_signals() -> Iterator[None]:
    """Note SIGTERM and SIGUSR1 in `stop` while the block runs; in the main thread only."""
    stop.reset()
    reading, writing = socket.socketpair()
    writing.setblocking(False)

    def listen() -> None:
        while data := reading.recv(64):
            for number in data:
                if number in STOP_SIGNALS:
                    stop.heard(number)

    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    pipe_before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    before = [signal.signal(number, stop.on_signal) for number in STOP_SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(STOP_SIGNALS, before, strict=True):
            signal.signal(number, handler)
        signal.set_wakeup_fd(pipe_before)
        writing.close()
        thread.join()
        reading.close()


def _forget_in_child() -> None:
    """A forked worker ends by SIGTERM as any process does, and writes into nobody's pipe."""
    if signal.getsignal(signal.SIGTERM) == stop.on_signal:
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_in_child)
