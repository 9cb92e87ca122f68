"""Reads a GGUF file as a Hugging Face model: configuration and weights, dequantised when asked for.

GGUF stores the rows of Llama's q and k projections permuted: within a head, the two halves that
Hugging Face rotates against each other are interleaved. Qwen files are not permuted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allmem_megatron.config import FAMILIES

_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ROPE_FACTORS = "rope_freqs.weight"


def hf_name(gguf_name: str) -> str:
    """The Hugging Face name of a GGUF tensor. Raises: ValueError for one of another family."""
    if gguf_name in _TOP_NAMES:
        return _TOP_NAMES[gguf_name]
    block, _, rest = gguf_name.partition(".")
    layer, _, rest = rest.partition(".")
    if block != "blk" or not layer.isdigit() or rest not in _LAYER_NAMES:
        raise ValueError(
            f"GGUF tensor {gguf_name} is none of the families {', '.join(FAMILIES)};"
            " use a file of one of them"
        )
    return f"model.layers.{layer}.{_LAYER_NAMES[rest]}"


class GgufTensors(Mapping[str, Tensor]):
    """Weights by Hugging Face name, float32, dequantised from the mapped file when asked for."""

    def __init__(self, reader: Any, permuted_heads: dict[str, int]) -> None:
        """`permuted_heads`: number of heads by the end of the name, where rows are permuted."""
        self._entries = {
            hf_name(entry.name): entry for entry in reader.tensors if entry.name != _ROPE_FACTORS
        }
        self._permuted_heads = permuted_heads

    def __getitem__(self, name: str) -> Tensor:
        tensor = _dequantised(self._entries[name])
        for end, num_heads in self._permuted_heads.items():
            if name.endswith(end):
                # rows [H, K/2, 2] -> [H, 2, K/2]
                rows = tensor.reshape(num_heads, -1, 2, *tensor.shape[1:])
                tensor = rows.swapaxes(1, 2).reshape(tensor.shape)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _dequantised(entry: Any) -> Tensor:
    from gguf.quants import dequantize

    return torch.from_numpy(np.array(dequantize(entry.data, entry.tensor_type), dtype=np.float32))


def read_gguf(path: Path) -> tuple[dict[str, Any], GgufTensors]:
    """(config.json as a dictionary, weights by Hugging Face name) of a GGUF file.

    Raises:
        ValueError: not a readable GGUF file, or one of an unsupported family.
        ModuleNotFoundError: the package gguf is not installed.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise ValueError(f"{path} is no readable GGUF file ({error}); copy it again") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    family = fields.get("general.architecture", "missing")
    if family not in FAMILIES:
        raise ValueError(
            f"{path}: architecture {family!r} is not supported; use a file of the families"
            f" {', '.join(FAMILIES)}"
        )
    entries = {entry.name: entry for entry in reader.tensors}
    config = _config(fields, family, entries)
    permuted = {}
    if family == "llama":
        permuted = {
            f"self_attn.{letter}_proj.{kind}": heads
            for letter, heads in (
                ("q", config["num_attention_heads"]),
                ("k", config["num_key_value_heads"]),
            )
            for kind in ("weight", "bias")
        }
    return config, GgufTensors(reader, permuted)


def _config(fields: dict[str, Any], family: str, entries: dict[str, Any]) -> dict[str, Any]:
    def value(key: str, default: Any = None) -> Any:
        found = fields.get(f"{family}.{key}", default)
        if found is None:
            raise ValueError(f"GGUF key {family}.{key} is missing; use a complete file")
        return found

    heads = int(value("attention.head_count"))
    hidden = int(value("embedding_length"))
    head_dim = int(value("attention.key_length", hidden // heads))
    theta = float(value("rope.freq_base", 10000.0))
    config = {
        "model_type": family,
        "hidden_size": hidden,
        "num_hidden_layers": int(value("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(value("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "intermediate_size": int(value("feed_forward_length")),
        "vocab_size": int(entries["token_embd.weight"].shape[-1]),
        # the file holds a float32: its shortest decimal is what the model was made with
        "rms_norm_eps": float(str(np.float32(value("attention.layer_norm_rms_epsilon")))),
        "rope_theta": theta,
        "max_position_embeddings": int(value("context_length")),
        "tie_word_embeddings": "output.weight" not in entries,
        "hidden_act": "silu",
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
    }
    scaling = _rope_scaling(fields, family)
    if _ROPE_FACTORS in entries:
        factors = _dequantised(entries[_ROPE_FACTORS])
        scaling = _llama3_scaling(factors, theta, head_dim)
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config


def _rope_scaling(fields: dict[str, Any], family: str) -> dict[str, Any] | None:
    kind = fields.get(f"{family}.rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": float(fields[f"{family}.rope.scaling.factor"])}
    original = fields.get(f"{family}.rope.scaling.original_context_length")
    if original is not None:
        scaling["original_max_position_embeddings"] = int(original)
    return scaling


def _llama3_scaling(factors: Tensor, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's settings out of the per-frequency factors that GGUF stores in their place."""
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    wavelengths = 2 * torch.pi / frequencies
    low, high = 8192 / 1.0, 8192 / 4.0
    smooth = (8192 / wavelengths - 1.0) / (4.0 - 1.0)
    between = 1.0 / ((1 - smooth) / factors.max() + smooth)
    expected = torch.where(wavelengths > low, factors.max(), between)
    expected = torch.where(wavelengths < high, torch.ones_like(expected), expected)
    if not torch.allclose(expected, factors, rtol=1e-3):
        raise ValueError(
            "the rotary factors in the GGUF file are not Llama 3's; use the safetensors weights"
        )
    return scaling
