"""The models behind the rows of the table, loaded when a subject first needs them.

Documents are scored by the training model (`allmem_megatron`). Tasks that generate, or ask for the
likelihood of an answer, use the `allmem_hf` model around the same weights, whose cache has a
constant size.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allmem_megatron.convert import model_to_hf
from allmem_megatron.model import AllMemGPTModel
from pipeline.context import StageContext
from pipeline.evaluating.foreign import ForeignMemory
from pipeline.evaluating.speaker import Speaker
from pipeline.evaluation import (
    BRANCH_OF,
    Subject,
    Weights,
    find_weights,
    key_of,
    weights_identity,
)
from pipeline.generation import Generator
from pipeline.generation_models import build_hf_model
from pipeline.models import base_config, base_path, choose_dtype, load_model, open_base
from pipeline.schema import RunConfig
from pipeline.tokenizer import open_tokenizer

_ATTENTION, _WRITES = ("mode", "window_size", "num_sinks"), ("memory_off", "write_off")
SETTINGS_READ: dict[str, tuple[str, ...]] = {
    "full": ("mode",),
    "swa": _ATTENTION,
    "mamba2": (*_ATTENTION, "chunk_size"),
    "allmem": (*_ATTENTION, "chunk_size", *_WRITES, "shuffle_state"),
}
"""Settings that change what a mixer computes."""


class Subjects:
    """Weights and models of a run's mixers and controls."""

    def __init__(self, config: RunConfig, context: StageContext) -> None:
        """Find out what is trained; loads nothing."""
        self.config, self.context, self.settings = config, context, config.eval
        self.base = base_config(config)
        self.weights = {
            branch: find_weights(config, context.run_dir, branch)
            for branch in ("none", "allmem", "mamba2")
        }
        self.identities = {
            branch: weights_identity(config, context, weights)
            for branch, weights in self.weights.items()
        }
        self._models: dict[str, AllMemGPTModel] = {}
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self._generators: dict[str, Generator] = {}
        self._foreign: ForeignMemory | None = None

    def branch(self, subject: Subject) -> str:
        """The model that computes a subject: the base alone where the branch's base was changed."""
        wanted = BRANCH_OF[subject.mixer]
        if wanted != "none":
            return wanted
        changed = self.config.sft.train == "all" and any(
            entry.startswith("sft") for entry in self.weights["allmem"].entries
        )
        shared = "allmem" in self.settings.mixers and not self.weights["allmem"].missing
        return "allmem" if shared and not changed else "none"

    def model(self, subject: Subject) -> AllMemGPTModel:
        """The training model with the subject's weights."""
        branch = self.branch(subject)
        if branch not in self._models:
            weights = self.weights[branch]
            self.context.say(f"{self.context.entry}: loading {_described(weights)}")
            model = load_model(
                self.config,
                self.context.run_dir,
                branch=branch,
                device=self.context.device,
                before=weights.before,
                any_dtype=True,
            )
            model.requires_grad_(False)
            model.eval()
            for other in self._models.values():
                _share_base(model, other)
            self._models[branch] = model
        return self._models[branch]

    def generator(self, subject: Subject) -> Generator:
        """What continues tokens; of `state_shuffled` the memory that only reads.

        A collective over tensor-parallel ranks, at the first call for a subject.
        """
        if subject.name not in self._generators:
            settings = subject.settings
            if settings.shuffle_state:
                settings = replace(settings, shuffle_state=False, write_off=True)
            base, branch = open_base(self.config), self.branch(subject)
            model = build_hf_model(
                self.base,
                self._tensors_of(subject),
                None if branch == "none" else self.config.mixer.memory,
                settings,
                hf_config=None if base is None else base.hf_config,
                device=self.context.device,
            )
            generation = self.settings.generation
            self._generators[subject.name] = Generator(
                model, prefill_chunk=generation.prefill_chunk, max_batch=generation.batch_size
            )
        return self._generators[subject.name]

    def _tensors_of(self, subject: Subject) -> dict[str, Tensor]:
        """A branch's weights by Hugging Face name; all subjects' models hold these very tensors."""
        branch = self.branch(subject)
        if branch not in self._tensors:
            tensors = dict(model_to_hf(self.model(subject)))
            for other in self._tensors.values():
                for name, tensor in tensors.items():
                    if name in other and torch.equal(tensor, other[name]):
                        tensors[name] = other[name]
            self._tensors[branch] = tensors
        return self._tensors[branch]

    def alphas(self, subject: Subject) -> dict[str, float]:
        """Mean |α| over channels of each layer of the branch, equation (1)."""
        tensors = self._tensors_of(subject)
        return {
            str(layer): float(tensors[f"model.layers.{layer}.memory.alpha"].float().abs().mean())
            for layer in range(self.base.num_layers)
        }

    def release_training_models(self) -> None:
        """Let go of what only the training models hold; they are loaded anew if asked for."""
        self._models.clear()

    def speaker(self, subject: Subject) -> Speaker:
        """The subject as something that answers texts."""
        generator, tokenizer = self.generator(subject), open_tokenizer(self.config)
        return Speaker(
            generator,
            tokenizer,
            max_positions=self.max_positions,
            stop_ids=_stop_ids(
                tokenizer, generator.model.config.eos_token_id, self._of_generation_config()
            ),
            thinking=self.settings.generation.thinking,
        )

    def _of_generation_config(self) -> Any:
        """`eos_token_id` of the base folder's generation_config.json; chat models end turns so."""
        path = base_path(self.config)
        file = None if path is None else path / "generation_config.json"
        if file is None or not file.is_file():
            return None
        return json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")

    def foreign(self, subject: Subject, writer: Subject) -> ForeignMemory | None:
        """For `state_shuffled`: what puts another prompt's memory under a prompt."""
        if not subject.settings.shuffle_state:
            return None
        if self._foreign is None:
            reader = self.generator(subject).model
            self._foreign = ForeignMemory(self.generator(writer), reader)
        return self._foreign

    @property
    def max_positions(self) -> int:
        """Tokens that prompt and answer may have together.

        Raises:
            ValueError: more is asked for than the base model knows.
        """
        wanted, most = self.settings.generation.max_positions, self.base.max_position_embeddings
        if wanted > most:
            raise ValueError(
                f"eval.generation.max_positions={wanted} exceeds the base model's "
                f"max_position_embeddings={most}; set it to {most} or less, or give the model a "
                "longer range in its config.json (rope_scaling)"
            )
        return wanted or most

    def key(self, subject: Subject, *parts: Any) -> str:
        """Digest of what decides what a subject says, and of further parts.

        Of the settings those that its mixer reads, and for `full` and `swa` the base's weights
        alone: full attention is not asked anew for another window, nor for another memory.
        """
        memory = () if BRANCH_OF[subject.mixer] == "none" else ("mixer.memory",)
        decides = {
            key: value
            for key, value in self.context.fingerprint.items()
            if key.startswith(("model.", "parallel.", *memory))
        }
        branch = self.branch(subject) if memory else "none"
        return key_of(
            subject.name,
            [getattr(subject.settings, name) for name in SETTINGS_READ[subject.mixer]],
            self.identities[branch],
            decides,
            self.dtype,
            self.device_name,
            *parts,
        )

    @property
    def dtype(self) -> str:
        """Of weights and activations, `bfloat16` for example."""
        dtype = choose_dtype(self.config.parallel, self.context.device)
        return str(dtype).removeprefix("torch.")

    @property
    def device_name(self) -> str:
        """The GPU's name, or `cpu`."""
        device = self.context.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _stop_ids(tokenizer: Any, *others: Any) -> list[int]:
    """The tokenizer's end token first, then those of the model's configurations."""
    found = [tokenizer.eos_token_id]
    for ids in others:
        found += ids if isinstance(ids, list | tuple) else [ids]
    return list(dict.fromkeys(int(token) for token in found if token is not None))


def _described(weights: Weights) -> str:
    stages = zip(weights.entries, weights.checkpoints, strict=True)
    steps = ", ".join(f"{entry} {Path(path).name}" for entry, path in stages)
    return f"the base model with {steps}" if steps else "the base model"


def _share_base(model: AllMemGPTModel, other: AllMemGPTModel) -> None:
    """Let two models hold one copy of base weights that are equal."""
    theirs = dict(other.base_parameters())
    for name, parameter in model.base_parameters():
        if name in theirs and torch.equal(parameter, theirs[name]):
            parameter.data = theirs[name].data
