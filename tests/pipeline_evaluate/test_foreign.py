"""The shuffled state: a prompt sees another prompt's memory, and of itself the window alone."""

from dataclasses import replace
from typing import Any

import torch

from allmem_megatron.config import MixerSettings
from pipeline.evaluating.foreign import ForeignMemory, donor_of
from pipeline.generation import Generator
from pipeline.generation_models import hf_model_from_megatron
from pipeline.models import load_model

SETTINGS = MixerSettings(mode="allmem", window_size=12, num_sinks=2, chunk_size=6)
PROMPT = [(11 * i) % 250 for i in range(70)]
DONOR = [(7 * i + 3) % 250 for i in range(50)]


def logits(generator: Generator, tokens: list[int]) -> torch.Tensor:
    return generator.logits(generator.read(tokens).hidden)[0]


def test_of_its_own_prompt_only_the_window_gets_through(task_run: Any) -> None:
    config = task_run.task_config()
    model = load_model(config, task_run.dir, branch="allmem", device=torch.device("cpu"))
    writer = Generator(hf_model_from_megatron(model, SETTINGS), prefill_chunk=16)
    off = replace(SETTINGS, write_off=True)
    untouched = Generator(hf_model_from_megatron(model, off), prefill_chunk=16)
    reader = Generator(hf_model_from_megatron(model, off), prefill_chunk=16)
    foreign = ForeignMemory(writer, reader.model)

    foreign.install(DONOR[:5])  # less than a chunk: nothing was written
    torch.testing.assert_close(logits(reader, PROMPT), logits(untouched, PROMPT))

    foreign.install(DONOR)
    first = logits(reader, PROMPT)
    assert (first - logits(untouched, PROMPT)).abs().max() > 1e-3
    assert (first - logits(writer, PROMPT)).abs().max() > 1e-3
    changed = PROMPT.copy()
    changed[20] = 99  # out of reach of two windows and the convolutions
    torch.testing.assert_close(logits(reader, changed), first)
    assert (logits(writer, changed) - logits(writer, PROMPT)).abs().max() > 1e-4

    other = DONOR.copy()
    other[20] = 99
    foreign.install(other)
    assert (logits(reader, PROMPT) - first).abs().max() > 1e-4
    foreign.install(DONOR)
    torch.testing.assert_close(logits(reader, PROMPT), first)


def test_every_example_has_another_one_as_donor() -> None:
    assert [donor_of(i, 4) for i in range(4)] == [1, 2, 3, 0]
