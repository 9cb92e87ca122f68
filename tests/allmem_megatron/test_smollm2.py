"""The real SmolLM2-135M, where its GGUF file is at hand (ALLMEM_SMOLLM2_GGUF names it)."""

from __future__ import annotations

import math
import os

import pytest
import torch

from allmem_megatron.config import MemoryConfig, MixerSettings
from allmem_megatron.convert import load_base, load_base_into
from allmem_megatron.model import build_model

PATH = os.environ.get("ALLMEM_SMOLLM2_GGUF", "")

TEXT = """The committee met on the first Monday of the month to consider the plans for the new
library. Most of the members had read the architect's report, and several had brought questions
about the cost of the foundations. The chairman explained that the ground near the river was soft,
and that the engineers had asked for deeper piles than were first expected. After an hour of
discussion, the members agreed to ask for a second opinion before they signed any contract. In the
meantime, the books from the old building would be kept in the town hall, where the public could
read them on weekday afternoons. The secretary was asked to write to the newspaper so that everyone
would know about the change, and the meeting closed shortly after nine o'clock."""


@pytest.mark.skipif(not PATH, reason="ALLMEM_SMOLLM2_GGUF does not name a file")
def test_smollm2_reads_english():
    from transformers import AutoTokenizer

    folder, file = os.path.split(PATH)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    tokens = torch.tensor(tokenizer(TEXT)["input_ids"])[None]
    checkpoint = load_base(PATH)
    memory = MemoryConfig(memory_size=384)
    model = build_model(checkpoint.config, branch="allmem", memory=memory, init_base=False)
    load_base_into(model, checkpoint)
    losses = {}
    for mode in ("full", "swa", "allmem"):
        settings = MixerSettings(mode=mode, window_size=32, num_sinks=4, chunk_size=32)
        with torch.no_grad(), model.mixer(settings):
            logits = model.logits(model.hidden_states(tokens)[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[0, 1:])
        losses[mode] = float(loss)
    assert 5 < math.exp(losses["full"]) < 25
    assert losses["full"] < losses["swa"] < losses["full"] + 1
    assert losses["allmem"] == losses["swa"]  # alpha = 0
