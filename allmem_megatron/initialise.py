"""Initial weights that depend on (seed, layer, name) alone.

Every tensor has a generator of its own, seeded by its Hugging Face name (which holds the layer),
and is drawn whole before it is split: neither the order of construction nor the number of
tensor-parallel ranks changes a weight.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from allmem_megatron.config import MATRICES, BaseModelConfig, MemoryConfig
from allmem_megatron.convert import from_hf, load_hf_tensors, model_to_hf, to_hf
from allmem_megatron.sharding import full_shape, shard_of
from kernels.ttt_memory.branch import eta_bias

if TYPE_CHECKING:
    from allmem_megatron.model import AllMemGPTModel

OFF = -30.0
"""A bias at which softplus and sigmoid are 1e-13: nothing, and so is the gradient that could move
it (far below the epsilon of AdamW)."""

_ONES = re.compile(r"norm\.weight$|layernorm\.weight$|d_skip$")
_BRANCH_QKV = re.compile(r"\.memory\.[qkv]_proj\.weight$")
_FROM_BASE = re.compile(r"\.memory\.([qkvo]_proj|[qk]_norm)\.weight$")
_GATE_UP = re.compile(r"\.memory\.fast_(gate|up)$")
_ZEROS = re.compile(r"(q|k|v)_proj\.bias$|(mu|gate)_proj\.bias$|alpha$")


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the tensor's name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def initialise(
    model: AllMemGPTModel,
    *,
    seed: int,
    init_std: float,
    embedding_std: float | None,
    base: bool = True,
) -> None:
    """Draws every parameter of `model`.

    Projections are normal with std `init_std` (the branch's output and gate too), norms 1, alpha
    and biases 0, convolutions the identity, fast weights normal with std 1/sqrt(fan-in), the
    rate's bias such that eta = eta_init (spec sections 3 and 4). The branch's q, k and v have std
    1/sqrt(fan-in) too: v is not normalised, so its scale is that of every write, and must not
    shrink with the width of a tiny model.

    Args:
        model: not on the meta device.
        seed: of all generators.
        init_std: of all projections.
        embedding_std: of the token embedding; None: init_std.
        base: False fills the base model's weights with NaN, for a checkpoint to replace.
    """
    memory = model.memory_config or MemoryConfig()
    stds = {"model.embed_tokens.weight": init_std if embedding_std is None else embedding_std}
    if not base:
        for _, parameter in model.base_parameters():
            torch.nn.init.constant_(parameter, math.nan)
    for mcore_name, parameter in model.named_parameters() if base else model.memory_parameters():
        blank = torch.empty(full_shape(parameter), device="meta")
        drawn = {
            name: _draw(name, part.shape, generator_for(seed, name), memory, stds, init_std)
            for name, part in to_hf({mcore_name: blank}, model.base_config).items()
        }
        whole = from_hf(drawn, model.base_config)[mcore_name]
        with torch.no_grad():
            parameter.copy_(shard_of(whole, parameter))


def _draw(
    name: str,
    shape: torch.Size,
    generator: torch.Generator,
    memory: MemoryConfig,
    stds: dict[str, float],
    init_std: float,
) -> Tensor:
    def normal(std: float) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu") * std

    def rates() -> Tensor:
        return normal(0.1 / math.sqrt(shape[-1]))  # eta, mu and dt start close to their bias

    if _ONES.search(name):
        return torch.ones(shape)
    if name.endswith(("mu_proj.weight", "mu_proj.bias")) and not memory.momentum:
        return torch.full(shape, OFF if name.endswith("bias") else 0.0)
    if _ZEROS.search(name):
        return torch.zeros(shape)
    if "_conv." in name:  # the identity: the last tap is the token itself
        taps = torch.zeros(shape)
        taps[:, -1] = 1.0
        return taps
    if memory.gate_up_std is not None and _GATE_UP.search(name):
        return normal(memory.gate_up_std)
    if _BRANCH_QKV.search(name) or ".memory.fast_" in name:
        return normal(1 / math.sqrt(shape[-1]))
    if ".eta_proj." in name:
        bias = name.endswith("bias")
        drawn = torch.full(shape, eta_bias(memory.eta_init)) if bias else rates()
        by_matrix = drawn.unflatten(0, (-1, len(MATRICES)))  # a view
        for number, matrix in enumerate(MATRICES):
            if matrix not in memory.writes:
                by_matrix[:, number] = OFF if bias else 0.0
        return drawn
    if name.endswith(("mu_proj.weight", "dt_proj.weight")):
        return rates()
    if name.endswith("dt_proj.bias"):  # Mamba-2: dt log-uniform in [0.001, 0.1]
        low, high = math.log(1e-3), math.log(1e-1)
        dt = torch.exp(torch.rand(shape, generator=generator, device="cpu") * (high - low) + low)
        return dt + torch.log(-torch.expm1(-dt))
    if name.endswith("a_log"):  # Mamba-2: A uniform in [1, 16]
        return torch.log(torch.rand(shape, generator=generator, device="cpu") * 15 + 1)
    return normal(stds.get(name, init_std))


def memory_from_base(model: AllMemGPTModel) -> None:
    """Starts the branch's projections and q/k norms from the model's own attention.

    Memory head j serves key-value head g = j * n_kv // n. It takes g's rows of k_proj and v_proj as
    they are; from q_proj those of one of g's query heads where several memory heads share g (each
    the next one), else the mean over g's query heads; and o_proj's columns likewise (their sum in
    place of the mean: one value feeds them all). Rows start again where a head is narrower than
    the memory's. With unit keys and no positions the memory then associates what attention
    matches by content; measured in docs/decisions.md.

    Raises:
        ValueError: the model has no branch.
    """
    if model.memory_config is None:
        raise ValueError("branch='none' has no memory to start; build the model with a branch")
    base, memory = model.base_config, model.memory_config
    weights = model_to_hf(model)
    branch = {name: value for name, value in weights.items() if ".memory." in name}
    for name, value in branch.items():
        source = weights.get(name.replace(".memory.", ".self_attn."))
        if _FROM_BASE.search(name) and source is not None:  # only qwen3 has q/k norms
            branch[name] = _from_base(name, source, value.shape, base, memory).to(value.dtype)
    load_hf_tensors(model, branch, part="memory")


def _from_base(
    name: str, source: Tensor, shape: torch.Size, base: BaseModelConfig, memory: MemoryConfig
) -> Tensor:
    if ".o_proj." in name:
        return memory_rows(source.T, base, shape[1], memory, merge="sum").T.contiguous()
    if "_norm." in name:
        return source[torch.arange(shape[0], device=source.device) % base.head_dim]
    return memory_rows(source, base, shape[0], memory, merge="mean")


def memory_rows(
    source: Tensor, base: BaseModelConfig, num_rows: int, memory: MemoryConfig, *, merge: str
) -> Tensor:
    """Rows for a memory projection out of the base's q, k, v (or transposed o) projection.

    Args:
        source: [heads * head_dim, D]; the heads of one key-value group are consecutive.
        base: the base model's sizes.
        num_rows: rows wanted, the same number for each memory head.
        memory: the memory's sizes.
        merge: "mean" or "sum" over a group's heads where one memory head serves them all.
    """
    n = memory.heads(base)
    width = num_rows // n
    grouped = source.reshape(base.num_kv_heads, -1, base.head_dim, source.shape[-1])
    index = torch.arange(width, device=source.device) % base.head_dim
    heads = []
    for j in range(n):
        group = grouped[j * base.num_kv_heads // n]  # [heads of the group, head_dim, D]
        shared = -(-n // base.num_kv_heads)
        if shared > 1:
            rows = group[j % shared % group.shape[0]]
        else:
            rows = group.mean(0) if merge == "mean" else group.sum(0)
        heads.append(rows[index])
    return torch.cat(heads)
