"""Process groups for Megatron-Core, from one process on a CPU to many ranks on GPUs."""

from __future__ import annotations

import math
import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from allmem_megatron.cpu import install_cpu_stand_ins


def init_model_parallel(tp: int = 1, cp: int = 1, *, seed: int = 1234) -> None:
    """Starts torch.distributed if need be and splits its ranks for Megatron-Core.

    A process that torchrun or srun did not start becomes a world of one rank, without a port.
    Calling it again with the same sizes does nothing.

    Args:
        tp: tensor-parallel ranks.
        cp: context-parallel ranks; only 1 so far.
        seed: of core's CUDA random number tracker.

    Raises:
        ValueError: tp does not divide the world, cp > 1, or other sizes were set before.
    """
    if cp != 1:
        raise ValueError(
            f"cp={cp}: context parallelism is not built yet; call init_model_parallel(cp=1)"
        )
    install_cpu_stand_ins()
    if parallel_state.model_parallel_is_initialized():
        current = parallel_state.get_tensor_model_parallel_world_size()
        if current != tp:
            raise ValueError(
                f"tp={tp} asked for, but this process already runs with tp={current};"
                " start a new process for another layout"
            )
        return
    if not dist.is_initialized():
        _init_process_group()
    world = dist.get_world_size()
    if world % tp:
        raise ValueError(
            f"tp={tp} does not divide the {world} ranks; call"
            f" init_model_parallel(tp={math.gcd(tp, world)}) or start a multiple of {tp} ranks"
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
    """Ends the groups of this process."""
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
