"""What each context-parallel rank does in a step, as programs for `benchmarks.schedule`.

The order inside a layer is that of `allmem_megatron`: projections; halo of the window out and in;
window attention and the branch's projections; halo of the convolution out and in; the memory's
state in; scan; state out; output projections and MLP. The backward pass goes the other way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.schedule import Await, Compute, Join, Operation, Receive, Send

Piece = tuple[int, int, float]
"""(source, destination, bytes)"""


@dataclass(frozen=True, kw_only=True)
class LayerSeconds:
    """Compute of one layer on one rank. Communication and waiting are not among it."""

    project: float
    """Forward, up to the keys and values that the next ranks' windows need."""
    window: float
    """Forward, from there to the scan: window attention and the branch's projections."""
    scan: float
    after: float
    """Forward, from the end of the scan to the end of the layer."""
    back_after: float
    """Backward of `after`, recomputation of the layer included where it is on."""
    back_scan: float
    back_window: float
    back_project: float

    @property
    def total(self) -> float:
        """Forward and backward."""
        return (
            self.project + self.window + self.scan + self.after
            + self.back_after + self.back_scan + self.back_window + self.back_project
        )  # fmt: skip

    @property
    def scans(self) -> float:
        """The part that the ranks cannot do at the same time."""
        return self.scan + self.back_scan


@dataclass(frozen=True, kw_only=True)
class Messages:
    """What goes from rank to rank in one layer's forward pass, and back in its backward pass."""

    window: Sequence[Piece]
    conv: Sequence[Piece]
    state: Sequence[float]
    """Bytes of the memory's state over each border; not read in mode a2a."""
    heads_s: float = 0.0
    """Mode a2a: seconds of the all-to-all of q, k, v and rates; 0 in mode wavefront."""
    tokens_s: float = 0.0
    """Mode a2a: seconds of the all-to-all of the outputs."""


def layer_forward(
    rank: int, layer: int, seconds: LayerSeconds, messages: Messages
) -> Iterator[Operation]:
    """A layer of the student's forward pass."""
    yield Compute(f"forward {layer}", seconds.project)
    yield from _pieces(("window", layer), rank, messages.window)
    yield Compute(f"forward {layer}", seconds.window)
    yield from _pieces(("conv", layer), rank, messages.conv)
    if messages.heads_s:
        yield from _meet(("heads", layer), messages.heads_s)
    elif rank and messages.state:
        yield Receive(("state", layer), rank - 1)
    yield Compute(f"scan {layer}", seconds.scan)
    if messages.heads_s:
        yield from _meet(("tokens", layer), messages.tokens_s)
    elif rank < len(messages.state):
        yield Send(("state", layer), rank + 1, messages.state[rank])
    yield Compute(f"forward {layer}", seconds.after)


def layer_backward(
    rank: int, layer: int, seconds: LayerSeconds, messages: Messages
) -> Iterator[Operation]:
    """A layer of the student's backward pass."""
    yield Compute(f"backward {layer}", seconds.back_after)
    if messages.heads_s:
        yield from _meet(("grad tokens", layer), messages.tokens_s)
    elif rank < len(messages.state):
        yield Receive(("grad state", layer), rank + 1)
    yield Compute(f"back scan {layer}", seconds.back_scan)
    if messages.heads_s:
        yield from _meet(("grad heads", layer), messages.heads_s)
    elif rank and messages.state:
        yield Send(("grad state", layer), rank - 1, messages.state[rank - 1])
    yield from _pieces(("grad conv", layer), rank, _turned(messages.conv))
    yield Compute(f"backward {layer}", seconds.back_window)
    yield from _pieces(("grad window", layer), rank, _turned(messages.window))
    yield Compute(f"backward {layer}", seconds.back_project)


def student_programs(
    seconds: Sequence[Sequence[LayerSeconds]], messages: Messages
) -> list[list[Operation]]:
    """Forward and backward of the student; `seconds[rank][layer]` may differ."""
    programs: list[list[Operation]] = []
    for rank, own in enumerate(seconds):
        program: list[Operation] = []
        for layer, cost in enumerate(own):
            program.extend(layer_forward(rank, layer, cost, messages))
        for layer, cost in reversed(list(enumerate(own))):
            program.extend(layer_backward(rank, layer, cost, messages))
        programs.append(program)
    return programs


def gathered(key: object, rank: int, size: int, num_bytes: float) -> Iterator[Operation]:
    """Every rank's part goes to all ranks after it: the teacher's keys and values."""
    for dest in range(rank + 1, size):
        yield Send(key, dest, num_bytes)
    for source in reversed(range(rank)):
        yield Receive(key, source)


def _meet(key: object, seconds: float) -> Iterator[Operation]:
    yield Join(key)
    yield Await(key, seconds)


def _pieces(key: object, rank: int, pieces: Sequence[Piece]) -> Iterator[Operation]:
    """This rank's sends, then its receives."""
    for source, dest, num_bytes in pieces:
        if source == rank:
            yield Send(key, dest, num_bytes)
    for source, dest, _ in pieces:
        if dest == rank:
            yield Receive(key, source)


def _turned(pieces: Sequence[Piece]) -> list[Piece]:
    return [(dest, source, num_bytes) for source, dest, num_bytes in pieces]
