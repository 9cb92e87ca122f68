"""`stage=align`: each layer's memory learns what its window lacks of full attention.

A start before `convert`: no logits are needed, and every layer gets its own target.
"""

from __future__ import annotations

from pipeline.context import StageContext
from pipeline.models import load_model, trained_parameters
from pipeline.objectives import Align
from pipeline.schedule import draw_mixer
from pipeline.schema import RunConfig
from pipeline.train_loop import Plan, train


def run(config: RunConfig, context: StageContext) -> None:
    """Train the memory layer by layer on the base's own hidden states."""
    settings = config.align
    model = load_model(
        config,
        context.run_dir,
        branch=context.branch,
        device=context.device,
        before=context.entry,
        sequence_parallel=config.parallel.sp,
    )
    train(
        config,
        context,
        Plan(
            objective=Align(
                model,
                max_elements=settings.logits_elements,
                cp_mode=config.parallel.context_mode,
            ),
            trained=trained_parameters(model, "memory"),
            settings=settings,
            mixer_of_step=lambda step: draw_mixer(
                step, settings, seed=config.run.seed, mode="align"
            ),
        ),
    )
