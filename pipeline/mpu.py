"""Megatron-Core's process groups under the names that DeepSpeed asks for.

DeepSpeed's ZeRO splits over "data parallel" ranks. Here these are DP x CP: context-parallel ranks
hold the same weights and see other tokens, so their gradients are reduced alike.

`initialize_sequence_parallel` must never be a name of this class: DeepSpeed takes it for Ulysses,
and then forgets the tensor-parallel group.
"""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state


class ModelParallelUnit:
    """What `deepspeed.initialize(mpu=…)` takes; the groups are asked for when they are needed."""

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same tensor-parallel part: DP x CP."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their global ranks."""
        return dist.get_process_group_ranks(self.get_data_parallel_group())

    def get_data_parallel_world_size(self) -> int:
        """How many they are."""
        return dist.get_world_size(self.get_data_parallel_group())

    def get_data_parallel_rank(self) -> int:
        """This rank among them."""
        return dist.get_rank(self.get_data_parallel_group())

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that together hold the model."""
        return parallel_state.get_tensor_model_parallel_group()

    def get_tensor_model_parallel_world_size(self) -> int:
        """How many they are."""
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_tensor_model_parallel_rank(self) -> int:
        """This rank among them."""
        return parallel_state.get_tensor_model_parallel_rank()

    def get_tensor_model_parallel_src_rank(self) -> int:
        """Global rank of the first of them."""
        return parallel_state.get_tensor_model_parallel_src_rank()

    # Without pipeline parallelism the model-parallel group is the tensor-parallel one.
    get_model_parallel_group = get_tensor_model_parallel_group
    get_model_parallel_world_size = get_tensor_model_parallel_world_size
    get_model_parallel_rank = get_tensor_model_parallel_rank
