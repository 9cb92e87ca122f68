"""Section `plan`: the machine that a plan is for, and what it assumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """The machine that `stage=plan` plans for, and what it assumes. Other stages do not read it."""

    gpu: str = "h100"
    """Name of the device: h100, h200, a100-80gb, a100-40gb, b200, l40s, rtx4090, or cpu."""

    num_gpus: int = 8
    """GPUs of the run, one rank each."""

    gpus_per_node: int = 8
    """GPUs joined by the fast links of one machine."""

    node_gb_s: float = 50.0
    """Bandwidth between machines for each GPU, GB/s in one direction; 50 is a 400 Gbit/s card."""

    mfu: float = 0.5
    """Share of the GPU's dense FLOP/s that matrix products reach: assumed, not measured."""

    reserve_gb: float = 2.0
    """Memory of each GPU left to the CUDA context, NCCL and the libraries' work space, GB."""

    fragmentation: float = 0.05
    """Share of the tensors' memory that the allocator loses between blocks."""

    loss_fraction: float | None = None
    """Share of the tokens that are loss tokens; default: the prepared shards' own, or 1 where there
    are none yet, which is the most that memory and time can need."""

    search: bool = True
    """Look for other layouts than the configured one."""

    top: int = 8
    """Layouts to show, the fastest that fit."""

    stage: Literal["pretrain", "align", "convert", "sft"] | None = None
    """The training stage to search layouts for; default: the recipe's longest."""

    def __post_init__(self) -> None:
        """Check the counts and shares.

        Raises:
            ValueError: a value is out of range, or an unknown GPU.
        """
        from pipeline.planning.hardware import GPUS

        for name in ("num_gpus", "gpus_per_node", "top"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"plan.{name}={getattr(self, name)} must be at least 1; set it to 1"
                )
        if not 0 < self.mfu <= 1:
            raise ValueError(f"plan.mfu={self.mfu} must lie in (0, 1]; set plan.mfu=0.5")
        if self.node_gb_s <= 0:
            raise ValueError(
                f"plan.node_gb_s={self.node_gb_s} must be positive; set plan.node_gb_s=50"
            )
        if self.reserve_gb < 0 or not 0 <= self.fragmentation < 1:
            raise ValueError(
                f"plan.reserve_gb={self.reserve_gb}, plan.fragmentation={self.fragmentation} must "
                "not be negative, the second below 1; set plan.reserve_gb=2 plan.fragmentation=0.05"
            )
        if self.loss_fraction is not None and not 0 < self.loss_fraction <= 1:
            raise ValueError(
                f"plan.loss_fraction={self.loss_fraction} must lie in (0, 1]; "
                "set plan.loss_fraction=1 where every token is a loss token"
            )
        if self.gpu not in GPUS:
            raise ValueError(f"plan.gpu={self.gpu!r} is not known; use one of {', '.join(GPUS)}")
