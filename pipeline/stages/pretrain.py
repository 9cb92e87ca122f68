"""`stage=pretrain`: next-token loss on all weights, full attention.

Continued pretraining of an existing model, or the way a small base model is made from scratch. The
result is also written as a Hugging Face folder that `model.path` and `transformers` take.
"""

from __future__ import annotations

from pathlib import Path

from allmem_megatron.config import MixerSettings
from allmem_megatron.convert import model_to_hf, save_hf_dir
from allmem_megatron.model import AllMemGPTModel
from pipeline.context import StageContext
from pipeline.distributed import on_main
from pipeline.models import load_model, tokenizer_files, trained_parameters
from pipeline.objectives import NextToken
from pipeline.schema import RunConfig
from pipeline.train_loop import Plan, train


def run(config: RunConfig, context: StageContext) -> None:
    """Train all weights of the base model and save it."""
    model = load_model(
        config,
        context.run_dir,
        branch="none",
        device=context.device,
        before=context.entry,
        sequence_parallel=config.parallel.sp,
    )
    settings = config.pretrain
    full = MixerSettings(mode="full")
    train(
        config,
        context,
        Plan(
            objective=NextToken(
                model,
                max_elements=settings.logits_elements,
                cp_mode=config.parallel.context_mode,
            ),
            trained=trained_parameters(model, "base"),
            settings=settings,
            mixer_of_step=lambda step: full,
        ),
    )
    _save(config, context, model)


def _save(config: RunConfig, context: StageContext, model: AllMemGPTModel) -> None:
    save_to = config.pretrain.save_to
    path = context.dir / "hf" if save_to is None else Path(save_to)
    tensors = {name: value.cpu() for name, value in model_to_hf(model).items()}
    files = tokenizer_files(config)
    on_main(context.ranks, lambda: save_hf_dir(path, model.base_config, tensors, files))
    context.say(f"pretrain: base model saved as {path}")
