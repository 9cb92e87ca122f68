"""Counts of the speed benchmarks: pairs, shapes, FLOPs, and the targets that need no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import floors, targets
from benchmarks.measure import Ceilings, Work
from benchmarks.mixer_case import mixer_leaves
from benchmarks.model_cases import build
from benchmarks.shapes import SHAPES
from pipeline.costs import flops_per_token


@pytest.mark.parametrize(("tokens", "window", "sinks"), [(5, 9, 2), (30, 4, 0), (30, 7, 3)])
def test_pairs_are_those_of_the_mask(tokens: int, window: int, sinks: int) -> None:
    t, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    seen = (j <= t) & ((t - j < window) | (j < sinks))
    assert floors.seen_pairs(tokens, window, sinks) == int(seen.sum())


def test_many_sinks_before_a_short_text_count_once() -> None:
    t, j = torch.arange(12)[:, None], torch.arange(12)[None, :]
    seen = (j <= t) & ((t - j < 3) | (j < 20))
    assert floors.seen_pairs(12, 3, 20) == int(seen.sum())


def test_a_floor_is_the_longer_of_arithmetic_and_movement() -> None:
    ceilings = Ceilings(flops=100.0, bandwidth=10.0, dtype="float32")
    assert Work(flops=500.0, bytes=20.0).floor(ceilings) == (5.0, "FLOPs")
    assert Work(flops=100.0, bytes=20.0).floor(ceilings) == (2.0, "bytes")


@pytest.mark.parametrize("backward", [False, True])
def test_the_memory_costs_what_the_cost_formulas_say(backward: bool) -> None:
    shape = SHAPES["Qwen3-1.7B"]
    work = floors.memory_scan(shape, 2, 1000, 2, backward=backward)
    assert work.flops == 2000 * 6 * shape.mixer.fast_weight_elements * (3 if backward else 1)
    streams = 512 * 2 * 4 + 8 * 4 * 4  # q, k, v, out in bfloat16; rates in float32
    assert floors.memory_scan(shape, 1, 1, 2, backward=False).bytes == streams


@pytest.mark.parametrize("name", ["swa", "allmem", "mamba2"])
def test_weights_that_a_token_reads_are_those_of_the_model(name: str) -> None:
    shape = SHAPES["tiny"]
    model = build(shape, name, torch.device("cpu"), torch.float32)
    small = ("norm", "conv", "bias", "alpha", "a_log", "d_skip")  # vectors, and 4 taps a channel
    real = sum(
        p.numel() for n, p in model.named_parameters() if not any(part in n for part in small)
    )
    # alpha is counted with the projections: 1 of the 41 numbers for each channel
    counted = shape.num_weights(name) - (shape.num_layers * shape.hidden_size * (name != "swa"))
    assert counted == real


def test_the_mixer_of_the_benchmark_has_the_weights_that_its_floor_counts() -> None:
    shape = SHAPES["small"]
    leaves = mixer_leaves(shape, torch.randn, torch.float32)
    matrices = sum(x.numel() for name, x in leaves.items() if x.dim() > 1 and "conv" not in name)
    attention = 2 * shape.hidden_size * shape.head_dim * (shape.num_heads + shape.num_kv_heads)
    assert matrices == attention + shape.branch_weights - shape.hidden_size  # alpha is a vector


def test_the_gap_of_two_floors_is_what_the_sizes_say() -> None:
    shape = SHAPES["Qwen3-1.7B"]
    full, ours = (floors.prefill(shape, name, 1, 131072, 2).flops for name in ("full", "allmem"))
    layer = flops_per_token("full", shape.mixer, 131072) + 6 * 2048 * 6144
    head = 2 * 2048 * 151936
    assert full == pytest.approx(28 * 131072 * layer + head)
    assert 4 < full / ours < 5


def test_counted_targets_are_met() -> None:
    found = {target.name: target for target in targets.counted_targets()}
    assert len(found) == 3
    assert {target.status for target in found.values()} == {"met"}


def test_a_target_without_a_measurement_is_not_measured() -> None:
    found = targets.speed_targets([], [], "")
    assert {target.status for target in found} == {"not measured"}
    assert "| not measured |" in targets.table(found)


def _row(**fields: Any) -> dict[str, Any]:
    row = {"status": "measured", "shape": "Qwen3-1.7B", "batch": 1, "tokens": 131072}
    return {**row, "seconds": 1.0, **fields}


def test_a_smaller_batch_is_named_where_eight_rows_do_not_fit() -> None:
    models = [
        _row(op="decode", mixer="full", batch=4, tokens_per_s=100.0),
        _row(op="decode", mixer="allmem", batch=4, tokens_per_s=800.0),
    ]
    decode = targets.speed_targets([], models, "GPU")[0]
    assert (decode.status, decode.found) == (
        "not measured",
        "8.00 × at batch 4, as 8 does not fit",
    )


def test_targets_are_met_or_missed_by_their_numbers() -> None:
    models = [
        _row(op="decode", mixer="full", batch=8, tokens_per_s=100.0),
        _row(op="decode", mixer="allmem", batch=8, tokens_per_s=300.0, seconds=2.0),
        _row(op="decode", mixer="allmem", batch=8, tokens_per_s=1100.0),  # as a CUDA graph
        _row(op="prefill", mixer="full", tokens_per_s=100.0),
        _row(op="prefill", mixer="allmem", tokens_per_s=290.0),
        _row(op="training, memory trained", mixer="swa", tokens=24576, seconds=1.0),
        _row(op="training, memory trained", mixer="allmem", tokens=24576, seconds=1.2),
        {**_row(op="decode", mixer="allmem", cache_bytes=7), "status": "refused"},
    ]
    found = {target.name: target for target in targets.speed_targets([], models, "GPU")}
    by_status = {name.split(",")[0]: target.status for name, target in found.items()}
    assert by_status["decode at 128k"] == "met"
    assert by_status["prefill at 128k over full attention"] == "missed"
    assert by_status["the memory's share of a training step at 24k"] == "missed"
    assert by_status["1 M tokens"] == "not measured"  # its check had failed
