"""Conversations to tokens by the tokenizer's own chat template, loss on responses only.

The document part of a conversation stands before its first user message. Where all is longer than a
sample, `ChatConfig.too_long` says what becomes of it.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.readers.base import Document, Drop
from data_prep.settings import ChatConfig
from data_prep.tokenize import TokenizerLike, encode_text

# Private-use characters stand for a message's place while the template is rendered.
_PLACE = re.compile("\ue000([0-9]+)\ue001")

_MAX_TEMPLATES = 1024
_SNAP = 100
"""Characters to go back for white space where a text is cut."""
_TRIES = 4


class RefusedChatError(ValueError):
    """The chat template does not take a conversation of these roles."""


@dataclass(frozen=True)
class ChatTemplate:
    """A rendered template: text of its own (token ids) with the messages' places between.

    `literals[i]` stands before the message `order[i]`; one more literal ends it. `turn_ends[i]` is
    how many tokens of the literal after message `order[i]` belong to its response (`<|im_end|>`).
    """

    literals: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    turn_ends: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the template itself, without the messages."""
        return sum(map(len, self.literals))


def parse_template(roles: Sequence[str], tokenizer: TokenizerLike) -> ChatTemplate:
    """Renders the tokenizer's chat template for messages of these roles.

    Contents never pass through the template or its control tokens: a message that spells
    `<|im_end|>` stays text.

    Raises:
        ValueError: no template.
        RefusedChatError: the template refuses these roles or leaves a response out.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template; set one (data_prep.tokenizer writes ChatML)"
        )
    messages = [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)]
    try:
        rendered: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError as error:
        raise RefusedChatError(f"the chat template refuses roles {list(roles)}: {error}") from error
    parts = _PLACE.split(rendered)
    order = tuple(int(number) for number in parts[1::2])
    missing = [i for i, role in enumerate(roles) if role == "assistant" and order.count(i) != 1]
    if missing:
        raise RefusedChatError(
            f"the chat template shows response {missing[0]} of roles {list(roles)} "
            f"{order.count(missing[0])} times, not once; use a plain ChatML template"
        )
    special = set(tokenizer.all_special_ids)
    literals = [tuple(_encode_literal(tokenizer, text)) for text in parts[0::2]]
    ends = tuple(
        next((n for n, token in enumerate(literal, start=1) if token in special), 0)
        for literal in literals[1:]
    )
    return ChatTemplate(tuple(literals), order, ends)


def _encode_literal(tokenizer: TokenizerLike, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def join_turns(
    template: ChatTemplate, roles: Sequence[str], contents: Sequence[Sequence[int]]
) -> tuple[NDArray[np.int32], NDArray[np.uint8], list[int]]:
    """Puts the messages' tokens into the template.

    Returns:
        tokens [T], loss mask [T] (1 on responses and the token that ends them), and the place of
        each message's first token (-1 where the template leaves the message out).
    """
    tokens: list[int] = list(template.literals[0])
    mask = [0] * len(tokens)
    starts = [-1] * len(roles)
    for i, literal, end in zip(
        template.order, template.literals[1:], template.turn_ends, strict=True
    ):
        response = int(roles[i] == "assistant")
        starts[i] = len(tokens)
        tokens += contents[i]
        mask += [response] * len(contents[i])
        tokens += literal
        mask += [response] * end + [0] * (len(literal) - end)
    return np.asarray(tokens, dtype=np.int32), np.asarray(mask, dtype=np.uint8), starts


def render_chat(
    messages: Sequence[dict[str, str]], tokenizer: TokenizerLike
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Tokens [T] and loss mask [T] of a conversation; 1 on responses and what ends them."""
    roles = tuple(message["role"] for message in messages)
    contents = encode_text(tokenizer, [message["content"] for message in messages])
    tokens, mask, _ = join_turns(_template(roles, tokenizer), roles, contents)
    return tokens, mask


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as tokens."""

    tokens: NDArray[np.int32]
    """[T]."""
    loss_mask: NDArray[np.uint8]
    """[T]; 1 on responses and the token that ends each."""
    num_cut_tokens: int = 0
    """Tokens that were taken away to make it fit."""


def render_document(
    document: Document,
    tokenizer: TokenizerLike,
    *,
    config: ChatConfig | None = None,
    seq_length: int | None = None,
) -> RenderedChat | Drop:
    """Tokens of a conversation with its document part, at most `seq_length` of them.

    Args:
        document: of kind `chat`.
        tokenizer: a fast tokenizer with a chat template.
        config: what becomes of conversations that are too long.
        seq_length: tokens of a sample; None: any length.

    Raises:
        ValueError: no template.
        RefusedChatError: the template refuses the roles or leaves a response out.
    """
    config = config or ChatConfig()
    messages = _with_context(document, document.context, config)
    tokens, mask = render_chat(messages, tokenizer)
    if seq_length is None or len(tokens) <= seq_length:
        return RenderedChat(tokens, mask)
    if config.too_long == "drop":
        return Drop("conversation too long", f"{len(tokens)} tokens")
    if config.too_long == "keep_head":
        if not mask[1:seq_length].any():
            return Drop("no response within seq_length", f"{len(tokens)} tokens")
        return RenderedChat(tokens[:seq_length], mask[:seq_length], len(tokens) - seq_length)
    return _truncate(document, tokenizer, config, seq_length, len(tokens))


def _with_context(document: Document, context: str, config: ChatConfig) -> list[dict[str, str]]:
    """The messages, the first user message with the document part before it."""
    messages = [dict(message) for message in document.messages]
    if context:
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = context + config.separator + first["content"]
    return messages


def _truncate(
    document: Document, tokenizer: TokenizerLike, config: ChatConfig, seq_length: int, length: int
) -> RenderedChat | Drop:
    """Shortens the document part, or the longest message before a response, until all fits."""
    messages = [dict(message) for message in document.messages]
    place = None if document.context else _longest_message(messages)
    if place is None and not document.context:
        return Drop("conversation too long", f"{length} tokens, nothing to cut")
    text = document.context if place is None else messages[place]["content"]
    offsets = _token_starts(tokenizer, text)
    room = len(offsets) - (length - seq_length)
    for _ in range(_TRIES):
        if room < max(config.min_document_tokens, 1):
            return Drop("no room for the document", f"{length} tokens, {len(offsets)} of it")
        if place is None:
            turns = _with_context(document, text[: _cut_place(text, offsets[room])], config)
        else:
            messages[place]["content"] = _without_middle(text, offsets, room)
            turns = messages
        tokens, mask = render_chat(turns, tokenizer)
        if len(tokens) <= seq_length:
            return RenderedChat(tokens, mask, length - len(tokens))
        room -= len(tokens) - seq_length  # tokens at the cut may be others than before
    return Drop("conversation too long", f"{length} tokens, cannot be cut to fit")


def _longest_message(messages: Sequence[dict[str, str]]) -> int | None:
    """The longest message before the first response."""
    roles = [message["role"] for message in messages]
    before = range(roles.index("assistant"))
    return max(before, key=lambda i: len(messages[i]["content"]), default=None)


def _token_starts(tokenizer: TokenizerLike, text: str) -> list[int]:
    """The first character of each token of a text."""
    encoded: Any = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    return [start for start, _ in encoded["offset_mapping"]]


def _cut_place(text: str, place: int) -> int:
    """The end of the word before a place, where there is one near."""
    for i in range(place, max(place - _SNAP, 0), -1):
        if text[i].isspace():
            return i
    return place


def _without_middle(text: str, offsets: Sequence[int], room: int) -> str:
    """The begin and the end of a text, about `room` tokens together."""
    head = _cut_place(text, offsets[(room + 1) // 2])
    tail = offsets[len(offsets) - room // 2] if room > 1 else len(text)
    return text[:head] + "\n" + text[tail:]


_templates: weakref.WeakKeyDictionary[Any, dict[Any, ChatTemplate]] = weakref.WeakKeyDictionary()


def _template(roles: tuple[str, ...], tokenizer: TokenizerLike) -> ChatTemplate:
    """`parse_template`, remembered for each tokenizer: few sequences of roles occur."""
    known = _templates.setdefault(tokenizer, {})
    key = (roles, tokenizer.chat_template)
    if key not in known:
        if len(known) >= _MAX_TEMPLATES:
            known.clear()
        known[key] = parse_template(roles, tokenizer)
    return known[key]
