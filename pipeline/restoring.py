"""From a checkpoint into the engine of any layout, one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from allmem_megatron.convert import hf_names
from allmem_megatron.model import AllMemGPTModel
from pipeline.checkpoint import MODEL_FILE, OPTIMIZER_FILE, Checkpoint
from pipeline.engine import MOMENTS, Engine
from pipeline.models import PartsOfRank


def restore(
    saved: Checkpoint,
    model: AllMemGPTModel,
    trained: Mapping[str, nn.Parameter],
    engine: Engine,
) -> None:
    """Go on from a checkpoint's weights and moments.

    Args:
        saved: holds whole tensors by Hugging Face name.
        model: gives the layout.
        trained: parameters of the engine by the model's own names.
        engine: gets this rank's parts.

    Raises:
        ValueError: a tensor too many or too few, or of another shape.
    """
    _refuse_other_names(saved, trained)
    moments = {
        moment: PartsOfRank(model, trained, saved.optimizer, f"{moment}.") for moment in MOMENTS
    }
    # Skipped steps leave AdamW's count as it is; earlier programs skipped none.
    updates = int(saved.state.get("updates", saved.step))
    engine.load(PartsOfRank(model, trained, saved.model), moments, step=updates)


def _refuse_other_names(saved: Checkpoint, trained: Mapping[str, nn.Parameter]) -> None:
    wanted = {part for name in trained for part in hf_names(name)}
    moments = {f"{moment}.{name}" for moment in MOMENTS for name in wanted}
    for file, names, held in (
        (MODEL_FILE, wanted, set(saved.model)),
        (OPTIMIZER_FILE, moments, set(saved.optimizer)),
    ):
        for name in sorted(names ^ held)[:1]:
            problem, trains = ("lacks", "it") if name in names else ("holds", "no such tensor")
            raise ValueError(
                f"{saved.path / file} {problem} {name} and this stage trains {trains}; use the "
                "configuration that it was made with, or delete the folder to go on from the one "
                "before it"
            )
