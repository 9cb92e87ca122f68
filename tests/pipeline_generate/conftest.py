"""Tiny random models of every mixer."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from allmem_hf import AllMemForCausalLM
from allmem_hf.export import export_model
from allmem_megatron.base_files import load_base
from allmem_megatron.config import BaseModelConfig, MemoryConfig, MixerSettings
from allmem_megatron.convert import load_base_into, model_to_hf
from allmem_megatron.model import AllMemGPTModel, build_model
from pipeline.generation_models import hf_model_from_megatron

DEMO = Path(__file__).parents[2] / "models" / "demo_base"
BASE = BaseModelConfig(
    family="qwen3",
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    vocab_size=97,
    qk_norm=True,
)
MEMORY = MemoryConfig(memory_size=16, eta_init=0.5)
SETTINGS = MixerSettings(mode="allmem", window_size=6, num_sinks=2, chunk_size=4)
BRANCH_OF = {"full": "none", "swa": "none", "mamba2": "mamba2", "allmem": "allmem"}
MODES = tuple(BRANCH_OF)


@pytest.fixture(scope="session")
def megatron() -> Callable[[str], AllMemGPTModel]:
    """Builds a Megatron model whose branch shows in its logits: `megatron("allmem")`."""

    def build(mode: str) -> AllMemGPTModel:
        model = build_model(BASE, branch=BRANCH_OF[mode], memory=MEMORY, seed=3)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("alpha") or "embedding" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
                elif "output_layer" in name:
                    parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
                else:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model.eval()

    return build


@pytest.fixture(scope="session")
def model_of(megatron: Callable[[str], AllMemGPTModel]) -> Callable[..., AllMemForCausalLM]:
    """The Hugging Face model of a mixer: `model_of("swa", window_size=9)`."""

    def build(mode: str, **changes: Any) -> AllMemForCausalLM:
        settings = replace(SETTINGS, mode=mode, **changes)
        return hf_model_from_megatron(megatron(mode), settings)

    return build


@pytest.fixture(scope="session")
def draw() -> Callable[[int], list[int]]:
    """Random token ids by length, never id 0: `draw(17)`."""

    def tokens(length: int) -> list[int]:
        generator = torch.Generator().manual_seed(length)
        return torch.randint(1, BASE.vocab_size, (length,), generator=generator).tolist()

    return tokens


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base with an untrained memory that already speaks (alpha above zero)."""
    base, memory = load_base(DEMO), MemoryConfig(memory_size=128, eta_init=0.02)
    model = build_model(base.config, branch="allmem", memory=memory, init_base=False)
    load_base_into(model, base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("alpha"):
                parameter.fill_(0.05)
    out = tmp_path_factory.mktemp("demo") / "export"
    mixer = {"mode": "allmem", "window_size": 64, "num_sinks": 4, "chunk_size": 32}
    return export_model(
        out, base.hf_config, model_to_hf(model), memory, mixer, base.tokenizer_files
    )
