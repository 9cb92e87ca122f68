"""The formulas of costs give the paper's numbers."""

import pytest
import torch

from kernels.ssd import ssd_scan
from kernels.ttt_memory import FastWeights, memory_scan
from pipeline.costs import (
    MixerShape,
    cache_bytes,
    convolution_tail_bytes,
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


@pytest.mark.parametrize(("num_tokens", "pending"), [(16, 0), (21, 5), (5, 5)])
def test_memory_bytes_are_those_of_the_real_state(num_tokens: int, pending: int) -> None:
    shape = MixerShape(
        hidden_size=64,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        memory_size=24,
        memory_heads=3,
        window_size=16,
        num_sinks=2,
        chunk_size=8,
    )
    heads, width = shape.memory_heads, shape.memory_head_dim
    hidden = width * shape.expansion
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, num_tokens, heads, width, generator=generator)
    eta = torch.rand(1, num_tokens, heads, 3, generator=generator)
    mu = torch.rand(1, num_tokens, heads, generator=generator)
    weights = FastWeights(
        gate=torch.randn(heads, hidden, width),
        up=torch.randn(heads, hidden, width),
        down=torch.randn(heads, width, hidden),
    )
    _, state = memory_scan(q, k, v, eta, mu, weights, chunk_size=shape.chunk_size)
    counter = 8  # the int64 length of the unfinished chunk
    expected = fast_weight_bytes(shape) + pending_bytes(shape, pending, element_bytes=4)
    assert state.num_bytes == expected + counter


def test_recurrent_bytes_are_those_of_the_real_state() -> None:
    shape = MixerShape(
        hidden_size=64,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        memory_size=24,
        memory_heads=3,
        state_size=4,
        window_size=16,
        num_sinks=2,
        chunk_size=8,
    )
    x, b = torch.randn(1, 10, 3, 8), torch.randn(1, 10, 3, 4)
    dt = torch.rand(1, 10, 3)
    _, state = ssd_scan(x, dt, torch.zeros(3), b, b, chunk_size=8)
    attention = key_value_bytes(shape, 16 + 2)
    tails = convolution_tail_bytes("mamba2", shape)
    expected = attention + tails + state.numel() * state.element_size()
    assert cache_bytes("mamba2", shape, 1000) == expected
