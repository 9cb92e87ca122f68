"""Process groups for Megatron-Core, from one process on a CPU to many ranks on GPUs."""

from __future__ import annotations

import math
import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from allmem_megatron.cpu import install_cpu_stand_ins
from allmem_megatron.exchange import drain


def init_model_parallel(tp: int = 1, cp: int = 1, *, seed: int = 1234) -> None:
    """Starts torch.distributed if need be and splits its ranks for Megatron-Core.

    A process that torchrun or srun did not start becomes a world of one rank, without a port.
    Calling it again with the same sizes does nothing.

    Args:
        tp: tensor-parallel ranks.
        cp: context-parallel ranks.
        seed: of core's CUDA random number tracker.

    Raises:
        ValueError: tp times cp does not divide the world, or other sizes were set before.
    """
    install_cpu_stand_ins()
    if parallel_state.model_parallel_is_initialized():
        current = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_context_parallel_world_size(),
        )
        if current != (tp, cp):
            raise ValueError(
                f"tp={tp}, cp={cp} asked for, but this process already runs with tp={current[0]},"
                f" cp={current[1]}; start a new process for another layout"
            )
        return
    if not dist.is_initialized():
        _init_process_group()
    world = dist.get_world_size()
    if tp < 1 or cp < 1 or world % (tp * cp):
        fits = math.gcd(max(tp, 1), world)
        raise ValueError(
            f"tp={tp} times cp={cp} does not divide the {world} ranks; call init_model_parallel("
            f"tp={fits}, cp={math.gcd(max(cp, 1), world // fits)}) or start a multiple of"
            f" {max(tp, 1) * max(cp, 1)} ranks"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, context_parallel_size=cp
    )
    if torch.cuda.is_available():
        model_parallel_cuda_manual_seed(seed)


def ensure_model_parallel() -> None:
    """Makes a world of one rank unless the groups exist already.

    Raises: ValueError in one of several ranks, which have to call `init_model_parallel` first.
    """
    if parallel_state.model_parallel_is_initialized():
        install_cpu_stand_ins()
        return
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        raise ValueError(
            f"WORLD_SIZE={world} but model parallelism is not set up; call"
            " allmem_megatron.parallel.init_model_parallel(tp=…) before building a model"
        )
    init_model_parallel()


def destroy_model_parallel() -> None:
    """Ends the groups of this process, once what it has sent has been received."""
    drain()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _init_process_group() -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
