"""The simulator of ranks against schedules that can be worked out by hand."""

from __future__ import annotations

import pytest

from benchmarks.schedule import Await, Compute, Join, Link, Receive, Send, simulate

INSTANT = Link(bytes_per_s=1e30, latency_s=0.0)


def wavefront(ranks: int, layers: int, before: float, scan: float, after: float):
    return [
        [
            operation
            for layer in range(layers)
            for operation in (
                Compute("before", before),
                *([Receive(layer, rank - 1)] if rank else []),
                Compute("scan", scan),
                *([Send(layer, rank + 1, 0)] if rank + 1 < ranks else []),
                Compute("after", after),
            )
        ]
        for rank in range(ranks)
    ]


@pytest.mark.parametrize(("ranks", "layers"), [(1, 3), (2, 5), (4, 2), (8, 28)])
def test_wavefront_takes_the_layers_and_one_scan_for_every_further_rank(ranks, layers):
    line = simulate(wavefront(ranks, layers, 2.0, 3.0, 1.0), INSTANT)
    assert line.makespan == pytest.approx(layers * 6.0 + (ranks - 1) * 3.0)
    assert line.efficiency == pytest.approx(layers * 6.0 / line.makespan)
    whole = simulate(wavefront(ranks, layers, 0.0, 6.0, 0.0), INSTANT)
    assert whole.efficiency == pytest.approx(layers / (layers + ranks - 1))


def test_messages_share_a_link_and_take_their_latency():
    programs = [
        [Send("a", 1, 10.0), Send("b", 1, 10.0), Compute("c", 1.0)],
        [Receive("a", 0), Receive("b", 0)],
    ]
    line = simulate(programs, Link(bytes_per_s=5.0, latency_s=0.5))
    assert [span.stop for span in line.spans[1]] == pytest.approx([2.5, 4.5])
    assert line.spans[0][0].start == 0.0  # a send does not hold up its rank


def test_a_collective_ends_after_its_last_rank():
    programs = [
        [Join("x"), Compute("c", 1.0), Await("x", 0.5)],
        [Compute("c", 3.0), Join("x"), Await("x", 0.5)],
    ]
    line = simulate(programs, INSTANT)
    assert [line.spans[rank][-1].stop for rank in (0, 1)] == pytest.approx([3.5, 3.5])


def test_a_receive_without_a_send_is_an_error():
    with pytest.raises(ValueError, match="rank 0 waits at Receive"):
        simulate([[Receive("a", 1)], [Compute("c", 1.0)]], INSTANT)
