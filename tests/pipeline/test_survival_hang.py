"""The watchdog's table says what every rank does and who is waited for."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.hang import Rank, listed, report, verdict


def rank(index: int, **values: Any) -> Rank:
    return Rank(rank=index, **{"watching": True, "step": 12, **values})


def reducing(index: int, turn: int = 7, **values: Any) -> Rank:
    call = values.pop("call", "all_reduce float32[8]")
    members = values.pop("members", (0, 1, 2, 3))
    group = values.pop("group", "world")
    counts = {group: turn, **values.pop("counts", {})}
    return rank(
        index, call=call, place="pipeline/engine.py:210", group=group, number=turn,
        members=members, counts=counts, quiet_s=310.0, **values,
    )  # fmt: skip


def computing(index: int, turn: int = 6, **values: Any) -> Rank:
    return rank(index, **{"counts": {"world": turn}, "quiet_s": 311.0, **values})


def receiving(index: int, peer: int, **values: Any) -> Rank:
    call = {"call": "wait for irecv float32[2, 4]", "place": "allmem_megatron/exchange.py:99"}
    return rank(index, **{**call, "peer": peer, "quiet_s": 310.0, **values})


def test_ranks_that_do_the_same_share_a_line_and_the_computing_one_is_named():
    ranks = [reducing(0), computing(1, last="all_gather float32[4]", place="a.py:3"), reducing(2)]
    assert report([*ranks, reducing(3)], 310.4).splitlines() == [
        "no progress for 310 s:",
        "  ranks 0, 2 and 3: in all_reduce float32[8] over ranks 0-3 (pipeline/engine.py:210), "
        "step 12, for 310 s",
        "  rank 1: computing, step 12, after all_gather float32[4] (a.py:3), for 311 s",
        "  the others wait for rank 1",
    ]


CASES: dict[str, tuple[list[Rank], str]] = {
    "one computes": ([reducing(0), reducing(1), computing(2)], "the others wait for rank 2"),
    "one is frozen": (
        [reducing(0), reducing(1), computing(2, turn=7, silent_s=40.0)],
        "the others wait for rank 2",
    ),
    "a chain of receivers": (
        [computing(0), receiving(1, 0), receiving(2, 1), receiving(3, 2)],
        "the others wait for rank 0",
    ),
    "a receiver whose sender went into a collective": (
        [reducing(0, members=(0, 1)), receiving(1, 0)],
        "ranks 0 and 1 wait for each other",
    ),
    "two groups": (
        [
            reducing(0, members=(0, 1), group="a"),
            receiving(1, 3, counts={"a": 6}),
            reducing(2, members=(2, 3), group="b"),
            computing(3, counts={"b": 6}),
        ],
        "the others wait for rank 3",
    ),
    "another call at the same turn": (
        [reducing(0), reducing(1), reducing(2, call="all_gather float32[8]")],
        "rank 2 called something else than the others of the group",
    ),
    "another shape at the same turn": (
        [reducing(0), reducing(1, call="all_reduce float32[9]"), reducing(2)],
        "rank 1 called something else than the others of the group",
    ),
    "work handed to GPUs": (
        [computing(0, turn=41, enqueued=True), computing(1, turn=42, enqueued=True)],
        "rank 0 entered fewer collectives than the others",
    ),
    "the network": (
        [reducing(0), reducing(1), reducing(2)],
        "all have made the same calls: look at the network, the GPUs and the slowest machine",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_verdict(name: str):
    ranks, expected = CASES[name]
    assert verdict(ranks) == expected


def test_a_rank_that_computes_alone_is_no_hang():
    assert computing(0).stuck_s == 0.0
    assert computing(0, enqueued=True).stuck_s > 300
    assert not computing(0, enqueued=True).hangs
    assert reducing(0).hangs
    assert not reducing(0, watching=False).hangs


def test_ranks_are_listed_in_spans():
    assert listed([3]) == "rank 3"
    assert listed([2, 0]) == "ranks 0 and 2"
    assert listed([0, 1, 2, 3, 7, 9, 10]) == "ranks 0-3, 7, 9 and 10"
