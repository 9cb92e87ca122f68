"""Prompts: what is taken of a record, and that the student reads what the shards will hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep.chat import render_chat
from data_prep.config import SourceConfig
from data_prep.settings import ChatConfig
from data_prep.tokenizer import load_tokenizer
from pipeline.collecting.prompts import NO_QUESTION, TOO_LONG, Prompt, PromptReport, read_prompts
from pipeline.collecting.settings import CollectSettings
from pipeline.config import PROJECT_ROOT

TOKENIZER = load_tokenizer(PROJECT_ROOT / "models" / "demo_base")
USER = {"role": "user", "content": "What is noted?"}
ANSWER = {"role": "assistant", "content": "Nothing."}


def read(
    folder: Path, *records: dict[str, Any], chat: ChatConfig | None = None, **settings: Any
) -> tuple[list[Prompt], PromptReport]:
    """Prompts of some records."""
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = SourceConfig(kind="chat_jsonl", path=str(path), chat=chat or ChatConfig())
    report = PromptReport()
    found = list(read_prompts(CollectSettings(sources=[source], **settings), TOKENIZER, report))
    assert report.num_prompts == len(found)
    return found, report


def test_what_follows_the_last_question_is_left_out_and_a_question_alone_is_a_prompt(
    tmp_path: Path,
):
    found, report = read(
        tmp_path,
        {"id": "a", "messages": [USER, ANSWER]},
        {"id": "b", "messages": [USER]},
        {"id": "c", "messages": [USER, ANSWER, USER, ANSWER]},
        {"id": "d", "messages": [ANSWER]},
        {"id": "e", "document": "Much text.", "question": "Why?"},
        {"id": "f"},
    )
    assert [(prompt.number, prompt.id) for prompt in found] == [
        *((0, "a"), (1, "b"), (2, "c"), (3, "e")),
    ]
    assert found[0].tokens == found[1].tokens
    assert list(found[2].messages) == [USER, ANSWER, USER]
    assert found[3].messages[0]["content"] == "Much text.\n\nWhy?"
    assert report.left_out == {NO_QUESTION: 1}
    assert report.num_bad == 1


def test_the_student_reads_what_stands_before_its_response_in_the_shards(tmp_path: Path):
    system = {"role": "system", "content": "Be brief."}
    for prompt in read(tmp_path, {"messages": [system, USER]}, {"messages": [USER]})[0]:
        answer = {"role": "assistant", "content": "It is <|im_end|> so."}
        tokens, mask = render_chat([*prompt.messages, answer], TOKENIZER)
        length = len(prompt.tokens)
        assert tokens[:length].tolist() == list(prompt.tokens)
        assert not mask[:length].any()
        assert mask[length]
        last = int(tokens[mask.nonzero()[0][-1]])
        assert prompt.stop_ids == {last} == {TOKENIZER.convert_tokens_to_ids("<|im_end|>")}


def test_long_prompts_are_left_out_or_lose_their_middle(tmp_path: Path):
    text = "first " + "word " * 200 + "last"
    record = {"messages": [{"role": "user", "content": text}]}
    found, report = read(tmp_path, record, max_prompt_tokens=40)
    assert not found
    assert report.left_out == {TOO_LONG: 1}
    cut = ChatConfig(too_long="truncate_document")
    (prompt,), _ = read(tmp_path, record, max_prompt_tokens=40, chat=cut)
    assert 20 < len(prompt.tokens) <= 40
    content = prompt.messages[0]["content"]
    assert content.startswith("first ")
    assert content.endswith(" last")


def test_texts_are_questions_and_limits_count(tmp_path: Path):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    source = SourceConfig(kind="text", path=str(tmp_path), pattern="*.txt", file_order="sorted")
    settings = CollectSettings(sources=[source])
    for change, count in (({}, 4), ({"max_prompts": 3}, 3)):
        found = list(read_prompts(replace(settings, **change), TOKENIZER, PromptReport()))
        assert [prompt.messages[0]["content"] for prompt in found] == [
            f"text {number}" for number in range(count)
        ]
    few = replace(settings, sources=[replace(source, max_documents=2)])
    assert len(list(read_prompts(few, TOKENIZER, PromptReport()))) == 2


def test_the_digest_of_prompts_changes_with_their_text(tmp_path: Path):
    digests = [
        read(tmp_path, {"id": "a", "messages": [{"role": "user", "content": text}]})[1].digest
        for text in ("one", "one", "two")
    ]
    assert digests[0] == digests[1] != digests[2]


def test_a_source_that_is_not_there_is_named():
    source = SourceConfig(kind="chat_jsonl", path="no/such.jsonl")
    with pytest.raises(ValueError, match=r"no/such\.jsonl"):
        list(read_prompts(CollectSettings(sources=[source]), TOKENIZER, PromptReport()))
