"""Which parameter is split over which ranks, and how shards and whole tensors meet.

Tags are core's own attributes on a parameter: `tensor_model_parallel` (bool), `partition_dim` and
`partition_stride` (2 where a rank holds its part of a gate and its part of an up projection).
Gradient clipping counts a tagged parameter once per rank and any other once per group.

Under ZeRO-3 a rank's tensor-parallel part is itself split, flat, over the ranks of a second group;
the parameter then carries `ds_tensor` (this rank's piece, padded), `ds_shape` and
`ds_process_group`, and its own data are empty most of the time.
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


def part_shape(parameter: Tensor) -> torch.Size:
    """The shape of this rank's tensor-parallel part, also where ZeRO-3 has split it further."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def part_of(parameter: Tensor) -> Tensor:
    """This rank's tensor-parallel part of a parameter, without gradient.

    Under ZeRO-3 a collective over the ranks that split it, and a copy; else the parameter's data.
    """
    split = _zero3(parameter)
    if split is None:
        return parameter.detach()
    piece, group = split
    pieces = [torch.empty_like(piece) for _ in range(dist.get_world_size(group))]
    dist.all_gather(pieces, piece.contiguous(), group=group)
    shape = part_shape(parameter)
    return torch.cat(pieces)[: shape.numel()].view(shape)


def set_part(parameter: Tensor, part: Tensor) -> None:
    """Gives a parameter the values of this rank's tensor-parallel part; no collective.

    Raises:
        ValueError: another shape.
    """
    shape = part_shape(parameter)
    if part.shape != shape:
        raise ValueError(
            f"a part of shape {tuple(part.shape)} does not fit a parameter of {tuple(shape)}; "
            "pass this rank's part (shard_of)"
        )
    with torch.no_grad():
        if parameter.shape == shape:  # whole here, or kept whole by ZeRO-3 for being small
            parameter.copy_(part)
        if (split := _zero3(parameter)) is not None:
            piece, group = split
            start = dist.get_rank(group) * piece.numel()
            values = part.reshape(-1)[start : start + piece.numel()]
            piece[: values.numel()].copy_(values)


def _zero3(parameter: Tensor) -> tuple[Tensor, dist.ProcessGroup] | None:
    """This rank's piece of a parameter that ZeRO-3 has split, and the group it did it over."""
    piece = getattr(parameter, "ds_tensor", None)
    return None if piece is None else (piece.detach(), parameter.ds_process_group)  # type: ignore[attr-defined]


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter, over all tensor-parallel ranks."""
    shape = list(part_shape(parameter))
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
        shard: this rank's part: `part_of` the parameter, or an elementwise companion of that (a
            moment of the optimiser).
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

    Collective over the tensor-parallel ranks, and without companions under ZeRO-3 over those that
    split the parameters too.

    Raises:
        ValueError: a companion of no parameter, or of another shape.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in (parameters if companions is None else companions).items():
        if name not in parameters:
            raise ValueError(f"{name} is no parameter of the model; pass names of its parameters")
        if companions is None:
            tensor = part_of(tensor)
        if tensor.shape != part_shape(parameters[name]):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, its parameter"
                f" {tuple(part_shape(parameters[name]))}; pass the tensor of this rank's part"
            )
        yield name, full_of(tensor, parameters[name])
