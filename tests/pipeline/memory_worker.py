"""Prints the peak memory, in MiB over the start, of a distillation step at growing lengths."""

from __future__ import annotations

import resource

import torch

from allmem_megatron.config import BaseModelConfig, MemoryConfig, MixerSettings
from allmem_megatron.model import build_model
from pipeline.batches import MicroBatch
from pipeline.models import trained_parameters
from pipeline.objectives import Distill

VOCABULARY = 20_000


def peak() -> float:
    """Peak resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def step(objective: Distill, num_tokens: int) -> None:
    """Forward and backward on one random sequence with loss on all tokens."""
    tokens = torch.randint(0, VOCABULARY, (1, num_tokens))
    mask = torch.ones(1, num_tokens, dtype=torch.bool)
    settings = MixerSettings(mode="allmem", window_size=256, num_sinks=4, chunk_size=256)
    with objective.active(settings):
        total, _ = objective(MicroBatch.of(tokens, mask, None))
        (total / num_tokens).backward()


def main() -> None:
    """Growing lengths in one process: the peak only ever rises."""
    torch.set_num_threads(1)
    base = BaseModelConfig(
        family="qwen3",
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=64,
        vocab_size=VOCABULARY,
        qk_norm=True,
        tie_word_embeddings=True,
    )
    model = build_model(base, branch="allmem", memory=MemoryConfig(memory_size=32), recompute=True)
    trained_parameters(model, "memory")
    objective = Distill(model, max_elements=2**20)
    step(objective, 512)
    start = peak()
    for num_tokens in (8192, 16384):
        step(objective, num_tokens)
        print(num_tokens, round(peak() - start, 1))


if __name__ == "__main__":
    main()
