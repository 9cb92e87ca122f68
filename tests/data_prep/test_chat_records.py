"""Conversations of every form become messages, fit the sample, and carry loss where they should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.chat import RenderedChat, render_chat, render_document
from data_prep.config import SourceConfig
from data_prep.loss import document_mask, piece_mask
from data_prep.readers import Document, UnitReport, list_units, read_unit
from data_prep.readers.base import Drop
from data_prep.settings import ChatConfig

USER = {"role": "user", "content": "Two colours?"}
ANSWER = {"role": "assistant", "content": "red, blue"}
DOCUMENT = " ".join(f"Sentence number {i} of the report." for i in range(200))


def read(tmp_path: Path, records: list[Any], **fields: Any) -> tuple[list[Document], UnitReport]:
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    report = UnitReport()
    units = list_units(SourceConfig(kind="chat_jsonl", path=str(file), **fields), "train")
    return [document for unit in units for document in read_unit(unit, report)], report


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, ANSWER]},
        {
            "conversations": [
                {"from": "human", "value": USER["content"]},
                {"from": "gpt", "value": ANSWER["content"]},
            ]
        },
        {"question": USER["content"], "answer": ANSWER["content"]},
        {"messages": [USER], "answers": [ANSWER["content"], "other"]},
        {"question": USER["content"], "answers": {"text": ANSWER["content"]}},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": USER["content"]}]},
                ANSWER,
            ]
        },
        {
            "messages": {
                "role": ["user", "assistant"],
                "content": [USER["content"], ANSWER["content"]],
            }
        },
        {"messages": None, "conversations": [USER, {**ANSWER, "role": "model"}]},
    ],
)
def test_conversations_of_every_form(tmp_path: Path, record: dict[str, Any]) -> None:
    (plain,), report = read(tmp_path, [record])
    assert plain.messages == (USER, ANSWER)
    assert (plain.kind, plain.context, report.num_bad) == ("chat", "", 0)
    for name in ("document", "context"):
        (about,), _ = read(tmp_path, [{**record, name: "The report."}])
        assert (about.messages, about.context) == ((USER, ANSWER), "The report.")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": []}, "messages missing or empty"),
        ({"text": "plain"}, "messages missing or empty"),
        ({"messages": "USER: hi"}, "messages missing or empty"),
        ({"messages": ["hi"]}, "a message is no object"),
        (
            {"messages": [USER, {"role": "tool", "content": "x"}]},
            "role is not system, user or assistant",
        ),
        ({"messages": [{"content": "x"}]}, "role is not system, user or assistant"),
        ({"messages": [USER, {"role": "assistant"}]}, "a message's content is no text"),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            "a message's content is no text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]},
            "a message has parts that are no text",
        ),
        ({"messages": [USER]}, "no assistant message"),
        ({"question": "q"}, "no assistant message"),
        ({"question": 3, "answer": "a"}, "question is no text"),
        ({"question": "q", "answer": []}, "answer is no text"),
        ({"messages": [USER, ANSWER], "document": 5}, "document part is no text"),
        ({"messages": [ANSWER], "document": "d"}, "a document part without a user message"),
        ({"messages": {"role": ["user"], "content": []}}, "messages are no list"),
    ],
)
def test_broken_conversations_are_counted(
    tmp_path: Path, record: dict[str, Any], reason: str
) -> None:
    documents, report = read(tmp_path, [record, {"messages": [USER, ANSWER]}])
    assert len(documents) == 1
    assert report.reasons == {reason: 1}
    assert report.samples[0].where == "chats.jsonl:1"


def test_field_and_role_names_may_be_mapped(tmp_path: Path) -> None:
    turns = [{"who": "narrator", "said": "Be kind."}, {"who": "guest", "said": "Two colours?"}]
    record = {"uid": "u1", "log": {"turns": [*turns, {"who": "host", "said": "red, blue"}]}}
    fields = {"id": "uid", "messages": "log.turns", "role": "who", "content": "said"}
    roles = {"narrator": "system", "guest": "user", "host": "assistant"}
    (document,), _ = read(tmp_path, [record], fields=fields, roles=roles)
    assert document.id == "u1"
    assert document.messages == ({"role": "system", "content": "Be kind."}, USER, ANSWER)
    with pytest.raises(ValueError, match="must name one of system, user, assistant"):
        SourceConfig(kind="chat_jsonl", path="x", roles={"bot": "robot"})


def test_conversations_in_parquet(tmp_path: Path) -> None:
    rows = [{"messages": [USER, ANSWER], "document": "The report."}] * 3
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (unit,) = list_units(SourceConfig(kind="chat_parquet", path=str(tmp_path)), "train")
    documents = list(read_unit(unit, UnitReport()))
    assert [d.messages for d in documents] == [(USER, ANSWER)] * 3
    assert documents[0].context == "The report."


def chat(*messages: dict[str, str], context: str = "") -> Document:
    return Document("", "c1", "s", "chat", messages or (USER, ANSWER), context)


def masked(tokenizer: Any, rendered: RenderedChat) -> list[str]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], rendered.loss_mask, [0]])))
    return [tokenizer.decode(rendered.tokens[a:b]) for a, b in edges.reshape(-1, 2)]


def test_the_document_part_stands_before_the_first_question(tokenizer: Any) -> None:
    system = {"role": "system", "content": "Be kind."}
    rendered = render_document(chat(system, USER, ANSWER, context="The report."), tokenizer)
    assert isinstance(rendered, RenderedChat)
    about = [system, {**USER, "content": "The report.\n\nTwo colours?"}, ANSWER]
    tokens, mask = render_chat(about, tokenizer)
    assert np.array_equal(rendered.tokens, tokens)
    assert np.array_equal(rendered.loss_mask, mask)
    assert rendered.num_cut_tokens == 0


def test_what_fits_is_the_same_under_every_policy(tokenizer: Any) -> None:
    whole = render_document(chat(context=DOCUMENT), tokenizer)
    assert isinstance(whole, RenderedChat)
    for policy in ("drop", "keep_head", "truncate_document"):
        config = ChatConfig(too_long=policy)
        length = len(whole.tokens)
        same = render_document(chat(context=DOCUMENT), tokenizer, config=config, seq_length=length)
        assert isinstance(same, RenderedChat)
        assert np.array_equal(same.tokens, whole.tokens)
        other = render_document(
            chat(context=DOCUMENT), tokenizer, config=config, seq_length=length - 1
        )
        assert isinstance(other, Drop) == (policy == "drop")


def test_long_conversations_are_dropped_with_their_length(tokenizer: Any) -> None:
    dropped = render_document(chat(context=DOCUMENT), tokenizer, seq_length=100)
    assert isinstance(dropped, Drop)
    assert dropped.reason == "conversation too long"
    assert dropped.detail.endswith(" tokens")


def test_the_head_is_kept_while_it_holds_a_response(tokenizer: Any) -> None:
    config = ChatConfig(too_long="keep_head")
    turns = [USER, ANSWER] * 20
    whole, mask = render_chat(turns, tokenizer)
    rendered = render_document(chat(*turns), tokenizer, config=config, seq_length=100)
    assert isinstance(rendered, RenderedChat)
    assert np.array_equal(rendered.tokens, whole[:100])
    assert np.array_equal(rendered.loss_mask, mask[:100])
    assert rendered.num_cut_tokens == len(whole) - 100
    late = render_document(chat(context=DOCUMENT), tokenizer, config=config, seq_length=100)
    assert isinstance(late, Drop)
    assert late.reason == "no response within seq_length"


@pytest.mark.parametrize("seq_length", [200, 333, 1000])
@pytest.mark.parametrize("text", [DOCUMENT, "会议讨论预算。" * 400, "x" * 4000, "é\u0301 \n" * 900])
def test_the_document_part_is_cut_and_question_and_answer_stay(
    tokenizer: Any, text: str, seq_length: int
) -> None:
    config = ChatConfig(too_long="truncate_document")
    rendered = render_document(chat(context=text), tokenizer, config=config, seq_length=seq_length)
    assert isinstance(rendered, RenderedChat)
    assert seq_length - 40 <= len(rendered.tokens) <= seq_length
    assert masked(tokenizer, rendered) == ["red, blue<|im_end|>"]
    shown = tokenizer.decode(rendered.tokens)
    user = shown.partition("user\n")[2].partition("<|im_end|>")[0]
    part = user.removesuffix("\n\nTwo colours?")
    assert part != user
    assert part.strip()
    whole, _ = render_chat([{**USER, "content": part + "\n\nTwo colours?"}, ANSWER], tokenizer)
    assert rendered.num_cut_tokens > 0
    if text == DOCUMENT:
        assert text.startswith(part)
        assert text[len(part)] == " "
        assert np.array_equal(rendered.tokens, whole)


def test_without_a_document_part_the_longest_message_loses_its_middle(tokenizer: Any) -> None:
    config = ChatConfig(too_long="truncate_document")
    asked = {"role": "user", "content": "BEGIN " + DOCUMENT + " What is the END?"}
    system = {"role": "system", "content": "Be kind."}
    turns = (system, asked, ANSWER, USER, ANSWER)
    rendered = render_document(chat(*turns), tokenizer, config=config, seq_length=400)
    assert isinstance(rendered, RenderedChat)
    assert len(rendered.tokens) <= 400
    text = tokenizer.decode(rendered.tokens)
    for part in ("Be kind.", "BEGIN Sentence number 0", "What is the END?", "Two colours?"):
        assert part in text
    assert masked(tokenizer, rendered) == ["red, blue<|im_end|>"] * 2


def test_too_little_room_for_the_document_drops_the_conversation(tokenizer: Any) -> None:
    config = ChatConfig(too_long="truncate_document", min_document_tokens=50)
    without, _ = render_chat([USER, ANSWER], tokenizer)
    for room, kept in ((45, False), (70, True)):
        rendered = render_document(
            chat(context=DOCUMENT), tokenizer, config=config, seq_length=len(without) + room
        )
        assert isinstance(rendered, RenderedChat) == kept
    long_answer = {**ANSWER, "content": DOCUMENT}
    dropped = render_document(
        chat(USER, long_answer, context="Short."), tokenizer, config=config, seq_length=200
    )
    assert isinstance(dropped, Drop)
    assert dropped.reason == "no room for the document"
    only_answer = render_document(chat(long_answer), tokenizer, config=config, seq_length=200)
    assert isinstance(only_answer, Drop)


def test_loss_targets_by_response_and_by_distance() -> None:
    response = np.asarray([0, 0, 1, 1, 0, 1], dtype=np.uint8)

    def masks(kind: str, given: Any, **fields: Any) -> list[int]:
        source = SourceConfig(kind=kind, path="x", **fields)
        return piece_mask(source, document_mask(source, 6, given)).tolist()

    assert masks("jsonl", None) == masks("jsonl", None, loss="all") == [1] * 6
    assert masks("chat_jsonl", response) == response.tolist()
    assert masks("chat_jsonl", response, loss="response") == response.tolist()
    assert masks("chat_jsonl", response, loss="all") == [1] * 6
    assert masks("jsonl", None, loss="beyond", min_distance=4) == [0, 0, 0, 0, 1, 1]
    assert masks("chat_jsonl", response, loss="beyond", min_distance=3) == [0, 0, 0, 1, 0, 1]
    assert masks("jsonl", None, loss="beyond", min_distance=9) == [0] * 6
    assert response.tolist() == [0, 0, 1, 1, 0, 1]  # what was given is not changed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "jsonl", "loss": "response"}, "needs conversations; kind=jsonl has none"),
        ({"kind": "jsonl", "loss": "beyond"}, "loss=beyond needs min_distance above 0"),
        ({"kind": "jsonl", "min_distance": 5}, "loss=auto with min_distance=5"),
        ({"kind": "jsonl", "loss": "half"}, "is not one of auto, all, response, beyond"),
    ],
)
def test_wrong_loss_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceConfig(path="x", **fields)
    with pytest.raises(ValueError, match="is not one of drop, keep_head, truncate_document"):
        ChatConfig(too_long="middle")
