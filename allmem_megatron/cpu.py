"""Stand-ins that let Megatron-Core run on a machine without CUDA.

Megatron-Core asks `torch.cuda.current_device()` where to allocate and forks a CUDA random number
tracker. Without CUDA both answers are given here: the CPU device, and a tracker that forks nothing
(this project has no dropout, and draws its initial weights from generators of its own).
With CUDA present nothing is touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from megatron.core.tensor_parallel import random as core_random


class CpuRngTracker:
    """The part of core's CudaRNGStatesTracker that a model without dropout needs."""

    def is_initialized(self) -> bool:
        return True

    def reset(self) -> None:
        return None

    def add(self, name: str, seed: int) -> None:
        del name, seed

    def get_states(self) -> dict[str, torch.Tensor]:
        return {}

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        del states

    @contextlib.contextmanager
    def fork(self, name: str = "") -> Iterator[None]:
        del name
        yield


def _cpu_device() -> torch.device:
    return torch.device("cpu")


def install_cpu_stand_ins() -> bool:
    """Installs the stand-ins where CUDA is absent; True if they are in place afterwards."""
    if torch.cuda.is_available():
        return False
    torch.cuda.current_device = _cpu_device  # type: ignore[assignment]
    torch.cuda.synchronize = _do_nothing  # type: ignore[assignment]  # dist_checkpointing calls it
    core_random._CUDA_RNG_STATE_TRACKER = CpuRngTracker()
    core_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    return True


def _do_nothing(device: object = None) -> None:
    del device
