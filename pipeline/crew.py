"""Every rank knows when another one is gone, and leaves instead of waiting for it for ever.

Each rank has a thread that holds a connection to the hub on rank 0 (`pipeline.hub`), says once a
second what the rank does, and hears what happens to the others:

- *A process that dies* (killed, out of memory) closes its connection: all know it at once.
- *A machine that dies* no longer acknowledges what it is sent: all know it after
  `parallel.heartbeat_timeout_s`. Its kernel acknowledges, not its Python, so a rank that is busy in
  one long C call is not taken for dead (the watchdog tells of it where others wait).
- *An exception* is announced before the rank leaves.
- *A request to stop* that reached one rank is passed on.

Who hears that a rank is gone prints which and since when, gives its main thread a few seconds to
leave by itself, and then ends the process: a main thread that waits in a collective cannot.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pipeline import watchdog
from pipeline.hub import Hub, Patience
from pipeline.survival import (
    EXIT_HANG,
    EXIT_INTERRUPTED,
    EXIT_RANK_LOST,
    EXIT_USER_ERROR,
    MainRankFailedError,
    RankLostError,
    StopRequested,
    exit_code,
    leave,
    stop,
    write_line,
)
from pipeline.wire import Message, Wire, connect

if TYPE_CHECKING:
    from pipeline.distributed import Ranks
    from pipeline.schema import ParallelSettings

_BEAT_S = 1.0
_SETTLE_S = 1.0
"""Seconds in which a rank that fails waits for word that another one failed before it."""
_HEARD_S = 5.0
"""Seconds that the hub has to take an announcement."""
_TOLD_S = 3.0
"""Seconds in which a rank with an error waits for rank 0 to report the same one."""
_LINGER_S = 3.0
"""Seconds that rank 0's hub waits for the other ranks to have left."""
_GRACE_S = 4.0
"""Seconds that the main thread has to leave by itself, once another rank is gone."""
_RESCUE_S = 12.0
"""Seconds that a checkpoint on its way to the disk has to get there."""
_LEAVING_S = 45.0
"""Seconds that a rank with an error of its own has to leave: a dead server may hold it up."""


