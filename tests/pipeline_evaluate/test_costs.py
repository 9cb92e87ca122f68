"""The formulas of costs give the paper's numbers."""

import pytest

from pipeline.costs import (
    MixerShape,
    cache_bytes,
    fast_weight_bytes,
    flops_per_token,
    flops_ratio,
    key_value_bytes,
    pending_bytes,
)

MIB = 2**20


def qwen3(hidden_size: int, num_layers: int = 28) -> MixerShape:
    return MixerShape(
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        window_size=4096,
        num_sinks=128,
        chunk_size=2048,
    )


@pytest.mark.parametrize(("hidden_size", "ratio"), [(1024, 0.096), (2048, 0.124)])
def test_flops_against_full_attention_at_128k(hidden_size: int, ratio: float) -> None:
    assert flops_ratio("allmem", qwen3(hidden_size), 131072) == pytest.approx(ratio, abs=5e-4)


def test_flops_are_the_sum_of_the_formulas_terms() -> None:
    terms = [
        4 * 1024 * 128 * (16 + 8),
        4 * 16 * 128 * (4096 + 128),
        2 * 1024 * (4 * 512 + 41),
        18 * 8 * 64 * 128,
    ]
    assert flops_per_token("allmem", qwen3(1024), 131072) == sum(terms)
    assert flops_per_token("swa", qwen3(1024), 131072) == sum(terms[:2])


def test_a_window_costs_no_more_than_full_attention_on_short_input() -> None:
    shape = qwen3(1024)
    assert flops_per_token("swa", shape, 512) == flops_per_token("full", shape, 512)


def test_decode_state_is_that_of_the_specification() -> None:
    shape = qwen3(1024)
    window = key_value_bytes(shape, 4096 + 128)
    full = cache_bytes("full", shape, 131072, layers=False)
    assert window == 16.5 * MIB
    assert fast_weight_bytes(shape) == 1.5 * MIB
    assert pending_bytes(shape, 2048) / MIB == pytest.approx(4.1, abs=0.05)
    assert full == 512 * MIB
    assert full / cache_bytes("allmem", shape, 131072, layers=False) == pytest.approx(23, abs=0.5)


def test_only_full_attention_grows_with_length() -> None:
    shape = qwen3(1024)
    for mixer in ("swa", "mamba2", "allmem"):
        at_8k = cache_bytes(mixer, shape, 8192)
        assert cache_bytes(mixer, shape, 131072) == at_8k
    assert cache_bytes("full", shape, 16384) == 2 * cache_bytes("full", shape, 8192)


def test_all_layers_count() -> None:
    shape = qwen3(1024)
    for mixer in ("full", "swa", "mamba2", "allmem"):
        one = cache_bytes(mixer, shape, 5000, layers=False)
        assert cache_bytes(mixer, shape, 5000) == 28 * one


def test_a_wider_mamba_state_costs_more() -> None:
    narrow, wide = (
        MixerShape(
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            memory_size=64,
            memory_heads=2,
            state_size=size,
            window_size=16,
            num_sinks=2,
            chunk_size=8,
        )
        for size in (None, 64)
    )
    extra = cache_bytes("mamba2", wide, 100) - cache_bytes("mamba2", narrow, 100)
    state = 64 * 32 * 4  # d, N - d_h more columns, float32
    tails = 2 * 2 * 32 * 3 * 2  # B and C, heads, N - d_h more columns, 3 tokens, bfloat16
    assert extra == 2 * (state + tails)


def test_an_unknown_mixer_is_refused() -> None:
    with pytest.raises(ValueError, match="mixer='rwkv'"):
        cache_bytes("rwkv", qwen3(1024), 10)
