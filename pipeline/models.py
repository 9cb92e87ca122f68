"""Models as the stages need them: the base, its branch, and what earlier stages trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from allmem_hf.files import restore_folder
from allmem_megatron.base_files import TOKENIZER_FILES, read_base_config
from allmem_megatron.config import BaseModelConfig
from allmem_megatron.convert import BaseCheckpoint, hf_names, load_base, load_base_into
from allmem_megatron.convert import from_hf as from_hf_names
from allmem_megatron.initialise import memory_from_base
from allmem_megatron.model import AllMemGPTModel, build_model
from allmem_megatron.sharding import full_shape, set_part, shard_of
from pipeline.checkpoint import load_checkpoint, refuse_other_config
from pipeline.config import check_memory, resolve_path, split_entry
from pipeline.fetch import SOURCES
from pipeline.fingerprint import fingerprint
from pipeline.lineage import lineage, stored_length
from pipeline.retention import chosen_checkpoint
from pipeline.schema import TRAINING_STAGES, ParallelSettings, RunConfig, section_of
from pipeline.train_schema import TrainSettings


def choose_dtype(parallel: ParallelSettings, device: torch.device) -> torch.dtype:
    """The type of weights and activations: bfloat16 where the hardware has it."""
    if parallel.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if parallel.dtype == "bfloat16" else torch.float32


def open_base(config: RunConfig) -> BaseCheckpoint | None:
    """The base model on disk, or None where the recipe makes it from scratch.

    Raises:
        ValueError: nothing is there, or it cannot be read.
    """
    path = base_path(config)
    return None if path is None else load_base(path)


def base_path(config: RunConfig) -> Path | None:
    """Where `model.path` leads, or None without one.

    Raises:
        ValueError: nothing is there.
    """
    if config.model.path is None:
        return None
    path = resolve_path(config.model.path)
    restore_folder(path)
    if not path.exists():
        name = path.parent.name
        fetched = name in SOURCES and path.name == "model.gguf"
        fetch = f"python -m pipeline.fetch {name} --out {path.parent} gets it"
        mend = fetch if fetched else "put the model there"
        raise ValueError(
            f"model.path={config.model.path} does not exist; {mend}, or set model.path to a "
            "Hugging Face folder with safetensors or a .gguf file"
        )
    return path


def base_config(config: RunConfig) -> BaseModelConfig:
    """Sizes of the base model; its weights are not read.

    Raises:
        ValueError: `model.path` does not exist or cannot be read.
    """
    if config.model.scratch is not None:
        return config.model.scratch
    path = base_path(config)
    assert path is not None
    return read_base_config(path)


def check_base(config: RunConfig) -> None:
    """Refuse a base model that a later stage would refuse, before anything is prepared for it.

    Raises:
        ValueError: it does not exist or cannot be read, memory heads that do not fit it, or
            sequences beyond the positions that it knows.
    """
    base = base_config(config)
    check_memory(config, base)
    for entry in config.stages:
        if split_entry(entry)[0] in TRAINING_STAGES:
            settings = config.train_settings(entry)
            check_length(section_of(entry), settings, stored_length(config, entry), base)


def check_length(name: str, settings: TrainSettings, stored: int, base: BaseModelConfig) -> None:
    """Refuse sequences beyond the positions that the base model knows.

    Args:
        name: of the training stage.
        settings: its section.
        stored: tokens of a sequence in the shards.
        base: the base model's sizes.
    """
    phases = [settings.of_phase(number) for number in range(max(len(settings.phases), 1))]
    length, most = max(phase.seq_length or stored for phase in phases), base.max_position_embeddings
    if length > most:
        raise ValueError(
            f"{name} would train on {length} tokens (data.seq_length={stored}) but the base model "
            f"has max_position_embeddings={most}; set data.seq_length={most}, or "
            f"{name}.seq_length={most} to train on the first tokens of longer samples"
        )


def load_model(
    config: RunConfig,
    run_dir: Path,
    *,
    branch: str,
    device: torch.device,
    before: str | None = None,
    any_dtype: bool = False,
    sequence_parallel: bool = False,
) -> AllMemGPTModel:
    """Build a model and fill it with the base's weights and those of the stages before.

    Args:
        config: the run's configuration.
        run_dir: where the stages' checkpoints are.
        branch: `none`, `allmem` or `mamba2`.
        device: where the model goes.
        before: the entry that asks; stages from it on are left out. Default: all stages count.
        any_dtype: accept stages that were trained in another dtype, and are not trained on.
        sequence_parallel: split tokens over the tensor-parallel ranks; their number must then
            split, which training sequences do and held-out documents need not.

    Raises:
        ValueError: a stage before has no checkpoint yet, or one of another configuration.
    """
    base = open_base(config)
    sizes = config.model.scratch if base is None else base.config
    assert sizes is not None
    dtype = choose_dtype(config.parallel, device)
    model = build_model(
        sizes,
        branch=branch,
        memory=None if branch == "none" else config.mixer.memory,
        dtype=dtype,
        seed=config.run.seed,
        recompute=config.parallel.recompute,
        sequence_parallel=sequence_parallel,
        embedding_std=config.model.embedding_std,
    )
    if base is not None:
        load_base_into(model, base)
    for entry in lineage(config, branch=branch, before=before):
        path = chosen_checkpoint(config, run_dir, entry)
        if path is None:
            raise ValueError(
                f"stage {entry} has no checkpoint in {run_dir}; run it first: "
                f"stage={entry} recipe={config.recipe} run.dir={run_dir}"
            )
        saved = load_checkpoint(path, with_optimizer=False)
        if "config" in saved.state:
            stored = dict(saved.state["config"])
            current = fingerprint(config, entry, dtype=dtype, device=device)
            if any_dtype:
                stored["parallel.dtype"] = current["parallel.dtype"]
            refuse_other_config(path, stored, current)
        load_weights(model, saved.model)
        if entry == "pretrain" and branch != "none" and config.mixer.memory.init_from_base:
            memory_from_base(model)
    return model.to(device)


def load_weights(model: AllMemGPTModel, tensors: Mapping[str, Tensor]) -> None:
    """Copy some weights, whole and by Hugging Face name, into the model, one after the other.

    Raises:
        ValueError: a name or a shape that the model does not have.
    """
    parameters = dict(model.named_parameters())
    places = {part: name for name in parameters for part in hf_names(name)}
    if unknown := sorted(set(tensors) - set(places)):
        raise ValueError(
            f"{unknown[0]} of the checkpoint is no parameter of this model; use the configuration "
            "that it was made with"
        )
    wanted = {places[part]: parameters[places[part]] for part in tensors}
    for name, part in PartsOfRank(model, wanted, tensors).items():
        set_part(parameters[name], part)


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
        names = {part: self._prefix + part for part in hf_names(name)}
        parts = {part: self._stored[key] for part, key in names.items() if key in self._stored}
        whole = from_hf_names(parts, self._model.base_config)[name]
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


def trained_parameters(model: AllMemGPTModel, which: str) -> dict[str, nn.Parameter]:
    """Parameters to train by name, `base`, `memory` or `all`; the others are frozen."""
    chosen = dict(model.base_parameters()) if which != "memory" else {}
    if which != "base":
        chosen.update(model.memory_parameters())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return chosen


def tokenizer_files(config: RunConfig) -> tuple[Path, ...]:
    """Files that make up the tokenizer: those of `data.tokenizer`, or the base model's own."""
    folder = resolve_path(config.data.tokenizer) if config.data.tokenizer else None
    if folder is not None and folder.is_dir():
        return tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())
    base = open_base(config)
    return () if base is None else base.tokenizer_files
