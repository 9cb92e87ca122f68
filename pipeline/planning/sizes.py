"""Sizes of the base model: from its files, or of well-known models whose files are not here."""

from __future__ import annotations

from dataclasses import dataclass

from allmem_megatron.config import BaseModelConfig
from pipeline.config import resolve_path
from pipeline.models import base_config
from pipeline.schema import RunConfig


def _qwen3(hidden_size: int, num_layers: int, num_heads: int, width: int) -> BaseModelConfig:
    return BaseModelConfig(
        family="qwen3",
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=width,
        vocab_size=151936,
        rope_theta=1e6,
        max_position_embeddings=40960,
        tie_word_embeddings=hidden_size <= 2560,
        qk_norm=True,
    )


KNOWN: dict[str, BaseModelConfig] = {
    "Qwen3-0.6B": _qwen3(1024, 28, 16, 3072),
    "Qwen3-1.7B": _qwen3(2048, 28, 16, 6144),
    "Qwen3-4B": _qwen3(2560, 36, 32, 9728),
    "Qwen3-8B": _qwen3(4096, 36, 32, 12288),
    "smollm2_135m": BaseModelConfig(
        family="llama",
        hidden_size=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        intermediate_size=1536,
        vocab_size=49152,
        rope_theta=1e5,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
}
"""Published sizes by the name of the folder that `model.path` would be, or be in."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """The base model's sizes and where they are from."""

    config: BaseModelConfig
    source: str
    """For the user: a path, or that the sizes are the published ones."""


def find_base(config: RunConfig) -> Base:
    """Sizes for a plan; weights are not needed.

    Raises:
        ValueError: there is nothing at `model.path` and its name is not a known model's.
    """
    if config.model.scratch is not None:
        return Base(config=config.model.scratch, source="model.scratch")
    assert config.model.path is not None
    path = resolve_path(config.model.path)
    for name in (path.name, path.parent.name):
        if name in KNOWN and not path.exists():
            note = f"published sizes of {name}; {config.model.path} is not here"
            return Base(config=KNOWN[name], source=note)
    if not path.exists() and not path.suffix:
        raise ValueError(
            f"model.path={config.model.path} does not exist and is not one of the known models "
            f"{', '.join(KNOWN)}; put the model's config.json there (its weights are not needed)"
        )
    return Base(config=base_config(config), source=config.model.path)
