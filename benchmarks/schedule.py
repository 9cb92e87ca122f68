"""A discrete-event simulation of ranks that compute, send, receive and meet.

Every rank runs its own list of operations, one after the other. A send does not wait; a receive
waits until the message is there. A rank's link sends one message at a time, in the order in which
they were handed over, and takes in one at a time, in the order in which they begin to come (on a
fabric that has room for the others until then). Times are in seconds, sizes in bytes.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Compute(NamedTuple):
    """Keeps the rank busy."""

    name: str
    seconds: float


class Send(NamedTuple):
    """Hands a message to the rank's link and goes on."""

    key: Hashable
    dest: int
    num_bytes: float


class Receive(NamedTuple):
    """Waits for a message."""

    key: Hashable
    source: int


class Join(NamedTuple):
    """Tells the others that this rank has come to a collective, and goes on."""

    key: Hashable


class Await(NamedTuple):
    """Waits until all ranks have joined the collective, and `seconds` more after the last one."""

    key: Hashable
    seconds: float


Operation = Compute | Send | Receive | Join | Await


@dataclass(frozen=True)
class Link:
    """What lies between two ranks."""

    bytes_per_s: float
    latency_s: float


class Span(NamedTuple):
    """What a rank did from `start` to `stop`; name "wait …" where it waited."""

    name: str
    start: float
    stop: float


@dataclass
class Timeline:
    """The result: what every rank did."""

    spans: list[list[Span]] = field(default_factory=list)

    @property
    def makespan(self) -> float:
        """Seconds from the start until the last rank is done."""
        return max((spans[-1].stop for spans in self.spans if spans), default=0.0)

    def busy(self, rank: int) -> float:
        """Seconds in which a rank computed."""
        return sum(s.stop - s.start for s in self.spans[rank] if not s.name.startswith("wait"))

    @property
    def efficiency(self) -> float:
        """Share of all ranks' time in which they computed."""
        total = sum(self.busy(rank) for rank in range(len(self.spans)))
        return total / (len(self.spans) * self.makespan)


class _Coming(NamedTuple):
    """A message whose first byte comes to its destination."""

    key: Hashable
    source: int
    seconds: float


def simulate(programs: Sequence[Sequence[Operation]], link: Link) -> Timeline:
    """Runs every rank's program.

    Args:
        programs: of every rank.
        link: bandwidth of a rank in each direction, and latency of a message.

    Raises:
        ValueError: the programs wait for each other, or for what nobody sends.
    """
    size = len(programs)
    at = [0] * size  # next operation
    timeline = Timeline([[] for _ in range(size)])
    out_free, in_free = [0.0] * size, [0.0] * size
    counter = itertools.count()
    arrival: dict[tuple[Hashable, int, int], list[float]] = defaultdict(list)
    joined: dict[Hashable, list[float]] = defaultdict(list)
    waiting: dict[Hashable, list[tuple[float, int]]] = defaultdict(list)
    # ranks in the order of their clocks, and messages by when their first byte comes
    ready: list[tuple[float, int, int, _Coming | None]] = []

    def push(when: float, rank: int, coming: _Coming | None = None) -> None:
        heapq.heappush(ready, (when, next(counter), rank, coming))

    for rank in range(size):
        push(0.0, rank)

    def wait(rank: int, what: Hashable, since: float, until: float) -> None:
        if until > since:
            timeline.spans[rank].append(Span(f"wait {what}", since, until))
        at[rank] += 1
        push(max(since, until), rank)

    while ready:
        now, _, rank, coming = heapq.heappop(ready)
        if coming is not None:
            in_free[rank] = max(now, in_free[rank]) + coming.seconds
            message = (coming.key, coming.source, rank)
            arrival[message].append(in_free[rank])
            for since, other in waiting.pop(message, ()):
                wait(other, coming.key, since, arrival[message].pop(0))
            continue
        if at[rank] == len(programs[rank]):
            continue
        match programs[rank][at[rank]]:
            case Compute(name, seconds):
                timeline.spans[rank].append(Span(name, now, now + seconds))
                at[rank] += 1
                push(now + seconds, rank)
            case Send(key, dest, num_bytes):
                start, seconds = max(now, out_free[rank]), num_bytes / link.bytes_per_s
                out_free[rank] = start + seconds
                push(start + link.latency_s, dest, _Coming(key, rank, seconds))
                at[rank] += 1
                push(now, rank)
            case Receive(key, source):
                message = (key, source, rank)
                if arrival[message]:
                    wait(rank, key, now, arrival[message].pop(0))
                else:
                    waiting[message].append((now, rank))
            case Join(key):
                joined[key].append(now)
                at[rank] += 1
                push(now, rank)
                if len(joined[key]) == size:
                    for since, other in waiting.pop(("all", key), ()):
                        # `Await` of the waiting rank says how long it takes
                        seconds = programs[other][at[other]].seconds
                        wait(other, key, since, now + seconds)
            case Await(key, seconds):
                if len(joined[key]) == size:
                    wait(rank, key, now, max(joined[key]) + seconds)
                else:
                    waiting["all", key].append((now, rank))
    stuck = [rank for rank in range(size) if at[rank] < len(programs[rank])]
    if stuck:
        rank = stuck[0]
        raise ValueError(
            f"ranks {stuck[:8]} never end; rank {rank} waits at {programs[rank][at[rank]]}: let"
            " every receive have its send and every collective all its ranks"
        )
    return timeline
