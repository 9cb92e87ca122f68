"""From records (JSON objects, rows of tables) to documents, by the names of their fields."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.config import CHAT_KINDS, SourceConfig
from data_prep.readers.base import Document, UnitReport

_MISSING = object()
_KNOWN_ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "assistant"), "assistant"),
    "system": "system",
}
_DEFAULT_FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "role": ("role", "from"),
    "content": ("content", "value"),
    "document": ("document", "context"),
    "question": ("question",),
    "answer": ("answer", "answers"),
}


class RecordError(ValueError):
    """A record that is no document; the message says why and is one of few."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


class RecordReader:
    """Makes documents of one source's records."""

    def __init__(self, config: SourceConfig) -> None:
        self._source = config.name
        self._chat = config.read_kind in CHAT_KINDS
        self._fields = {**_DEFAULT_FIELDS, "text": (config.text_field,), "id": (config.id_field,)}
        self._fields |= {name: (where,) for name, where in config.fields.items()}
        self._roles = {**_KNOWN_ROLES, **config.roles}
        self._needs_response = config.needs_response

    @property
    def columns(self) -> tuple[str, ...]:
        """Top-level names that records are read for, for tables."""
        names = ("id", *_DEFAULT_FIELDS) if self._chat else ("id", "text")
        places = [place for name in names for place in self._fields[name]]
        return tuple(dict.fromkeys(part for p in places for part in (p, p.split(".")[0])))

    @property
    def needed(self) -> tuple[str, ...]:
        """Of the columns those without which no record of a table can be read."""
        return () if self._chat else (self._fields["text"][0].split(".")[0],)

    def identity(self, record: Mapping[str, Any], where: str) -> str:
        """The record's own name, or its place where it has none."""
        value = self._get(record, "id")
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            return where
        return str(value).encode("utf-8", "backslashreplace").decode()

    def document(
        self, record: Any, where: str, report: UnitReport, *, excerpt: bytes | str = ""
    ) -> Document | None:
        """The record's document (with split `train`); None, counted, where there is none."""
        try:
            document = self._parse(record, where)
        except RecordError as error:
            report.bad(error.reason, where, detail=error.detail, excerpt=excerpt or _shown(record))
            return None
        if not document.num_characters:
            report.num_empty += 1
            return None
        return document

    def _parse(self, record: Any, where: str) -> Document:
        if not isinstance(record, Mapping):
            raise RecordError("record is no JSON object")
        identity = self.identity(record, where)
        if self._chat:
            context, messages = self._parse_chat(record)
            return Document("", identity, self._source, "chat", messages, context)
        place = self._fields["text"][0]
        value = self._get(record, "text")
        if value is _MISSING:
            raise RecordError(f"field {place!r} is missing")
        return Document(_text(value, f"field {place!r} is no text"), identity, self._source)

    def _parse_chat(self, record: Mapping[str, Any]) -> tuple[str, tuple[dict[str, str], ...]]:
        """Document part and messages of `messages`, `conversations`, or question and answer."""
        turns = self._get(record, "messages")
        if turns in (_MISSING, None):
            turns = self._get(record, "conversations")
        messages = [] if turns in (_MISSING, None) else self._messages(turns)
        question = self._get(record, "question")
        if question not in (_MISSING, None):
            messages.append({"role": "user", "content": _text(question, "question is no text")})
        if messages and messages[-1]["role"] == "user":  # ChatQA: the response stands apart
            answer = self._get(record, "answer")
            if answer not in (_MISSING, None):
                messages.append({"role": "assistant", "content": _answer(answer)})
        if not messages:
            raise RecordError("messages missing or empty")
        roles = [message["role"] for message in messages]
        if self._needs_response and "assistant" not in roles:
            raise RecordError("no assistant message")
        document = self._get(record, "document")
        if document in (_MISSING, None, ""):
            return "", tuple(messages)
        if "user" not in roles:
            raise RecordError("a document part without a user message")
        return _text(document, "document part is no text"), tuple(messages)

    def _messages(self, turns: Any) -> list[dict[str, str]]:
        if isinstance(turns, Mapping):  # a table's list of structures may come as one of lists
            turns = _rows(turns)
        if not isinstance(turns, Sequence) or isinstance(turns, str | bytes):
            raise RecordError("messages missing or empty")
        messages = []
        for turn in turns:
            if not isinstance(turn, Mapping):
                raise RecordError("a message is no object")
            role = self._get(turn, "role")
            known = self._roles.get(role) if isinstance(role, str) else None
            if known is None:
                shown = "missing" if role is _MISSING else repr(role)[:40]
                raise RecordError("role is not system, user or assistant", shown)
            content = self._get(turn, "content")
            messages.append({"role": known, "content": _content(content)})
        return messages

    def _get(self, record: Mapping[str, Any], name: str) -> Any:
        """The value of a field under the first of its names that the record has."""
        for place in self._fields[name]:
            value = _follow(record, place)
            if value is not _MISSING:
                return value
        return _MISSING


def _follow(record: Any, place: str) -> Any:
    """The value at a name, or at a path of names and list positions divided by dots."""
    if isinstance(record, Mapping) and place in record:
        return record[place]
    value = record
    for part in place.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return _MISSING
    return value


def _rows(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    lists = {name: column for name, column in columns.items() if isinstance(column, list)}
    if not lists or len({len(column) for column in lists.values()}) != 1:
        raise RecordError("messages are no list")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _content(value: Any) -> str:
    """A message's text; parts of the form {type: text, text: …} are joined."""
    if isinstance(value, list):
        texts = [p.get("text") for p in value if isinstance(p, Mapping) and p.get("type") == "text"]
        if len(texts) != len(value):
            raise RecordError("a message has parts that are no text")
        return "\n".join(_text(text, "a message's content is no text") for text in texts)
    return _text(value, "a message's content is no text")


def _answer(value: Any) -> str:
    """An answer, or the first of several."""
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, Mapping) and "text" in value:
        value = value["text"]
    return _text(value, "answer is no text")


def _shown(record: Any) -> str:
    """How a record begins, without spelling all of it."""
    if not isinstance(record, Mapping):
        return str(record)[:200]
    return ", ".join(
        f"{name}: {(value[:60] if isinstance(value, str | bytes | list) else value)!r}"
        for name, value in record.items()
    )


def _text(value: Any, reason: str) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RecordError("invalid UTF-8", f"byte {error.start}") from error
    if not isinstance(value, str):
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise RecordError(reason, "null")
        raise RecordError(reason, "" if value is _MISSING else type(value).__name__)
    try:  # JSON may spell lone surrogates, which are no Unicode text
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(reason, f"lone surrogate at character {error.start}") from error
    return value