class Crew:
    """This rank's thread among those of the other ranks."""

    def __init__(
        self,
        rank: int,
        connection: socket.socket,
        *,
        token: str,
        patience: Patience,
        state: Callable[[], dict[str, Any]],
        beat_s: float = _BEAT_S,
    ) -> None:
        """Join the crew.

        Args:
            rank: this process's.
            connection: to the hub.
            token: what the hub wants to hear first.
            patience: the same on all ranks.
            state: what this rank does now, fields of `pipeline.hang.Rank`.
            beat_s: seconds between two beats.

        Raises:
            OSError: the hub does not take the connection.
        """
        self.rank = rank
        self._patience, self._state, self._beat_s = patience, state, beat_s
        self._lost: Message | None = None
        self._main_failed: str | None = None
        self._changed = threading.Condition()
        self._leaving = self._said = self._closing = self._heard = False
        self._asked_at: float | None = None
        self._wire = Wire(connection, timeout_s=patience.dead_s)
        self._wire.send({"rank": rank, "token": token})
        self._thread = threading.Thread(target=self._work, name="crew", daemon=True)
        self._thread.start()

    # --- what the main thread calls ---------------------------------------------------------------

    def announce(self, error: BaseException) -> bool:
        """Tell the others that this rank leaves with an error, before it does.

        Returns:
            whether to be silent: rank 0 reports the same error.

        Raises:
            RankLostError: the error is what follows from another rank's end.
        """
        if self._leaving:
            return False
        code = exit_code(error)
        if isinstance(error, StopRequested | MainRankFailedError):  # all ranks know
            self._leave_later(code)
            self._say_bye()
            return False
        follows = isinstance(error, RuntimeError | ConnectionError)  # as gloo's, of a dead rank
        if follows:
            self._wait(lambda: self._lost is not None, _SETTLE_S)
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:1000]
        if self._lost is None or not follows:
            self._leave_later(code)
            self._tell({"type": "gone", "text": text, "code": code})
            self._wait(lambda: self._heard, _HEARD_S)
        if self._lost is not None and follows:
            self._say_lost()
            raise RankLostError(self._lost_text(), self._code_of_lost()) from error
        if self.rank != 0:
            self._wait(lambda: self._main_failed is not None, _TOLD_S)
        return self.rank != 0 and self._main_failed == text

    def _wait(self, until: Callable[[], bool], at_most_s: float) -> None:
        with self._changed:
            self._changed.wait_for(until, at_most_s)

    def _leave_later(self, code: int) -> None:
        """Leave by the main thread's own doing, or by force if it takes too long."""
        if self._leaving:
            return
        self._leaving = True
        timer = threading.Timer(_LEAVING_S, leave, (code,))
        timer.daemon = True
        timer.start()

    def close(self) -> None:
        """Leave the crew: the work is done."""
        self._leaving = True
        self._say_bye()
        self._closing = True
        self._thread.join(2.0)

    def _say_bye(self) -> None:
        self._tell({"type": "bye"})
        # A connection that is closed with bytes unread takes those that are on their way with it.
        self._wait(lambda: self._heard, _HEARD_S)

    def tell_to_stop(self, name: str) -> None:
        """Pass a request to stop on to the other ranks."""
        self._tell({"type": "stop", "name": name})

    def forget(self) -> None:
        """Close the connection of a forked child, which would keep it open after our death."""
        self._wire.close()

    # --- the thread -------------------------------------------------------------------------------

    def _tell(self, message: Message) -> None:
        try:
            self._wire.send(message)
        except OSError:
            return  # the thread reads the end of the stream and tells of it

    def _work(self) -> None:
        next_beat = time.monotonic()
        warned_s = self._patience.warning_s
        while not self._closing:
            wait = max(0.0, min(next_beat - time.monotonic(), 0.5))
            ready, _, _ = select.select([self._wire], [], [], wait)
            if ready and not self._read():
                break
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + self._beat_s
                if self._asked_at is None:
                    self._asked_at = now
                    self._tell({"type": "beat", "state": self._state()})
                elif warned_s and now - self._asked_at > warned_s:
                    warned_s *= 2
                    write_line(
                        f"rank {self.rank}: rank 0 has not answered for {now - self._asked_at:.0f}"
                        " s: stopped, or held up inside one call of a library"
                    )
        self._wire.close()

    def _read(self) -> bool:
        """Take what has come; whether there is more to expect."""
        try:
            messages = self._wire.receive()
            text = "its process ended without a word: killed, or out of memory"
        except TimeoutError:
            messages, text = None, f"its machine has not answered for {self._patience.dead_s:g} s"
        except (OSError, ValueError) as error:
            messages, text = None, f"the connection to it broke: {error}"
        if messages is None:
            if not self._closing:
                at = time.strftime("%H:%M:%S")
                self._hear(
                    {"type": "gone", "rank": 0, "text": text, "code": EXIT_RANK_LOST, "at": at}
                )
            return False
        for message in messages:
            if message["type"] == "end":
                return False
            self._hear(message)
        return True

    def _hear(self, message: Message) -> None:
        kind = message["type"]
        if kind == "ok":
            self._asked_at = None
        elif kind == "stop":
            stop.passed_on(message["rank"], message["name"])
        elif kind == "heard":
            with self._changed:
                self._heard = True
                self._changed.notify_all()
        elif kind == "hang":
            table = message["table"] if self.rank == 0 else "the ranks wait for each other"
            leave(EXIT_HANG, f"error: {table}\nrank {self.rank}: leaves")
        elif kind == "gone":
            with self._changed:
                if message["rank"] == 0:
                    self._main_failed = message["text"]
                first = self._lost is None
                if first:
                    self._lost = message
                self._changed.notify_all()
            if first and not self._leaving:
                threading.Thread(target=self._leave_soon, name="leaving", daemon=True).start()

    def _leave_soon(self) -> None:
        """End the process, unless the main thread does so."""
        time.sleep(_SETTLE_S)
        if self._leaving or self._closing:
            return
        self._say_lost()
        time.sleep(_GRACE_S - _SETTLE_S)
        if self._leaving or self._closing:
            return
        if stop.rescue is not None:
            thread = threading.Thread(target=stop.rescue, name="rescue", daemon=True)
            thread.start()
            thread.join(_RESCUE_S)
        leave(self._code_of_lost())

    def _say_lost(self) -> None:
        with self._changed:
            said, self._said = self._said, True
        if not said:
            write_line(f"rank {self.rank}: {self._lost_text()}; leaves")

    def _lost_text(self) -> str:
        assert self._lost is not None
        return f"rank {self._lost['rank']} is gone since {self._lost['at']} ({self._lost['text']})"

    def _code_of_lost(self) -> int:
        """Errors that a user can mend keep their code, whichever rank met them."""
        assert self._lost is not None
        code = self._lost["code"]
        return code if code in (EXIT_USER_ERROR, EXIT_INTERRUPTED) else EXIT_RANK_LOST


