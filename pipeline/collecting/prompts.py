"""Prompts: conversations up to their last user message, as tokens that the student goes on from.

The tokens are those that the chat template puts before the last response of the same conversation,
so that the shards made of the responses hold exactly what the student has read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from data_prep.chat import ChatTemplate, join_turns, parse_template
from data_prep.config import SourceConfig
from data_prep.readers.base import Document, UnitReport
from data_prep.readers.files import is_url
from data_prep.readers.read import read_unit
from data_prep.readers.units import list_units
from data_prep.tokenize import TokenizerLike, encode_text
from pipeline.collecting.settings import CollectSettings
from pipeline.config import resolve_path

TOO_LONG = "longer than max_prompt_tokens"
NO_QUESTION = "no user message"

Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the student is asked."""

    number: int
    """Place among all prompts of all sources; decides its file and its seeds."""
    id: str
    """The record's own name, or its place."""
    source: str
    messages: tuple[Message, ...]
    """The last one is the user's."""
    tokens: tuple[int, ...]
    """In the chat template, up to where the response begins."""
    stop_ids: frozenset[int]
    """Tokens that end the response."""


@dataclass
class PromptReport:
    """What was read, and what was not taken."""

    num_prompts: int = 0
    num_bad: int = 0
    """Unreadable records."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Prompts that were not taken, by reason."""
    examples: list[str] = field(default_factory=list)
    """The first unreadable records."""
    _digest: Any = field(default_factory=hashlib.sha256)

    def take(self, prompt: Prompt) -> None:
        """Count a prompt."""
        self.num_prompts += 1
        self._digest.update(json.dumps([prompt.id, prompt.messages]).encode())

    @property
    def digest(self) -> str:
        """SHA-256 of all prompts taken so far, in order."""
        return str(self._digest.hexdigest())

    def leave_out(self, reason: str) -> None:
        """Count a prompt that is not taken."""
        self.left_out[reason] = self.left_out.get(reason, 0) + 1


class PromptSource(SourceConfig):
    """A source whose conversations need no response."""

    @property
    def needs_response(self) -> bool:
        """False: a question alone is a prompt."""
        return False

    @classmethod
    def of(cls, source: SourceConfig) -> PromptSource:
        """The same source, its path looked up in the project too."""
        values = {item.name: getattr(source, item.name) for item in fields(source)}
        path = source.path
        if path and source.read_kind.removeprefix("chat_") != "dataset" and not is_url(path):
            values["path"] = str(resolve_path(path))
        return cls(**values)


def read_prompts(
    settings: CollectSettings, tokenizer: TokenizerLike, report: PromptReport
) -> Iterator[Prompt]:
    """All prompts in order, numbered from 0; the same on every rank.

    Args:
        settings: sources and limits.
        tokenizer: a fast tokenizer with a chat template.
        report: filled while reading.

    Raises:
        ValueError: a source that is not there, a tokenizer without a chat template, too many
            unreadable records.
    """
    templates: dict[tuple[str, ...], ChatTemplate] = {}
    for source in map(PromptSource.of, settings.sources):
        read = UnitReport()
        for document in _documents(source, read):
            if report.num_prompts == settings.max_prompts:
                break
            messages = _question(document, source)
            if not messages:
                report.leave_out(NO_QUESTION)
                continue
            prompt = _fit(messages, source, settings, tokenizer, templates)
            if prompt is None:
                report.leave_out(TOO_LONG)
                continue
            kept, tokens, stops = prompt
            found = Prompt(
                number=report.num_prompts,
                id=document.id,
                source=source.name,
                messages=tuple(kept),
                tokens=tokens,
                stop_ids=stops,
            )
            report.take(found)
            yield found
        report.num_bad += read.num_bad
        report.examples += read.examples
        if report.num_prompts == settings.max_prompts:
            return


def _documents(source: SourceConfig, read: UnitReport) -> Iterator[Document]:
    """The source's documents, as many as its limits allow."""
    characters = 0
    for unit in list_units(source, "train"):
        for number, document in enumerate(read_unit(unit, read), start=read.num_documents + 1):
            yield document
            characters += document.num_characters
            if number == source.max_documents:
                return
            if source.max_characters is not None and characters >= source.max_characters:
                return


def _question(document: Document, source: SourceConfig) -> list[Message]:
    """Messages up to the last of the user; none where the user says nothing."""
    if document.kind != "chat":
        return [{"role": "user", "content": document.text}]
    messages = [dict(message) for message in document.messages]
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    if messages and document.context:
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = document.context + source.chat.separator + first["content"]
    return messages


def _fit(
    messages: list[Message],
    source: SourceConfig,
    settings: CollectSettings,
    tokenizer: TokenizerLike,
    templates: dict[tuple[str, ...], ChatTemplate],
) -> tuple[list[Message], tuple[int, ...], frozenset[int]] | None:
    """Messages, tokens and stop tokens of a prompt that is short enough, or None."""
    limit = settings.max_prompt_tokens
    tokens, stops = _render(messages, tokenizer, templates)
    if len(tokens) > limit and source.chat.too_long != "truncate_document":
        return None
    for _ in range(4):  # tokens at a cut may be others than before
        if len(tokens) <= limit:
            return messages, tokens, stops
        shorter = _without_middle(messages, len(tokens) - limit, tokenizer)
        if shorter is None:
            return None
        messages = shorter
        tokens, stops = _render(messages, tokenizer, templates)
    return (messages, tokens, stops) if len(tokens) <= limit else None


def _render(
    messages: Sequence[Message],
    tokenizer: TokenizerLike,
    templates: dict[tuple[str, ...], ChatTemplate],
) -> tuple[tuple[int, ...], frozenset[int]]:
    roles = (*(message["role"] for message in messages), "assistant")
    if roles not in templates:
        templates[roles] = parse_template(roles, tokenizer)
    template = templates[roles]
    contents = encode_text(tokenizer, [message["content"] for message in messages])
    tokens, _, starts = join_turns(template, roles, [*contents, []])
    stops = {tokenizer.eos_token_id} - {None}
    place = template.order.index(len(roles) - 1)
    if end := template.turn_ends[place]:
        stops.add(template.literals[place + 1][end - 1])
    return tuple(int(token) for token in tokens[: starts[-1]]), frozenset(stops)


def _without_middle(
    messages: Sequence[Message], excess: int, tokenizer: TokenizerLike
) -> list[Message] | None:
    """The longest message without `excess` tokens of its middle; None where too little is left."""
    place = max(range(len(messages)), key=lambda i: len(messages[i]["content"]))
    text = messages[place]["content"]
    tokens = encode_text(tokenizer, [text])[0]
    room = len(tokens) - excess - 2
    if room < 2:
        return None
    characters = len(text) * room // len(tokens)  # about; the next try is exact enough
    head = text[: (characters + 1) // 2]
    tail = text[len(text) - characters // 2 :]
    shorter = [dict(message) for message in messages]
    shorter[place]["content"] = f"{head}\n{tail}"
    return shorter
