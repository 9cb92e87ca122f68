"""Four ranks that build each layout which the plan calls legal and train one step of `convert`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from megatron.core import parallel_state

from allmem_megatron.model import build_model
from allmem_megatron.parallel import init_model_parallel
from pipeline.batches import MicroBatch
from pipeline.distributed import Ranks, init_distributed
from pipeline.engine import Engine
from pipeline.models import trained_parameters
from pipeline.planning.estimate import task_of
from pipeline.planning.hardware import GPUS
from pipeline.planning.layouts import Layout, check
from pipeline.planning.passes import Task, objective_for
from tests.pipeline_plan.test_legal import PLAIN, RECOMPUTED, name, wanted


def train(layout: Layout, world: Ranks) -> float:
    """Loss of the first step under a layout."""
    config, work = wanted()
    phase, split = work.phases[0], check(config, work, layout)[0]
    ranks = world.with_layout(tp=layout.tp, cp=layout.cp)
    parallel_state.destroy_model_parallel()
    init_model_parallel(layout.tp, layout.cp)
    task: Task = task_of(
        work, phase, layout, split.micro_batch_size, gpu=GPUS["cpu"], dtype="float32"
    )
    model = build_model(
        work.base,
        branch=work.branch,
        memory=work.memory,
        recompute=layout.recompute,
        sequence_parallel=layout.sp,
    )
    trained = trained_parameters(model, work.trains)
    objective = objective_for(task, model)
    engine = Engine(
        objective,
        trained,
        ranks=ranks,
        optim=config.optim,
        zero_stage=layout.zero_stage,
        dtype=torch.float32,
        micro_batch_size=split.micro_batch_size,
        num_micro_batches=split.num_micro_batches,
    )
    generator = torch.Generator().manual_seed(ranks.dp_rank)
    batches = []
    for _ in range(split.num_micro_batches):
        tokens = torch.randint(2048, (1, phase.length), generator=generator)
        whole = MicroBatch.of(tokens, torch.ones_like(tokens, dtype=torch.bool), None)
        batches.append(whole.shard(ranks.cp_rank, ranks.cp))
    with objective.active(phase.typical):
        result = engine.train_step(batches, lr=1e-3)
    engine.close()
    return result.loss


def main() -> None:
    """All of them, in one start of the ranks."""
    world = init_distributed(device="cpu")
    outcomes: dict[str, float | str] = {}
    for layout in PLAIN if sys.argv[2] == "PLAIN" else RECOMPUTED:
        try:
            outcomes[name(layout)] = train(layout, world)
        except ValueError as error:  # on all ranks alike
            outcomes[name(layout)] = str(error)
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
