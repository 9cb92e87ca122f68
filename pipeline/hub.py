"""Rank 0's side of the crew: hears every rank, and tells all of them who is gone or hangs.

One connection a rank (its own included), one thread. No torch here.
"""

from __future__ import annotations

import secrets
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from pipeline.hang import Rank, report
from pipeline.survival import EXIT_RANK_LOST, write_line
from pipeline.wire import Message, Wire, listen

_TICK_S = 0.5
_JITTER_S = 1.0  # of when beats come
_COME_UP_S = 60.0
"""Seconds that every rank has at least to connect."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Seconds after which something is said or done."""

    dead_s: float
    """Silence of a machine after which its ranks are dead."""
    warning_s: float
    """Waiting after which a table of what every rank does is printed; 0: never."""
    hang_s: float
    """Waiting after which the run ends with that table."""


@dataclass
class _Member:
    wire: Wire
    state: dict[str, Any] = field(default_factory=dict)
    heard: float = field(default_factory=time.monotonic)
    left: bool = False


class Hub:
    """The thread that all ranks are connected to."""

    def __init__(self, world_size: int, patience: Patience, *, local_only: bool) -> None:
        self.token = secrets.token_hex(16)
        """What a rank must say first; given to the ranks by another way."""
        self._world_size, self._patience = world_size, patience
        self._listening = listen(local_only)
        self.port: int = self._listening.getsockname()[1]
        """Where it listens."""
        self._members: dict[int, _Member] = {}
        self._strangers: list[Wire] = []
        self._told: list[Message] = []
        self._gone: set[int] = set()
        self._present = set(range(world_size))
        self._first_gone = True
        self._stopping = False
        self._next_warning = patience.warning_s
        self._waited = 0.0
        self._started = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._ending = False
        self._thread = threading.Thread(target=self._work, name="hub", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def close(self, linger_s: float) -> None:
        """Rank 0 leaves: wait for the others to do so, for a while, then let them go on alone."""
        deadline = time.monotonic() + linger_s
        while self._present - {0} and time.monotonic() < deadline:
            time.sleep(0.02)
        self._ending = True
        self._thread.join(2 * _TICK_S)

    def forget(self) -> None:
        """Close the sockets of a forked child, which would keep dead connections open."""
        for wire in [member.wire for member in self._members.values()] + self._strangers:
            wire.close()
        self._listening.close()

    def _work(self) -> None:
        last_look = time.monotonic()
        while not self._ending:
            for key, _ in self._selector.select(_TICK_S):
                if key.fileobj is self._listening:
                    self._accept()
                else:
                    self._read(key.fileobj, key.data)  # type: ignore[arg-type]
            if time.monotonic() - last_look >= _TICK_S:
                last_look = time.monotonic()
                self._look_for_absent()
                self._look_for_hang()
        self._broadcast({"type": "end"})
        for member in self._members.values():
            member.wire.close()
        self._listening.close()
        self._selector.close()

    def _accept(self) -> None:
        connection, _ = self._listening.accept()
        wire = Wire(connection, timeout_s=self._patience.dead_s)
        self._strangers.append(wire)
        self._selector.register(wire, selectors.EVENT_READ, None)

    def _read(self, wire: Wire, rank: int | None) -> None:
        try:
            messages = wire.receive()
            reason = "its process ended without a word: killed, or out of memory"
        except (OSError, ValueError) as error:
            messages, reason = None, _broken(error, self._patience.dead_s)
        if messages is None:
            self._selector.unregister(wire)
            wire.close()
            if rank is None:
                self._strangers.remove(wire)
            else:
                self._present.discard(rank)
            if rank is not None and not self._members[rank].left:
                self._lose(rank, reason, EXIT_RANK_LOST)
            return
        for message in messages:
            if rank is None:
                rank = self._welcome(wire, message)
                if rank is None:
                    return
            else:
                self._hear(rank, message)

    def _welcome(self, wire: Wire, message: Message) -> int | None:
        self._strangers.remove(wire)
        rank = message.get("rank")
        if message.get("token") != self.token or not isinstance(rank, int):
            self._selector.unregister(wire)
            wire.close()
            return None
        self._selector.modify(wire, selectors.EVENT_READ, rank)
        self._members[rank] = _Member(wire)
        for message in self._told:
            self._send(self._members[rank], message)
        return rank

    def _hear(self, rank: int, message: Message) -> None:
        member = self._members[rank]
        member.heard = time.monotonic()
        kind = message["type"]
        if kind == "beat":
            member.state = message["state"]
            self._send(member, {"type": "ok"})
        elif kind == "bye":
            member.left = True
            self._send(member, {"type": "heard"})
        elif kind == "gone":
            member.left = True
            self._lose(rank, message["text"], message["code"])
            self._send(member, {"type": "heard"})
        elif kind == "stop" and not self._stopping:
            self._stopping = True
            self._tell_all({"type": "stop", "rank": rank, "name": message["name"]}, but=rank)

    def _lose(self, rank: int, text: str, code: int) -> None:
        self._gone.add(rank)
        if self._first_gone or rank == 0:
            self._first_gone = False
            now = time.strftime("%H:%M:%S")
            self._tell_all(
                {"type": "gone", "rank": rank, "text": text, "code": code, "at": now}, but=rank
            )

    def _look_for_absent(self) -> None:
        if len(self._members) == self._world_size or self._gone:
            return
        if time.monotonic() - self._started > max(self._patience.dead_s, _COME_UP_S):
            absent = min(set(range(self._world_size)) - set(self._members))
            self._lose(absent, "it has not come up", EXIT_RANK_LOST)

    def _look_for_hang(self) -> None:
        if not self._patience.warning_s or self._gone:
            return
        now = time.monotonic()
        ranks = [
            Rank(rank=rank, silent_s=now - member.heard, **member.state)
            for rank, member in sorted(self._members.items())
            if member.state and not member.left
        ]
        waited = max((rank.stuck_s for rank in ranks), default=0.0)
        if waited < self._waited - _JITTER_S:  # something has moved
            self._next_warning = self._patience.warning_s
        self._waited = waited
        if waited < self._patience.warning_s:
            return
        if waited >= self._patience.hang_s and any(rank.hangs for rank in ranks):
            self._gone.update(self._members)  # once
            self._broadcast({"type": "hang", "table": report(ranks, waited)})
        elif waited >= self._next_warning:
            self._next_warning *= 2
            write_line(report(ranks, waited))

    def _tell_all(self, message: Message, *, but: int) -> None:
        """Tell the others, and those that come later."""
        self._told.append(message)
        self._broadcast(message, but=but)

    def _broadcast(self, message: Message, *, but: int | None = None) -> None:
        for rank in sorted(self._members, reverse=True):  # rank 0, whose end is the hub's, last
            if rank != but:
                self._send(self._members[rank], message)

    def _send(self, member: _Member, message: Message) -> None:
        try:
            member.wire.send(message)
        except OSError:
            return  # the next read of it says that it is gone


def _broken(error: Exception, dead_s: float) -> str:
    if isinstance(error, ConnectionResetError):
        return "its process ended without a word: killed, or out of memory"
    if isinstance(error, socket.timeout | TimeoutError):
        return f"its machine has not answered for {dead_s:g} s"
    return f"the connection to it broke: {error}"