_mine: list[Crew | Hub] = []  # what a forked child is to let go of


def _forget_in_child() -> None:
    for part in _mine:
        part.forget()
    _mine.clear()


os.register_at_fork(after_in_child=_forget_in_child)


@contextlib.contextmanager
def crew_of(settings: ParallelSettings, ranks: Ranks) -> Iterator[Crew | None]:
    """Watch over the other ranks while the block runs; every rank must enter it.

    An error that leaves the block is announced to them. With one rank, or where
    `parallel.heartbeat_timeout_s` is 0, there is nobody to watch and None is given.

    Raises:
        RankLostError: in the place of an error that follows from the loss of another rank.
        ValueError: rank 0 cannot be reached.
    """
    if ranks.world_size == 1 or not settings.heartbeat_timeout_s:
        yield None
        return
    patience = Patience(
        dead_s=settings.heartbeat_timeout_s,
        warning_s=settings.hang_warning_s,
        hang_s=0.9 * settings.timeout_s,
    )
    hub, connection, token = _meet(ranks, patience)
    crew = Crew(
        ranks.rank,
        connection,
        token=token,
        patience=patience,
        state=watchdog.state,
        beat_s=_BEAT_S * max(1.0, ranks.world_size / 256),
    )
    with aboard(crew, hub):
        yield crew


@contextlib.contextmanager
def aboard(crew: Crew, hub: Hub | None) -> Iterator[None]:
    """Watch while the block runs, and leave in a way that the others understand.

    Raises:
        RankLostError: in the place of an error that follows from the loss of another rank.
    """
    _mine.extend(part for part in (crew, hub) if part is not None)
    stop.tell = crew.tell_to_stop
    if stop.requested:  # while the ranks were starting
        crew.tell_to_stop(str(stop.reason))
    well = False
    try:
        with announcing(crew):
            yield
        well = True
    except StopRequested:
        well = True
        raise
    finally:
        stop.tell = None
        if well:
            crew.close()
            linger()


def linger() -> None:
    """Before the process ends: let the other ranks hear what rank 0's hub has told them."""
    for part in _mine:
        if isinstance(part, Hub):
            part.close(_LINGER_S)
    _mine.clear()


@contextlib.contextmanager
def announcing(crew: Crew | None) -> Iterator[None]:
    """Announce an error that leaves the block, at once: what comes after it may take its time.

    The error gets the attribute `told_by_rank_0` where rank 0 reports the same one.

    Raises:
        RankLostError: in the place of an error that follows from the loss of another rank.
    """
    try:
        yield
    except BaseException as error:
        if crew is not None and not isinstance(error, RankLostError) and crew.announce(error):
            error.told_by_rank_0 = True  # type: ignore[attr-defined]
        raise


def _meet(ranks: Ranks, patience: Patience) -> tuple[Hub | None, socket.socket, str]:
    """Start the hub on rank 0, tell all ranks where it is, and connect to it."""
    import torch.distributed as dist

    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    hub = None
    where: list[Any] = [None]
    if ranks.is_main:
        hub = Hub(ranks.world_size, patience, local_only=master in ("127.0.0.1", "localhost"))
        hub.start()
        where = [(hub.port, hub.token, socket.gethostname())]
    dist.broadcast_object_list(where, src=0)
    port, token, name = where[0]
    try:
        hosts = ["127.0.0.1"] if ranks.is_main else [master, name]
        return hub, connect(hosts, port, timeout_s=patience.dead_s), token
    except OSError as error:
        raise ValueError(
            f"rank {ranks.rank} cannot reach rank 0 at port {port} ({error}); allow connections "
            "between the machines, or set parallel.heartbeat_timeout_s=0 to run without "
            "being told of dead ranks"
        ) from error
