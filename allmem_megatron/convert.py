"""Weights between Hugging Face and Megatron-Core: one table of names, read both ways.

Every row works on any elementwise companion of a weight (a moment of the optimiser) as well.

Shapes: D model width, G key-value heads, K head width, F hidden width of the MLP.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from allmem_megatron.base_files import BaseCheckpoint, load_base, save_hf_dir
from allmem_megatron.config import BaseModelConfig
from allmem_megatron.sharding import full_shape, full_tensors, shard_of

if TYPE_CHECKING:
    from allmem_megatron.model import AllMemGPTModel

__all__ = [
    "BaseCheckpoint",
    "from_hf",
    "hf_names",
    "load_base",
    "load_base_into",
    "load_hf_tensors",
    "model_to_hf",
    "save_hf_dir",
    "to_hf",
]


@dataclass(frozen=True)
class Row:
    """One Megatron parameter and the Hugging Face tensors that are its parts."""

    mcore: str
    hf: tuple[str, ...]
    merge: Callable[[Sequence[Tensor], BaseModelConfig], Tensor]
    split: Callable[[Tensor, BaseModelConfig], Sequence[Tensor]]


def _same(mcore: str, hf: str) -> Row:
    return Row(mcore, (hf,), lambda parts, config: parts[0], lambda whole, config: (whole,))


def _merge_qkv(parts: Sequence[Tensor], config: BaseModelConfig) -> Tensor:
    """q, k, v rows -> for each group its queries, its key, its value: [G (H/G + 2) K, ...]."""
    grouped = [part.reshape(config.num_kv_heads, -1, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _split_qkv(whole: Tensor, config: BaseModelConfig) -> Sequence[Tensor]:
    grouped = whole.reshape(config.num_kv_heads, -1, *whole.shape[1:])
    width = config.head_dim
    parts = grouped.split([config.group_size * width, width, width], dim=1)
    return [part.flatten(0, 1).contiguous() for part in parts]


def _merge_gate_up(parts: Sequence[Tensor], config: BaseModelConfig) -> Tensor:
    return torch.cat(list(parts), dim=0)


def _split_gate_up(whole: Tensor, config: BaseModelConfig) -> Sequence[Tensor]:
    return [part.contiguous() for part in whole.chunk(2, dim=0)]


_M, _H = "decoder.layers.{i}.", "model.layers.{i}."
_ATTENTION = "self_attention.linear_qkv."
_BRANCH = _M + "self_attention.memory."
_MEMORY = _H + "memory."


def _qkv(kind: str) -> Row:
    parts = tuple(f"{_H}self_attn.{letter}_proj.{kind}" for letter in "qkv")
    return Row(f"{_M}{_ATTENTION}{kind}", parts, _merge_qkv, _split_qkv)


# Modules keep their name; the branch's own parameters have none of `.weight` in Megatron.
_BRANCH_SAME = (
    *(f"{name}_proj.weight" for name in ("q", "k", "v", "eta", "mu", "gate", "dt", "o")),
    *(f"{name}_proj.bias" for name in ("eta", "mu", "gate", "dt")),
    *("fast_gate", "fast_up", "fast_down", "alpha", "a_log", "d_skip"),
)
_BRANCH_WEIGHTS = ("q_conv", "k_conv", "v_conv", "q_norm", "k_norm", "o_norm")

TABLE: tuple[Row, ...] = (
    _same("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    _same("decoder.final_layernorm.weight", "model.norm.weight"),
    _same("output_layer.weight", "lm_head.weight"),
    _same(_M + "input_layernorm.weight", _H + "input_layernorm.weight"),
    _same(_M + "pre_mlp_layernorm.weight", _H + "post_attention_layernorm.weight"),
    _qkv("weight"),
    _qkv("bias"),
    _same(_M + "self_attention.linear_proj.weight", _H + "self_attn.o_proj.weight"),
    _same(_M + "self_attention.q_layernorm.weight", _H + "self_attn.q_norm.weight"),
    _same(_M + "self_attention.k_layernorm.weight", _H + "self_attn.k_norm.weight"),
    Row(
        _M + "mlp.linear_fc1.weight",
        (_H + "mlp.gate_proj.weight", _H + "mlp.up_proj.weight"),
        _merge_gate_up,
        _split_gate_up,
    ),
    _same(_M + "mlp.linear_fc2.weight", _H + "mlp.down_proj.weight"),
    *(_same(_BRANCH + name, _MEMORY + name) for name in _BRANCH_SAME),
    *(_same(_BRANCH + name, f"{_MEMORY}{name}.weight") for name in _BRANCH_WEIGHTS),
)

_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")
_BY_MCORE = {row.mcore: row for row in TABLE}
_BY_HF = {name: row for row in TABLE for name in row.hf}
# Buffers that old checkpoints carry and every model computes itself.
_NO_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$|_extra_state$")


def _lookup(name: str, table: Mapping[str, Row], side: str) -> tuple[Row, str]:
    """(row, layer number or "") of a concrete name."""
    found = _LAYER.search(name)
    layer = found.group() if found else ""
    row = table.get(_LAYER.sub("{i}", name, count=1))
    if row is None:
        raise ValueError(
            f"{name} is no {side} tensor of the supported families; check the model's family"
        )
    return row, layer


def hf_names(mcore_name: str) -> list[str]:
    """The Hugging Face names of a Megatron parameter's parts."""
    row, layer = _lookup(mcore_name, _BY_MCORE, "Megatron")
    return [name.replace("{i}", layer) for name in row.hf]


