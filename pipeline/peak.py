"""The most that the devices of a run could compute, for MFU (model FLOPs utilisation)."""

from __future__ import annotations

import re

import torch

from pipeline.planning.hardware import GPUS, Gpu


def peak_flops(device: torch.device, dtype: torch.dtype, *, world_size: int) -> float | None:
    """Dense FLOP/s of `world_size` devices like this one, by the data sheets of `stage=plan`.

    A CPU counts as its threads times the plan's `cpu`, so MFU there only compares runs.

    Args:
        device: this rank's.
        dtype: of the computation; the data sheets' numbers are bfloat16's on a GPU.
        world_size: number of ranks.

    Returns:
        None for a GPU that the data sheets lack, and for another type than bfloat16 on a GPU.
    """
    if device.type == "cpu":
        return GPUS["cpu"].flops * torch.get_num_threads() * world_size
    if dtype != torch.bfloat16:
        return None
    found = gpu_named(torch.cuda.get_device_name(device))
    return None if found is None else found.flops * world_size


def gpu_named(name: str) -> Gpu | None:
    """The data sheet of a device by the name that CUDA gives it, `NVIDIA H100 80GB HBM3`."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    words |= {"".join(pair) for pair in re.findall(r"(rtx) (\d{4})", name.lower())}
    for gpu in GPUS.values():
        if set(gpu.name.split("-")) <= words:
            return gpu
    return None
