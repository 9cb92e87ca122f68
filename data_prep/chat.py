"""Conversations to tokens by the tokenizer's own chat template, loss on responses only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.tokenize import TokenizerLike, encode_text

# Private-use characters stand for a message's place while the template is rendered.
_PLACE = re.compile("\ue000([0-9]+)\ue001")


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
    roles = [message["role"] for message in messages]
    contents = encode_text(tokenizer, [message["content"] for message in messages])
    tokens, mask, _ = join_turns(parse_template(roles, tokenizer), roles, contents)
    return tokens, mask
