"""`stage=convert`: the frozen base teaches window + memory its own full-attention distribution.

AllMem (arXiv 2602.13680), conversion recipe: only the memory branch is trained, by the forward
KL(teacher || student) at the loss tokens; s, W and c are drawn anew in each step. The second round,
`convert:on_policy`, does the same on the student's own responses, which `collect` made.
"""

from __future__ import annotations

from pipeline.context import StageContext
from pipeline.models import load_model, trained_parameters
from pipeline.objectives import Distill
from pipeline.schedule import draw_mixer
from pipeline.schema import RunConfig
from pipeline.train_loop import Plan, train
from pipeline.train_schema import ConvertSettings


def run(config: RunConfig, context: StageContext) -> None:
    """Distil the base model into the entry's branch."""
    settings = config.train_settings(context.entry)
    assert isinstance(settings, ConvertSettings)
    model = load_model(
        config,
        context.run_dir,
        branch=context.branch,
        device=context.device,
        before=context.entry,
        sequence_parallel=config.parallel.sp,
    )
    objective = Distill(
        model,
        max_elements=settings.logits_elements,
        kl_weight=settings.kl_weight,
        ce_weight=settings.ce_weight,
        cp_mode=config.parallel.context_mode,
    )
    train(
        config,
        context,
        Plan(
            objective=objective,
            trained=trained_parameters(model, "memory"),
            settings=settings,
            loss_beyond_window=settings.loss_beyond_window,
            mixer_of_step=lambda step: draw_mixer(
                step, settings, seed=config.run.seed, mode=context.branch
            ),
        ),
    )
