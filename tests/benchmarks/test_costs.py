"""Costs and message sizes of the simulation against the pipeline's formulas and the library."""

from __future__ import annotations

from dataclasses import astuple

import pytest

from allmem_megatron.config import MemoryConfig, MixerSettings
from benchmarks.costs import SHAPES, Setting, TokenFlops, layer_seconds, messages
from benchmarks.wavefront_simulation import run
from pipeline.flops import layer_flops


@pytest.mark.parametrize("shape", list(SHAPES))
def test_flops_of_the_parts_sum_to_those_of_the_pipeline(shape):
    base, memory = SHAPES[shape], MemoryConfig()
    settings = MixerSettings(mode="allmem", window_size=4096, num_sinks=128, chunk_size=2048)
    whole, _ = layer_flops(base, memory, settings, 1 << 20)
    parts = TokenFlops.of(base, memory, 4096, 128)
    assert sum(astuple(parts)) == pytest.approx(whole, rel=5e-3)  # the first window is not full


def test_messages_of_a_layer_have_the_sizes_of_the_paper():
    base = SHAPES["Qwen3-0.6B"]
    sizes = messages(base, 8, "wavefront", Setting(tokens=8 * 4096, chunk_size=2048))
    assert list(sizes.state) == [1.5 * 2**20] * 7  # W and M, no unfinished chunk
    odd = messages(base, 8, "wavefront", Setting(tokens=8 * 4000, chunk_size=2048))
    pending = [4000 * rank % 2048 for rank in range(1, 8)]
    token = 2 * 512 * 2 + 8 * 4 * 4
    assert list(odd.state) == [1.5 * 2**20 + tokens * token for tokens in pending]
    per_rank = dict.fromkeys(range(8), 0.0)
    for _, dest, size in odd.window:
        per_rank[dest] += size
    key_value = 2 * 8 * 128 * 2
    # the whole shard before; two ranks further on the window's rest, and sinks outside of it
    assert per_rank[1] == 4000 * key_value
    assert per_rank[3] == (4095 + 128) * key_value


def test_simulated_wavefront_keeps_within_its_bound():
    setting = Setting(tokens=1 << 17)
    row = run("Qwen3-0.6B", 8, "wavefront", setting)
    assert row["layer_bound"] < row["efficiency"] <= row["scan_bound"]
    a2a = run("Qwen3-0.6B", 8, "a2a", setting)
    assert a2a["efficiency"] > 0.9
    # every rank goes through all chunks of the sequence
    assert layer_seconds(SHAPES["Qwen3-0.6B"], 8, "a2a", setting).scan == pytest.approx(64 * 2e-4)
