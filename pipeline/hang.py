"""Who waits for whom: from what each rank does to the one that the others wait for. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

SILENT_S = 15.0
"""Seconds without a word after which a rank counts as stopped (its connection still stands)."""


@dataclass(frozen=True, kw_only=True)
class Rank:
    """What a rank does, as it said last (`pipeline.watchdog.state`)."""

    rank: int
    """Which."""
    silent_s: float = 0.0
    """Seconds since it said so."""
    watching: bool = False
    """Whether it is in a part of the run in which waiting long means that something is wrong."""
    step: int | None = None
    """Training step, 1 for the first."""
    call: str | None = None
    """Communication that it is in: `all_reduce float32[1024]`; None while it computes."""
    place: str = ""
    """File and line of this project where the call, or the last one, was made."""
    group: str = ""
    """Name of the call's process group, the same on all its ranks."""
    number: int = 0
    """Which collective on that group the call is, 1 for the first; 0 for point to point."""
    members: Sequence[int] = ()
    """Ranks of the group."""
    peer: int | None = None
    """The other rank of a point-to-point call."""
    quiet_s: float = 0.0
    """Seconds since it last entered or left a call or a step."""
    last: str = ""
    """The last call that it left."""
    enqueued: bool = False
    """That call was only handed to the GPU (NCCL) and may not be done."""
    counts: dict[str, int] = field(default_factory=dict)
    """Collectives entered so far, by group."""

    @property
    def silent(self) -> bool:
        """Stopped, or held up inside one long call of a library."""
        return self.silent_s > SILENT_S

    @property
    def hangs(self) -> bool:
        """Whether it is certainly not computing: in a call, or silent."""
        return self.watching and (self.call is not None or self.silent)

    @property
    def stuck_s(self) -> float:
        """Seconds for which it has made no progress, where that may be a hang; else 0."""
        may_hang = self.hangs or (self.watching and self.enqueued)
        return self.quiet_s + self.silent_s if may_hang else 0.0

    def doing(self) -> str:
        """In words, without for how long."""
        step = "" if self.step is None else f", step {self.step}"
        if self.silent:
            return f"stopped or held up inside one call (not heard of){step}"
        if self.call is not None:
            return f"in {self.call} {_over(self)}({self.place}){step}"
        where = f" ({self.place})" if self.place else ""
        handed = ", which may still be on the GPU" if self.enqueued else ""
        after = f", after {self.last}{where}{handed}" if self.last else ""
        return f"computing{step}{after}"


def _over(rank: Rank) -> str:
    if rank.peer is not None:
        return f"with rank {rank.peer} "
    return f"over {listed(rank.members)} " if rank.members else ""


def listed(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 0-2 and 5`."""
    numbers = sorted(set(ranks))
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    words = []
    for first, last in spans:
        near = last - first < 2
        words += [str(n) for n in range(first, last + 1)] if near else [f"{first}-{last}"]
    text = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
    return f"rank{'' if len(numbers) == 1 else 's'} {text}"


def report(ranks: Sequence[Rank], waited_s: float) -> str:
    """A table of what all ranks do, ranks that do the same in one line, and who is waited for."""
    groups: dict[str, list[Rank]] = {}
    for rank in ranks:
        groups.setdefault(rank.doing(), []).append(rank)
    lines = [f"no progress for {waited_s:.0f} s:"]
    for doing, same in groups.items():
        least = min(rank.quiet_s + rank.silent_s for rank in same)
        lines.append(f"  {listed(r.rank for r in same)}: {doing}, for {least:.0f} s")
    lines.append(f"  {verdict(ranks)}")
    return "\n".join(lines)


def verdict(ranks: Sequence[Rank]) -> str:
    """Who holds the others up, in a sentence."""
    silent = [rank.rank for rank in ranks if rank.silent]
    if silent:
        return f"the others wait for {listed(silent)}"
    waits = waits_for(ranks)
    awaited = set().union(*waits.values()) if waits else set()
    if ends := {rank for rank in awaited if not waits.get(rank)}:
        return f"the others wait for {listed(ends)}"
    if awaited:
        return f"{listed(awaited)} wait for each other"
    if odd := _mismatched(ranks):
        return odd
    if behind := _behind(ranks):
        return f"{listed(behind)} entered fewer collectives than the others"
    return "all have made the same calls: look at the network, the GPUs and the slowest machine"


def waits_for(ranks: Sequence[Rank]) -> dict[int, set[int]]:
    """For each rank in a call: the ranks that have not come to it."""
    known = {rank.rank: rank for rank in ranks}
    waits: dict[int, set[int]] = {}
    for rank in ranks:
        if rank.call is None:
            continue
        if rank.peer is not None:
            waits[rank.rank] = {rank.peer}
        else:
            late = {
                other
                for other in rank.members
                if other in known and known[other].counts.get(rank.group, 0) < rank.number
            }
            if late:
                waits[rank.rank] = late
    return waits


def _mismatched(ranks: Sequence[Rank]) -> str:
    """Ranks that make another call than the rest at the same place of a group's order."""
    turns: dict[tuple[str, int], dict[str, list[int]]] = {}
    for rank in ranks:
        if rank.call is not None and rank.number:
            calls = turns.setdefault((rank.group, rank.number), {})
            calls.setdefault(rank.call, []).append(rank.rank)
    for calls in turns.values():
        if len(calls) > 1:
            odd = min(calls.values(), key=len)
            return f"{listed(odd)} called something else than the others of the group"
    return ""


def _behind(ranks: Sequence[Rank]) -> set[int]:
    """Ranks that have entered fewer collectives on a group than another rank of it."""
    behind: set[int] = set()
    for group in {group for rank in ranks for group in rank.counts}:
        entered = {r.rank: r.counts[group] for r in ranks if group in r.counts}
        most = max(entered.values())
        behind |= {rank for rank, count in entered.items() if count < most}
    return behind
