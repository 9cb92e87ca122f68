"""Tiny random models for the tests of `allmem_hf`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allmem_hf import AllMemConfig, AllMemForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "memory_size": 16,
    "chunk_size": 4,
    "window_size": 6,
    "num_sinks": 2,
    "eta_init": 0.5,
}


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights large enough that window, memory and convolution all show in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("alpha") or "embed_tokens" in name:
                parameter.copy_(noise)
            elif name.endswith("proj.weight"):
                parameter.copy_(0.2 * noise)
            elif "fast_" in name:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.2 * noise)


@pytest.fixture
def tiny() -> Callable[..., AllMemForCausalLM]:
    """Builds a tiny random model: `tiny("allmem", chunk_size=3)`."""

    def build(branch: str = "allmem", **changes: Any) -> AllMemForCausalLM:
        model = AllMemForCausalLM(AllMemConfig(branch=branch, **{**SIZES, **changes}))
        randomise(model)
        return model.eval()

    return build


@pytest.fixture
def tokens() -> Callable[..., Tensor]:
    """Random token ids `[B, T]`, none of them 0."""

    def draw(num_rows: int, length: int, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(1, SIZES["vocab_size"], (num_rows, length), generator=generator)

    return draw