def to_hf(tensors: Mapping[str, Tensor], config: BaseModelConfig) -> dict[str, Tensor]:
    """Megatron names and layouts to those of Hugging Face.

    Args:
        tensors: whole tensors (not one rank's parts) by parameter name; any subset.
        config: of the base model; gives the head counts of the fused projection.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        row, layer = _lookup(name, _BY_MCORE, "Megatron")
        parts = row.split(tensor, config)
        out.update((n.replace("{i}", layer), p) for n, p in zip(row.hf, parts, strict=True))
    return out


def from_hf(tensors: Mapping[str, Tensor], config: BaseModelConfig) -> dict[str, Tensor]:
    """Hugging Face names and layouts to those of Megatron; the inverse of `to_hf`.

    Raises:
        ValueError: an unknown name, or a fused parameter of which a part is missing.
    """
    out: dict[str, Tensor] = {}
    for name in tensors:
        if _NO_WEIGHTS.search(name) or _is_tied_head(name, tensors, config):
            continue
        row, layer = _lookup(name, _BY_HF, "Hugging Face")
        mcore_name = row.mcore.replace("{i}", layer)
        if mcore_name not in out:
            out[mcore_name] = row.merge(_parts(row, layer, tensors), config)
    return out


def _parts(row: Row, layer: str, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    names = [name.replace("{i}", layer) for name in row.hf]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(
            f"{missing[0]} is missing; a checkpoint must hold all of {', '.join(names)}"
        )
    return [tensors[name] for name in names]


def _is_tied_head(name: str, tensors: Mapping[str, Tensor], config: BaseModelConfig) -> bool:
    """True for the copy of the embedding that some tied checkpoints store as the head."""
    if name != "lm_head.weight" or not config.tie_word_embeddings:
        return False
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is not None and not torch.equal(embedding, tensors[name]):
        raise ValueError(
            "lm_head.weight differs from model.embed_tokens.weight although"
            " tie_word_embeddings=true; set tie_word_embeddings to false in config.json"
        )
    return True


def model_to_hf(
    model: AllMemGPTModel, companions: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """All weights of `model`, or companions of some, whole and by Hugging Face name.

    A collective over the tensor-parallel group: every rank calls it and gets everything.
    """
    whole = full_tensors(model, companions)
    return to_hf(dict(whole), model.base_config)


def load_hf_tensors(
    model: AllMemGPTModel, tensors: Mapping[str, Tensor], *, part: str = "all"
) -> None:
    """Copies tensors by Hugging Face name into the model's parameters (this rank's parts).

    Args:
        model: on any device but meta.
        tensors: read one parameter at a time, so a lazy mapping needs little memory.
        part: "base", "memory", or "all" for both.

    Raises:
        ValueError: a missing or unknown tensor, one of another shape, or an unknown part.
    """
    if part not in ("base", "memory", "all"):
        raise ValueError(f"part={part!r} is not known; use base, memory or all")
    wanted = dict(model.memory_parameters()) if part != "base" else {}
    if part != "memory":
        wanted.update(model.base_parameters())
    used: set[str] = set()
    for name, parameter in wanted.items():
        row, layer = _lookup(name, _BY_MCORE, "Megatron")
        parts = _parts(row, layer, tensors)
        expected = row.split(torch.empty(full_shape(parameter), device="meta"), model.base_config)
        for hf_name, got, want in zip(hf_names(name), parts, expected, strict=True):
            used.add(hf_name)
            if got.shape != want.shape:
                raise ValueError(
                    f"{hf_name} has shape {tuple(got.shape)}, the model wants {tuple(want.shape)};"
                    " use the configuration that the checkpoint was made with"
                )
        with torch.no_grad():
            parameter.copy_(shard_of(row.merge(parts, model.base_config), parameter))
    _refuse_unused(tensors, used, part, model.base_config)


def _refuse_unused(
    tensors: Mapping[str, Tensor], used: set[str], part: str, config: BaseModelConfig
) -> None:
    for name in tensors:
        other_part = part != "all" and (".memory." in name) != (part == "memory")
        if name in used or other_part or _NO_WEIGHTS.search(name):
            continue
        if not _is_tied_head(name, tensors, config):
            raise ValueError(
                f"{name} of the checkpoint has no place in the model; check that config.json"
                " describes these weights"
            )


def load_base_into(model: AllMemGPTModel, checkpoint: BaseCheckpoint) -> None:
    """Puts a pretrained base model's weights into `model`; the branch stays as it was drawn.

    With `memory.init_from_base` the branch starts from these weights (see `memory_from_base`).

    Raises:
        ValueError: the checkpoint is of another configuration than the model.
    """
    if checkpoint.config != model.base_config:
        raise ValueError(
            f"checkpoint {checkpoint.path} is not of the model's configuration; build the model"
            " with checkpoint.config"
        )
    load_hf_tensors(model, checkpoint.tensors, part="base")
    if model.memory_config is not None and model.memory_config.init_from_base:
        from allmem_megatron.initialise import memory_from_base

        memory_from_base(model)
