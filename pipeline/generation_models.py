"""`allmem_hf` models in memory: from a Megatron model, a run's checkpoints, or a folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from allmem_hf import AllMemConfig, AllMemForCausalLM
from allmem_hf.export import build_config
from allmem_megatron.config import BaseModelConfig, MemoryConfig, MixerSettings
from allmem_megatron.convert import model_to_hf
from allmem_megatron.model import AllMemGPTModel


def hf_model_from_megatron(
    model: AllMemGPTModel,
    settings: MixerSettings,
    *,
    hf_config: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> AllMemForCausalLM:
    """The same model as an `allmem_hf` one, for generation.

    Weights that both store alike are shared, the projections that Megatron fuses are copied. A
    collective over the tensor-parallel group: every rank calls it and gets the whole model.

    Args:
        model: trained or not; with the branch that the mode needs.
        settings: mode full, swa, mamba2 or allmem, and the window's and chunk's sizes.
        hf_config: the base's own `config.json`; None: made from `model.base_config`.
        device: where the model goes; None: where the weights are.

    Raises:
        ValueError: a mode that generation does not have, or one whose branch the model lacks.
    """
    branch = {"full": "none", "swa": "none"}.get(settings.mode, settings.mode)
    if branch not in ("none", model.branch):
        raise ValueError(
            f"mode={settings.mode!r} needs a model with that branch, this one has {model.branch!r};"
            " load it with it"
        )
    tensors = model_to_hf(model)
    return build_hf_model(
        model.base_config, tensors, model.memory_config, settings, hf_config=hf_config,
        device=device,
    )  # fmt: skip


def build_hf_model(
    base: BaseModelConfig,
    tensors: Mapping[str, Tensor],
    memory: MemoryConfig | None,
    settings: MixerSettings,
    *,
    hf_config: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> AllMemForCausalLM:
    """A model around `tensors` (Hugging Face names), which it shares.

    Raises:
        ValueError: settings that do not fit, or tensors that are missing.
    """
    config = hf_config_of(base, memory, settings, hf_config)
    wanted = tensors
    if config.branch == "none":
        wanted = {name: x for name, x in tensors.items() if ".memory." not in name}
    return assemble(config, wanted).to(device) if device else assemble(config, wanted)


def hf_config_of(
    base: BaseModelConfig,
    memory: MemoryConfig | None,
    settings: MixerSettings,
    hf_config: Mapping[str, Any] | None = None,
) -> AllMemConfig:
    """The configuration of a model with this mixer."""
    mixer = {
        "mode": settings.mode,
        "window_size": settings.window_size,
        "num_sinks": settings.num_sinks,
        "chunk_size": settings.chunk_size,
        "memory_off": settings.memory_off,
        "write_off": settings.write_off,
        "shuffle_state": settings.shuffle_state,
    }
    return build_config(dict(hf_config or base.to_hf()), memory, mixer)


def assemble(config: AllMemConfig, tensors: Mapping[str, Tensor]) -> AllMemForCausalLM:
    """A model that holds these very tensors.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape.
    """
    with torch.device("meta"):
        model = AllMemForCausalLM(config)
    held = dict(tensors)
    if config.tie_word_embeddings:
        held["lm_head.weight"] = held["model.embed_tokens.weight"]
    try:
        model.load_state_dict(held, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"the weights do not fit the configuration ({' '.join(str(error).split())[:300]}); "
            "use the configuration that they were made with"
        ) from error
    model.tie_weights()
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.frequencies(config)[0].to(held["model.embed_tokens.weight"].device)
    return model.requires_grad_(False).eval()
