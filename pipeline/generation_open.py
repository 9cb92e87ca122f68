"""The model and tokenizer that a path on the command line names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allmem_hf import AllMemConfig, AllMemForCausalLM
from allmem_hf.files import restore_folder
from allmem_megatron.base_files import load_base, open_safetensors
from allmem_megatron.config import MixerSettings
from data_prep.tokenize import TokenizerLike
from data_prep.tokenizer import load_tokenizer
from pipeline.config import build, resolve_path
from pipeline.evaluation import BRANCH_OF, find_weights
from pipeline.generation_models import assemble, build_hf_model, hf_model_from_megatron
from pipeline.models import load_model, open_base
from pipeline.schema import RunConfig
from pipeline.tokenizer import open_tokenizer

MODES = tuple(BRANCH_OF)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model ready to generate, and what its text is made of."""

    model: AllMemForCausalLM
    tokenizer: TokenizerLike
    stop_ids: frozenset[int]
    """Ids that end an answer."""
    description: str
    """What was opened, in a line."""


@dataclass(frozen=True, kw_only=True)
class MixerChoice:
    """What is asked for in place of the model's own settings; None: its own."""

    mode: str | None = None
    window_size: int | None = None
    num_sinks: int | None = None
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(f"mode={self.mode} is not one of {', '.join(MODES)}; choose one")

    def sizes(self) -> dict[str, Any]:
        """The sizes that were given."""
        names = ("window_size", "num_sinks", "chunk_size")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def open_model(
    path: Path, choice: MixerChoice, *, device: torch.device, dtype: torch.dtype
) -> Opened:
    """Opens an exported folder, a run's folder, or a base model (folder or .gguf).

    Args:
        path: of the folder or file.
        choice: another mixer or other sizes than the model's own.
        device: where the model goes.
        dtype: of its weights and activations.

    Raises:
        ValueError: nothing of the kind is there, or a mixer that it has no weights for.
    """
    restore_folder(path)
    if not path.exists():
        raise ValueError(
            f"model={path} is not there; name an exported folder, a run's folder, a Hugging Face "
            "folder or a .gguf file"
        )
    if (path / "configs").is_dir() and not (path / "config.json").is_file():
        exported = path / "export"
        if not (exported / "config.json").is_file():
            return _open_run(path, choice, device, dtype)
        path = exported
    if path.is_dir() and _read_json(path / "config.json").get("model_type") == "allmem":
        return _open_export(path, choice, device, dtype)
    return _open_base(path, choice, device, dtype)


def _open_export(
    path: Path, choice: MixerChoice, device: torch.device, dtype: torch.dtype
) -> Opened:
    fields = _read_json(path / "config.json")
    own = fields.get("branch", "none")
    mode = choice.mode or (own if own != "none" else "swa")
    if choice.mode is None and fields.get("full_attention"):
        mode = "full"
    branch = BRANCH_OF[mode]
    if branch not in ("none", own):
        raise ValueError(
            f"mode={mode} needs weights of that branch, {path} has {own}; leave mode out, or name "
            "another export"
        )
    for key in ("auto_map", "architectures", "model_type", "dtype", "transformers_version"):
        fields.pop(key, None)
    fields |= {"branch": branch, "full_attention": mode == "full", **choice.sizes()}
    stored = open_safetensors(path)
    names = [name for name in stored if branch != "none" or ".memory." not in name]
    tensors = _moved({name: stored[name] for name in names}, device, dtype)
    model = assemble(AllMemConfig(**fields), tensors)
    tokenizer = load_tokenizer(path)
    return Opened(
        model=model,
        tokenizer=tokenizer,
        stop_ids=_stop_ids(tokenizer, fields, path),
        description=f"{path} ({_mixer_words(model.config, mode)})",
    )


def _open_base(path: Path, choice: MixerChoice, device: torch.device, dtype: torch.dtype) -> Opened:
    mode = choice.mode or "full"
    if BRANCH_OF[mode] != "none":
        raise ValueError(
            f"mode={mode} needs trained weights, {path} is a base model; use mode=full or mode=swa,"
            " or name an export or a run's folder"
        )
    base = load_base(path)
    tensors = _moved(base.tensors, device, dtype)
    settings = MixerSettings(mode=mode, **_defaults(choice))
    model = build_hf_model(base.config, tensors, None, settings, hf_config=base.hf_config)
    tokenizer = load_tokenizer(path)
    return Opened(
        model=model,
        tokenizer=tokenizer,
        stop_ids=_stop_ids(tokenizer, base.hf_config, path),
        description=f"{path} ({_mixer_words(model.config, mode)})",
    )


def _open_run(path: Path, choice: MixerChoice, device: torch.device, dtype: torch.dtype) -> Opened:
    """What the run's finished stages trained, by the newest configuration that was kept."""
    files = sorted((path / "configs").glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    if not files:
        raise ValueError(f"{path}/configs is empty; run a training stage first")
    config: RunConfig = build(RunConfig, _read_json(files[-1]))
    mode = choice.mode or config.mixer.branch
    if mode == "none":
        mode = "swa"
    weights = find_weights(config, path, BRANCH_OF[mode])
    if weights.missing:
        raise ValueError(f"mode={mode} cannot be had from {path}: {weights.missing}; train it")
    trained = load_model(
        config,
        path,
        branch=BRANCH_OF[mode],
        device=torch.device("cpu"),
        before=weights.before,
        any_dtype=True,
    )
    settings = MixerSettings(
        mode=mode,
        window_size=config.mixer.window_size,
        num_sinks=config.mixer.num_sinks,
        chunk_size=config.mixer.chunk_size,
    )
    settings = replace(settings, **choice.sizes())
    base = open_base(config)
    hf_config = None if base is None else base.hf_config
    model = hf_model_from_megatron(trained, settings, hf_config=hf_config)
    model = model.to(device=device, dtype=dtype)
    model.tie_weights()
    tokenizer = open_tokenizer(config)
    entries = ", ".join(weights.entries) or "the base model"
    return Opened(
        model=model,
        tokenizer=tokenizer,
        stop_ids=_stop_ids(tokenizer, hf_config or {}, resolve_path(config.model.path or ".")),
        description=f"{path}: {entries} ({_mixer_words(model.config, mode)})",
    )


def _defaults(choice: MixerChoice) -> dict[str, Any]:
    """Sizes of a base model under a window, which brings none of its own: the paper's."""
    return {"window_size": 4096, "num_sinks": 128, "chunk_size": 2048, **choice.sizes()}


def _moved(
    tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Each weight, read one by one, where and as it is needed."""
    return {name: tensors[name].to(device=device, dtype=dtype) for name in tensors}


def _mixer_words(config: AllMemConfig, mode: str) -> str:
    if config.full_attention:
        return "full attention"
    words = f"{mode}, window {config.window_size}, {config.num_sinks} sinks"
    return f"{words}, chunk {config.chunk_size}" if config.branch == "allmem" else words


def _stop_ids(tokenizer: TokenizerLike, config: Mapping[str, Any], folder: Path) -> frozenset[int]:
    """End ids of the tokenizer, the configuration and `generation_config.json`."""
    found: set[int] = set()
    generation = folder / "generation_config.json"
    sources = [config.get("eos_token_id"), tokenizer.eos_token_id]
    if generation.is_file():
        sources.append(_read_json(generation).get("eos_token_id"))
    for ids in sources:
        if ids is not None:
            found.update([ids] if isinstance(ids, int) else ids)
    return frozenset(found)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value
