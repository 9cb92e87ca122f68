"""Rotary position embedding as Hugging Face computes it.

Shapes: B sequences, T tokens, H heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from allmem_megatron.config import BaseModelConfig


def inverse_frequencies(config: BaseModelConfig) -> tuple[Tensor, float]:
    """(frequencies [K / 2] float32, factor on cos and sin) for the config's rotary type.

    The scaled types come from transformers' own table, so that they mean what they mean there.
    """
    if config.rope_scaling is None:
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float, device="cpu")
        return 1.0 / (config.rope_theta ** (exponent / config.head_dim)), 1.0
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    hf = config.to_hf()
    hf_config = AutoConfig.for_model(hf.pop("model_type"), **hf)
    frequencies, factor = ROPE_INIT_FUNCTIONS[config.rope_scaling["rope_type"]](
        hf_config, torch.device("cpu")
    )
    return frequencies.float(), float(factor)


def positions_within_documents(
    num_tokens: int, cu_seqlens: Tensor | None, start: int = 0
) -> Tensor:
    """Positions in their documents of the `num_tokens` tokens from `start` on, [num_tokens].

    Every document's first token has position 0; `cu_seqlens` [N + 1] bounds the documents.
    """
    position = torch.arange(start, start + num_tokens)
    if cu_seqlens is None:
        return position
    bounds = cu_seqlens.to(torch.int64)
    position = position.to(bounds.device)
    document = torch.searchsorted(bounds, position, right=True) - 1
    return position - bounds[document]


def cos_sin(
    positions: Tensor, frequencies: Tensor, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin [T, K], angles in float32, cast to `dtype` as Hugging Face casts them."""
    angles = positions.float()[:, None] * frequencies[None, :]
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def apply_rotary(x_BTHK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotates pairs (i, i + K/2) of every head by its position's angle."""
    half = x_BTHK.shape[-1] // 2
    rotated = torch.cat((-x_BTHK[..., half:], x_BTHK[..., :half]), dim=-1)
    return x_BTHK * cos_TK[None, :, None, :] + rotated * sin_TK[None, :, None, :]
