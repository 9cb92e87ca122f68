"""Text to token ids, the same way everywhere in data preparation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

TokenizerLike = Any
"""A Hugging Face fast tokenizer (`PreTrainedTokenizerFast`)."""


@overload
def encode_text(tokenizer: TokenizerLike, text: str) -> list[int]: ...
@overload
def encode_text(tokenizer: TokenizerLike, text: Sequence[str]) -> list[list[int]]: ...
def encode_text(tokenizer: TokenizerLike, text: str | Sequence[str]) -> list[int] | list[list[int]]:
    """Token ids of plain text: nothing added, and control tokens spelt in the text stay plain text.

    A source file that contains the letters `<|im_end|>` must not end a chat turn, so special tokens
    are split like any other text.
    """
    if not isinstance(text, str) and not text:
        return []
    batch = text if isinstance(text, str) else list(text)
    encoded = tokenizer(
        batch,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: list[int] | list[list[int]] = encoded["input_ids"]
    return ids


def end_of_text_id(tokenizer: TokenizerLike) -> int:
    """The token that ends a plain document: `<|endoftext|>` where known, else the eos token.

    Raises:
        ValueError: the tokenizer has neither.
    """
    known = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    if known is not None and known != tokenizer.unk_token_id:
        return int(known)
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token; set its eos_token")
    return int(tokenizer.eos_token_id)


def pad_token_id(tokenizer: TokenizerLike) -> int:
    """The token that fills a sample's tail; it never carries loss."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return end_of_text_id(tokenizer)
