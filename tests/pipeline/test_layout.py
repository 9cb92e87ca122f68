"""Layouts that do not fit are refused before anything runs, with the nearest that does."""

from __future__ import annotations

import pytest
import torch

from pipeline.config import compose
from pipeline.distributed import Ranks, on_some
from pipeline.layout import check_layout
from pipeline.models import base_config


def ranks(world_size: int, rank: int = 0) -> Ranks:
    device = torch.device("cpu")
    return Ranks(rank=rank, local_rank=rank, world_size=world_size, device=device)


def check(words: list[str], world_size: int) -> None:
    config = compose(["recipe=tiny", *words])
    parallel = config.parallel
    layout = ranks(world_size).with_layout(tp=parallel.tp, cp=parallel.cp)
    check_layout(config, base_config(config), layout)


@pytest.mark.parametrize(
    ("words", "world_size", "message"),
    [
        (
            "parallel.tp=4",
            4,
            r"num_kv_heads=2 does not split over parallel\.tp=4 .* parallel\.tp=2",
        ),
        ("parallel.cp=3 pretrain.seq_length=100", 3, r"set pretrain\.seq_length=102"),
        ("parallel.cp=3", 3, r"pretrain would train on 256 tokens .* set data\.seq_length=258"),
        (
            "parallel.tp=2 parallel.sp=true data.seq_length=255",
            2,
            r"x parallel\.tp \(parallel\.sp=true\) = 2 ranks; set data\.seq_length=256",
        ),
        (
            "parallel.tp=2 parallel.cp=2 parallel.cp_mode=a2a",
            4,
            r"some of the 1 memory heads .* set parallel\.cp_mode=wavefront or parallel\.cp=1",
        ),
        ("parallel.tp=2", 6, r"batch_size=4 does not split over 3 data-parallel ranks"),
        ("parallel.tp=2 parallel.cp=2", 6, r"parallel\.cp=2 do not divide the 6 rank\(s\)"),
    ],
)
def test_a_layout_that_does_not_fit_names_the_mend(words: str, world_size: int, message: str):
    with pytest.raises(ValueError, match=message):
        check(words.split(), world_size)


def test_layouts_that_fit_pass():
    check([], 4)
    check(["parallel.tp=2", "parallel.sp=true", "parallel.cp=2"], 8)
    check(["parallel.cp=2", "parallel.cp_mode=a2a"], 2)
    # the base alone has no memory heads to split
    check(["parallel.cp=2", "parallel.tp=2", "parallel.cp_mode=a2a", "stage=pretrain"], 4)


def test_ranks_know_their_place_in_megatrons_order():
    places = [ranks(12, rank).with_layout(tp=2, cp=3) for rank in range(12)]
    assert [place.tp_rank for place in places] == [0, 1] * 6
    assert [place.cp_rank for place in places] == [0, 0, 1, 1, 2, 2] * 2
    assert [place.dp_rank for place in places] == [0] * 6 + [1] * 6
    assert [place.replica for place in places] == [n // 2 for n in range(12)]
    assert {(place.dp_size, place.num_replicas) for place in places} == {(2, 6)}


def test_on_some_gives_results_and_errors():
    assert on_some(ranks(1), True, lambda: 7) == 7
    assert on_some(ranks(1), False, lambda: 7) is None
    with pytest.raises(ValueError, match="seven"):
        on_some(ranks(1), True, lambda: _fail())


def _fail() -> None:
    raise ValueError("seven")
