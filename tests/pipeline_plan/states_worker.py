"""Runs DeepSpeed's engine at every ZeRO stage on a module of plain parameters, and counts tensors.

python tests/pipeline_plan/states_worker.py OUT.json      (also under torchrun)
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allmem_megatron.parallel import init_model_parallel
from pipeline.batches import MicroBatch
from pipeline.distributed import Ranks, init_distributed
from pipeline.engine import Engine
from pipeline.objectives import Objective
from pipeline.planning.tracker import MemoryTracker
from pipeline.schema import OptimSettings

NUMBERS, COUNT = 200_000, 10
"""Of one parameter, above what ZeRO-3 leaves whole; and how many there are."""


class Plain(Objective):
    """Parameters whose activations are small, beside frozen ones; an objective without a model."""

    def __init__(self, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.trained = nn.ParameterList(
            nn.Parameter(torch.zeros(NUMBERS // 2, 2, dtype=dtype)) for _ in range(COUNT)
        )
        self.frozen = nn.Parameter(torch.zeros(NUMBERS, 3, dtype=dtype), requires_grad=False)

    def loss_count(self, batch: MicroBatch) -> int:
        """One."""
        del batch
        return 1

    def forward(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of squares, with half the gradient."""
        del batch
        total = torch.zeros(())
        for parameter in self.trained:
            total = total + (parameter * parameter.detach()).sum().float()
        return total, {}


def measure(ranks: Ranks, zero_stage: int, dtype: torch.dtype, passes: int) -> dict[str, int]:
    """Bytes after the engine was made, and most at the two moments that no pass shows."""
    module = Plain(dtype)
    names = {f"trained.{i}": p for i, p in enumerate(module.trained)}
    sizes = [sum(p.numel() for p in names.values()), module.frozen.numel()]
    tracker = MemoryTracker(real=True)
    with tracker:
        tracker.count(module.parameters())
        engine = Engine(
            module,
            names,
            ranks=ranks,
            optim=OptimSettings(),
            zero_stage=zero_stage,
            dtype=dtype,
            micro_batch_size=1,
            num_micro_batches=passes,
        )
        gc.collect()
        held, update = tracker.live, engine._update

        def watched(**options: Any) -> float:
            tracker.enter("step")
            norm = update(**options)
            tracker.enter("after")
            return norm

        engine._update = watched  # type: ignore[method-assign]
        empty = torch.zeros(1, 1)
        for _ in range(2):  # the first step makes what the second finds
            tracker.phases.pop("passes", None)
            tracker.enter("passes")
            batches = [MicroBatch(empty, empty, empty, None) for _ in range(passes)]
            engine.train_step(batches, lr=1e-3)
        tracker.close()
    result = {
        "trained": sizes[0],
        "frozen": sizes[1],
        "held": held,
        "reduction": tracker.phases["passes"].peak,
        "step": tracker.phases["step"].peak,
    }
    engine.close()
    return result


def main() -> None:
    """All stages, types and numbers of passes."""
    ranks = init_distributed(device="cpu")
    init_model_parallel()
    found = {}
    for zero_stage in (0, 1, 2, 3):
        for name in ("float32", "bfloat16"):
            for passes in (1, 2):
                if zero_stage or name == "float32":
                    key = f"{zero_stage} {name} {passes}"
                    found[key] = measure(ranks, zero_stage, getattr(torch, name), passes)
    if ranks.is_main:
        Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
