"""FLOP counts against the parameters that do the work."""

from __future__ import annotations

import pytest

from allmem_megatron.config import BaseModelConfig, MemoryConfig, MixerSettings
from pipeline.flops import layer_flops, step_flops

QWEN = BaseModelConfig(
    family="qwen3",
    hidden_size=1024,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=3072,
    vocab_size=151936,
    qk_norm=True,
    tie_word_embeddings=True,
)
FULL = MixerSettings(mode="full")
ALLMEM = MixerSettings(mode="allmem", window_size=2048, num_sinks=128, chunk_size=1024)


def test_pretraining_costs_six_flops_a_weight_and_token_and_attention():
    weights = 28 * (1024 * 128 * (16 + 8 + 8 + 16) + 3 * 1024 * 3072) + 1024 * 151936
    attention = 28 * 2 * 2 * 16 * 128 * 512 * 3  # 1,024 / 2 keys on average, forward and backward
    flops = step_flops(
        "pretrain",
        QWEN,
        None,
        FULL,
        length=1024,
        num_tokens=1024,
        loss_tokens=1024,
        trains_base=True,
    )
    assert flops == pytest.approx(1024 * (6 * weights + attention), rel=1e-6)


def test_conversion_adds_the_teacher_and_saves_the_bases_gradients():
    shape = {"length": 4096, "num_tokens": 4096, "loss_tokens": 0, "trains_base": False}
    flops = step_flops("convert", QWEN, MemoryConfig(), ALLMEM, **shape)
    student, branch = layer_flops(QWEN, MemoryConfig(), ALLMEM, 4096)
    teacher, none = layer_flops(QWEN, None, FULL, 4096)
    assert none == 0
    assert 0 < branch < student
    assert flops == pytest.approx(28 * 4096 * (2 * student + branch + teacher))
    assert step_flops("sft", QWEN, MemoryConfig(), ALLMEM, **shape) < flops
