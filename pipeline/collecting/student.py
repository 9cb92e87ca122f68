"""The converted model as one that answers: greedy or sampled, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from allmem_hf import AllMemForCausalLM
from allmem_megatron.config import MixerSettings
from data_prep.tokenize import TokenizerLike, encode_text
from pipeline.collecting.prompts import Prompt
from pipeline.collecting.responses import Answer
from pipeline.collecting.settings import CollectSettings
from pipeline.generation import Generation, Generator
from pipeline.generation_models import hf_model_from_megatron
from pipeline.models import load_model, open_base
from pipeline.schema import RunConfig


def load_student(
    config: RunConfig, run_dir: Path, *, entry: str, branch: str, device: torch.device
) -> AllMemForCausalLM:
    """The whole model of the stages before `entry`, on every rank, with the window of `mixer`.

    Raises:
        ValueError: a stage before has no checkpoint.
    """
    settings = MixerSettings(
        mode=branch,
        window_size=config.mixer.window_size,
        num_sinks=config.mixer.num_sinks,
        chunk_size=config.mixer.chunk_size,
    )
    model = load_model(config, run_dir, branch=branch, device=device, before=entry, any_dtype=True)
    base = open_base(config)
    hf_config = None if base is None else base.hf_config
    return hf_model_from_megatron(model, settings, hf_config=hf_config, device=device)


class ModelStudent:
    """Answers prompts by a model (`pipeline.collecting.responses.Student`)."""

    def __init__(
        self, model: AllMemForCausalLM, tokenizer: TokenizerLike, settings: CollectSettings
    ) -> None:
        """Args: model: on its device; tokenizer: the run's; settings: sampling and lengths."""
        self.tokenizer, self.settings = tokenizer, settings
        self.generator = Generator(
            model, prefill_chunk=settings.prefill_chunk, max_batch=settings.batch_size
        )

    def __call__(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Answer]:
        """One answer for each prompt, drawn by its seed."""
        room = self.settings.sample_length
        limits = [
            max(1, min(self.settings.max_new_tokens, room - len(prompt.tokens) - 2))
            for prompt in prompts
        ]
        found = self.generator.generate(
            [prompt.tokens for prompt in prompts],
            max_new_tokens=limits,
            stop_ids=frozenset().union(*(prompt.stop_ids for prompt in prompts)),
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            seeds=seeds,
        )
        return [self._answer(generation) for generation in found]

    def _answer(self, generation: Generation) -> Answer:
        tokens = list(generation.tokens)
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        if not generation.stopped:
            text = text.rstrip("\ufffd")  # a character whose bytes were cut at the last token
        return Answer(
            text=text,
            num_tokens=len(tokens),
            finished=generation.stopped,
            same_tokens=encode_text(self.tokenizer, text) == tokens,
        )
