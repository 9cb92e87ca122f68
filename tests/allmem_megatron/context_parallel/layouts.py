"""Layouts of the same ranks, one after the other, and what the cases compare with."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from allmem_megatron.exchange import drain
from allmem_megatron.parallel import destroy_model_parallel, init_model_parallel

_groups: dict[tuple[int, int], dict[str, Any]] = {}
"""What core's parallel_state holds in each layout: its groups stay, for they cost threads."""


def switch(tp: int, cp: int) -> None:
    """Goes over to another layout; the library itself has one layout a process."""
    held = vars(parallel_state)
    if (tp, cp) not in _groups:
        drain()
        held.update(copy.deepcopy(_empty))
        init_model_parallel(tp, cp)
        _groups[tp, cp] = {name: held[name] for name in _empty}
    held.update(_groups[tp, cp])


_empty = {n: v for n, v in vars(parallel_state).items() if n.startswith("_") and n[1].isupper()}


def leave() -> None:
    dist.barrier()
    destroy_model_parallel()


def group() -> dist.ProcessGroup:
    return parallel_state.get_context_parallel_group()


def deviation(got: Tensor, wanted: Tensor, least: float = 0.0) -> float:
    """The largest difference, over the largest entry wanted or `least`, if that is more."""
    if got.shape != wanted.shape or not bool(got.isfinite().all()):
        return float("inf")
    if not wanted.numel():
        return 0.0
    largest = max(float(wanted.abs().max()), least)
    difference = float((got.double() - wanted.double()).abs().max())
    return difference / largest if largest else difference


def worst(deviations: dict[str, float]) -> dict[str, float]:
    """The largest of all ranks' deviations, under every name that any rank has."""
    everyone: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, deviations)
    names = {name for found in everyone for name in found}
    return {n: max(found.get(n, float("inf")) for found in everyone) for n in sorted(names)}


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
