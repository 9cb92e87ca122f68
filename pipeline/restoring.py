"""From a checkpoint into the engine of any layout, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from allmem_megatron.convert import from_hf, hf_names
from allmem_megatron.model import AllMemGPTModel
from allmem_megatron.sharding import full_shape, shard_of
from pipeline.checkpoint import MODEL_FILE, OPTIMIZER_FILE, Checkpoint
from pipeline.engine import MOMENTS, Engine


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


class PartsOfRank(Mapping[str, Tensor]):
    """This rank's parts of stored tensors by the model's parameter names, each read when asked for.

    Args:
        model: gives the layout.
        trained: the parameters.
        stored: whole tensors by Hugging Face name.
        prefix: of the stored names.
    """

    def __init__(
        self,
        model: AllMemGPTModel,
        trained: Mapping[str, nn.Parameter],
        stored: Mapping[str, Tensor],
        prefix: str = "",
    ) -> None:
        self._model, self._trained = model, trained
        self._stored, self._prefix = stored, prefix

    def __getitem__(self, name: str) -> Tensor:
        parameter = self._trained[name]
        parts = {part: self._stored[self._prefix + part] for part in hf_names(name)}
        whole = from_hf(parts, self._model.base_config)[name]
        if whole.shape != full_shape(parameter):
            raise ValueError(
                f"{name} has shape {tuple(whole.shape)} in the checkpoint and "
                f"{tuple(full_shape(parameter))} in the model; use the configuration that it was "
                "made with"
            )
        return shard_of(whole, parameter)

    def __iter__(self) -> Iterator[str]:
        return iter(self._trained)

    def __len__(self) -> int:
        return len(self._trained)
