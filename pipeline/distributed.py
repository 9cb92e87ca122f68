"""Ranks: one process without a launcher, or many under torchrun or srun.

Everything that asks "am I the one who writes?" or "what is the sum over ranks?" is here, and costs
nothing with one rank.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from pipeline.survival import MainRankFailedError, StopRequested

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among the others."""

    rank: int
    """Index among all processes."""
    local_rank: int
    """Index on this machine; picks the GPU."""
    world_size: int
    """Processes in all."""
    device: torch.device
    """Where this rank computes."""
    tp: int = 1
    """Tensor-parallel ranks; neighbours in rank order (Megatron's order: TP, then CP, then DP)."""
    cp: int = 1
    """Context-parallel ranks."""

    @property
    def dp_size(self) -> int:
        """Pure data-parallel groups: they load different samples."""
        return self.world_size // (self.tp * self.cp)

    @property
    def dp_rank(self) -> int:
        """Which of the `dp_size` shares of the samples this rank loads."""
        return self.rank // (self.tp * self.cp)

    @property
    def cp_rank(self) -> int:
        """Which part of each sequence this rank trains on."""
        return self.rank // self.tp % self.cp

    @property
    def tp_rank(self) -> int:
        """Which part of the heads this rank holds."""
        return self.rank % self.tp

    @property
    def num_replicas(self) -> int:
        """Groups that can each compute whole sequences: DP x CP, for stages that do not train."""
        return self.world_size // self.tp

    @property
    def replica(self) -> int:
        """Which of the `num_replicas` this rank belongs to."""
        return self.rank // self.tp

    def with_layout(self, *, tp: int, cp: int) -> Ranks:
        """The same process with its place among tensor- and context-parallel ranks.

        Raises:
            ValueError: tp x cp does not divide the number of ranks.
        """
        if self.world_size % (tp * cp):
            raise ValueError(
                f"parallel.tp={tp} x parallel.cp={cp} do not divide the {self.world_size} "
                f"rank(s); start a multiple of {tp * cp} ranks (torchrun --nproc-per-node="
                f"{tp * cp}) or lower parallel.tp or parallel.cp"
            )
        return dataclasses.replace(self, tp=tp, cp=cp)

    @property
    def is_main(self) -> bool:
        """Rank 0 writes files, shows progress and talks to MLflow."""
        return self.rank == 0


def init_distributed(*, device: str = "auto", timeout_s: int = 1800) -> Ranks:
    """Join the process group: NCCL on CUDA, gloo on CPU; a group of one without a launcher.

    Args:
        device: `auto`, `cpu` or `cuda`.
        timeout_s: seconds after which a collective that waits gives up.

    Raises:
        ValueError: `cuda` is asked for and absent.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ValueError(
            "parallel.device=cuda but PyTorch sees no CUDA device; set parallel.device=cpu or "
            "install a CUDA build of torch"
        )
    use_cuda = has_cuda and device != "cpu"
    rank, world_size, local_rank = _place()
    if use_cuda:
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        torch_device = torch.device("cuda", torch.cuda.current_device())
    else:
        torch_device = torch.device("cpu")
    if not dist.is_initialized():
        backend = "nccl" if use_cuda else "gloo"
        timeout = datetime.timedelta(seconds=timeout_s)
        if world_size == 1:
            # A store in this process: no port to choose, none to collide with another run's.
            dist.init_process_group(
                backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
            )
        elif "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
            dist.init_process_group(
                backend, init_method="env://", rank=rank, world_size=world_size, timeout=timeout
            )
        else:
            raise ValueError(
                f"WORLD_SIZE={world_size} but MASTER_ADDR and MASTER_PORT are not both set; "
                "start with torchrun --nproc-per-node=N -m pipeline.run …"
            )
    # DeepSpeed asks the environment, not the group.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    return Ranks(rank=rank, local_rank=local_rank, world_size=world_size, device=torch_device)


def _place() -> tuple[int, int, int]:
    """Rank, world size and local rank from the launcher's environment."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    # srun's variables also stand in a batch script's own process, which is no rank; a script that
    # starts ranks by srun sets MASTER_ADDR.
    if "RANK" not in os.environ and "MASTER_ADDR" in os.environ and "SLURM_PROCID" in os.environ:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    rank, world_size, local_rank = (os.environ.get(name) for name in names)
    return int(rank or 0), int(world_size or 1), int(local_rank or 0)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def sum_over_ranks(
    values: Sequence[float], device: torch.device, group: dist.ProcessGroup | None = None
) -> list[float]:
    """Sum numbers over all ranks, or those of a group, in float64."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [float(value) for value in values]
    total = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(total, group=group)
    return [float(value) for value in total.tolist()]


def on_some(ranks: Ranks, chosen: bool, action: Callable[[], Result]) -> Result | None:
    """Do something on chosen ranks, which may communicate among themselves; None on the others.

    Raises:
        Exception: on a chosen rank what its action raised; on the others, if one failed, a
            MainRankFailedError with its text, or StopRequested if it was asked to stop.
    """
    result: Result | None = None
    failure: Exception | None = None
    if chosen:
        try:
            result = action()
        except Exception as error:  # noqa: BLE001 - re-raised below, after the others know
            failure = error
    failures: list[Exception | None] = [None] * ranks.world_size
    if ranks.world_size > 1:
        dist.all_gather_object(failures, _told(ranks, failure))
    if failure is not None:
        raise failure
    for told in failures:
        if told is not None:
            raise told
    return result


def _told(ranks: Ranks, failure: Exception | None) -> Exception | None:
    """What the other ranks raise when one failed."""
    if failure is None or isinstance(failure, StopRequested):
        return failure
    return MainRankFailedError(f"rank {ranks.rank} failed: {type(failure).__name__}: {failure}")


def on_main(ranks: Ranks, action: Callable[[], Result]) -> Result:
    """Do something on rank 0 and give every rank its result, or its error.

    Raises:
        Exception: on rank 0 what the action raised; elsewhere a MainRankFailedError with its text,
            so that no rank waits for ever for a rank 0 that failed. StopRequested on all ranks.
    """
    if ranks.world_size == 1:
        return action()
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if ranks.is_main:
        try:
            outcome[0] = action()
        except Exception as error:  # noqa: BLE001 - re-raised below, after the others know
            failure = error
            outcome[1] = _told(ranks, error)
    dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise outcome[1]
    result: Result = outcome[0]
    return result
