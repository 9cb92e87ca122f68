"""Which parameter is split over tensor-parallel ranks, and how shards and whole tensors meet.

Tags are core's own attributes on a parameter: `tensor_model_parallel` (bool), `partition_dim` and
`partition_stride` (2 where a rank holds its part of a gate and its part of an up projection).
Gradient clipping counts a tagged parameter once per rank and any other once per group.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import Tensor, nn

# Parameters of a branch that are split by memory head along dimension 0.
HEAD_SPLIT = frozenset(
    ("q_conv", "k_conv", "v_conv", "fast_gate", "fast_up", "fast_down", "a_log", "d_skip")
)


def tag_tensor_parallel(model: nn.Module) -> None:
    """Sets core's three attributes on every parameter of `model`."""
    for parameter in model.parameters():
        _tag(parameter, False, -1, 1)
    for module_name, module in model.named_modules():
        if isinstance(module, ColumnParallelLinear):
            stride = 2 if module_name.endswith("mlp.linear_fc1") else 1
            for parameter in module.parameters(recurse=False):
                _tag(parameter, True, 0, stride)
        elif isinstance(module, RowParallelLinear):
            _tag(module.weight, True, 1, 1)
        elif isinstance(module, VocabParallelEmbedding):
            _tag(module.weight, True, 0, 1)
        elif module_name.endswith(".self_attention.memory"):
            for name, parameter in module.named_parameters(recurse=False):
                if name in HEAD_SPLIT:
                    _tag(parameter, True, 0, 1)


def _tag(parameter: Tensor, parallel: bool, dim: int, stride: int) -> None:
    parameter.tensor_model_parallel = parallel  # type: ignore[attr-defined]
    parameter.partition_dim = dim  # type: ignore[attr-defined]
    parameter.partition_stride = stride  # type: ignore[attr-defined]


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter, over all tensor-parallel ranks."""
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= (  # type: ignore[attr-defined]
            parallel_state.get_tensor_model_parallel_world_size()
        )
    return torch.Size(shape)


def shard_of(full: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a whole tensor that has the layout of `parameter`."""
    world = parallel_state.get_tensor_model_parallel_world_size()
    if world == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return full
    rank = parallel_state.get_tensor_model_parallel_rank()
    dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    parts = [part.chunk(world, dim=dim)[rank] for part in full.chunk(stride, dim=dim)]
    return torch.cat(parts, dim=dim)


def full_of(shard: Tensor, parameter: Tensor) -> Tensor:
    """The whole tensor out of every rank's part; a collective over the tensor-parallel group.

    Args:
        shard: the parameter itself or an elementwise companion (a moment of the optimiser).
        parameter: whose tags say how it is split.
    """
    world = parallel_state.get_tensor_model_parallel_world_size()
    if world == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return shard.detach()
    parts = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(world)]
    dist.all_gather(
        parts, shard.detach().contiguous(), group=parallel_state.get_tensor_model_parallel_group()
    )
    dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    pieces = [part.chunk(stride, dim=dim) for part in parts]
    return torch.cat([piece[i] for i in range(stride) for piece in pieces], dim=dim)


def full_tensors(
    model: nn.Module, companions: dict[str, Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of every parameter, or of every companion given by parameter name.

    Raises:
        ValueError: a companion of no parameter, or of another shape.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in (parameters if companions is None else companions).items():
        if name not in parameters:
            raise ValueError(f"{name} is no parameter of the model; pass names of its parameters")
        if tensor.shape != parameters[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, its parameter"
                f" {tuple(parameters[name].shape)}; pass the tensor of this rank's part"
            )
        yield name, full_of(tensor, parameters[name])
