"""`stage=sft`: next-token loss on responses, through window + memory."""

from __future__ import annotations

from pipeline.context import StageContext
from pipeline.models import load_model, trained_parameters
from pipeline.objectives import NextToken
from pipeline.schedule import draw_mixer
from pipeline.schema import RunConfig
from pipeline.train_loop import Plan, train


def run(config: RunConfig, context: StageContext) -> None:
    """Fine-tune the memory, or all weights, on the loss tokens of the shards."""
    settings = config.sft
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
            objective=NextToken(
                model,
                max_elements=settings.logits_elements,
                cp_mode=config.parallel.context_mode,
            ),
            trained=trained_parameters(model, settings.train),
            settings=settings,
            mixer_of_step=lambda step: draw_mixer(
                step, settings, seed=config.run.seed, mode=context.branch
            ),
        ),
    )
