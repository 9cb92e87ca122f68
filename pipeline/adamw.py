"""PyTorch's AdamW with a guard in front of each update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of AdamW's moments."""


def _no() -> bool:
    return False


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that changes nothing, its step count included, while `guard` says no.

    DeepSpeed calls `step` once, or once for each of its partitions, and knows the gradient's norm
    by then; the guard asks for it. Until a guard is set nothing is updated at all: DeepSpeed's
    start-up takes a step with empty gradients, which must not count.
    """

    guard: Callable[[], bool] = staticmethod(_no)

    def step(self, closure: Any = None) -> Any:
        """One update of the parameters in `param_groups`, if the guard allows it."""
        return super().step(closure) if self.guard() else None
