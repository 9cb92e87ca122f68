"""Prompts wait on the disk; samsum's answers are one line that is not empty."""

from pathlib import Path
from typing import Any

import pytest
import torch

from allmem_megatron.config import MixerSettings
from evals.longbench import build as longbench_task
from evals.longbench import names
from pipeline.evaluating.journal import Question, digest_of
from pipeline.evaluating.prompt_file import PromptFile
from pipeline.evaluating.speaker import Sampling, Speaker
from pipeline.generation import Generator
from pipeline.generation_models import hf_model_from_megatron
from pipeline.models import load_model
from pipeline.tokenizer import open_tokenizer

NEWLINE = "\n"


def test_prompts_come_back_in_any_order_and_leave_no_file(tmp_path: Path) -> None:
    prompts = PromptFile(tmp_path / "new")
    given = [(3, 1, 200000), (), tuple(range(5000))]
    for tokens in given:
        prompts.append(tokens)
    assert [prompts[2], prompts[0], prompts[1]] == [given[2], given[0], given[1]]
    assert prompts.lengths == [3, 0, 5000]
    assert prompts.digests == [digest_of(list(tokens)) for tokens in given]
    assert len(set(prompts.digests)) == len(prompts) == 3
    prompts.append((9,))  # after reading, at the end all the same
    assert list(prompts) == [*given, (9,)]
    with pytest.raises(IndexError):
        prompts[4]
    assert list((tmp_path / "new").iterdir()) == []


def test_only_samsum_has_answers_of_one_line() -> None:
    tasks = {
        name: longbench_task(name, data="none", prompts="", max_examples=0) for name in names()
    }
    assert [name for name, task in tasks.items() if task.one_line] == ["samsum"]


def test_a_one_line_answer_neither_begins_with_an_ending_token_nor_goes_past_one(
    task_run: Any,
) -> None:
    config = task_run.task_config()
    tokenizer = open_tokenizer(config)
    (newline,) = tokenizer.encode(NEWLINE)
    model = hf_model_from_megatron(
        load_model(config, task_run.dir, branch="none", device=torch.device("cpu")),
        MixerSettings(mode="full"),
    )
    generator = Generator(model)
    prompt = next(  # one whose first answer token does not stand in it, so that it can be renamed
        tokens
        for text in ("where", "who", "the sea", "green", "old stone")
        if _first(generator, tokens := tokenizer.encode(text)) not in (*tokens, newline)
    )
    with torch.no_grad():
        rows = model.model.embed_tokens.weight
        first, second = _ranked(generator, prompt)[:2]
        for token, place in ((newline, first), (tokenizer.eos_token_id, second)):
            rows[[token, place]] = rows[[place, token]]
    ranked = _ranked(generator, prompt)
    assert ranked[:2] == [newline, tokenizer.eos_token_id]
    speaker = Speaker(generator, tokenizer, max_positions=700, stop_ids=[tokenizer.eos_token_id])

    def speak(one_line: bool) -> str:
        (text,) = speaker.speak(
            [prompt],
            max_new_tokens=[20],
            stop_texts=[()],
            sampling=Sampling(),
            questions=[Question(id="a", sample=0, digest="")],
            one_line=one_line,
        )
        return text

    assert speak(one_line=False).startswith(NEWLINE)
    wanted = ranked[2:3]
    while (token := _first(generator, [*prompt, *wanted])) not in ranked[:2] and len(wanted) < 20:
        wanted.append(token)
    assert speak(one_line=True) == tokenizer.decode(wanted)


def _ranked(generator: Generator, prompt: list[int]) -> list[int]:
    return generator.logits(generator.read(prompt).hidden)[0].argsort(descending=True).tolist()


def _first(generator: Generator, prompt: list[int]) -> int:
    return _ranked(generator, prompt)[0]
