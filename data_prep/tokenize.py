"""Text to token ids, the same way everywhere in data preparation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

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


MAX_CHARACTERS = 1 << 18
"""Longer texts are cut before they are tokenized: what the tokenizer holds for a text is some
hundred bytes a token."""
_CALL_CHARACTERS = 1 << 17
"""Shorter texts go to the tokenizer together, about so many characters a call."""


class TextEncoder:
    """Plain text to token ids as `encode_text` does, without offsets and lists that nobody needs.

    The tokenizer works in a thread of its own: there glibc gives its many small allocations an
    arena of their own, not the gaps that loading a vocabulary has left all over the main one (half
    as fast again with Qwen3's).

    Args:
        backend: a `tokenizers.Tokenizer` (`tokenizer.backend_tokenizer`).
        dtype: of the ids.
        max_characters: longer texts are cut (`cut_text`); only where a cut falls can ids differ
            from those of the whole text, and not with byte-level BPE where it is at a line's end.
    """

    def __init__(
        self,
        backend: Any,
        dtype: np.dtype[Any] | type = np.int32,
        *,
        max_characters: int = MAX_CHARACTERS,
    ) -> None:
        self._backend = backend
        self._dtype = np.dtype(dtype)
        self._max_characters = max_characters
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    def __call__(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Token ids of each text, [T]."""
        if not texts:
            return []
        # A tokenizer that is shared keeps what its last caller set.
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        return self._thread.submit(self._rows, texts).result()

    def _rows(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        stretches = [cut_text(text, self._max_characters) for text in texts]
        parts = self._encode([stretch for own in stretches for stretch in own])
        rows = []
        for own in stretches:
            row = [next(parts) for _ in own]
            rows.append(np.concatenate(row) if len(row) > 1 else row[0])
        return rows

    def _encode(self, texts: list[str]) -> Iterator[NDArray[Any]]:
        first = 0
        while first < len(texts):
            last, room = first + 1, _CALL_CHARACTERS - len(texts[first])
            while last < len(texts) and (room := room - len(texts[last])) >= 0:
                last += 1
            for encoding in self._backend.encode_batch_fast(
                texts[first:last], add_special_tokens=False
            ):
                yield np.array(encoding.ids, dtype=self._dtype)
            first = last


_LINE_BORDER = re.compile(r"\n(?=\S)")
_WORD_BORDER = re.compile(r"\S(?= \S)")


def cut_text(text: str, max_characters: int) -> list[str]:
    """The text in stretches of at most so many characters.

    Each ends, if its second half has such a place, behind the last line end that no white space
    follows, else before the last single space between words: there tokenizers that split text into
    words before they look for tokens (byte-level BPE does) begin a new one anyway.
    """
    stretches = []
    start = 0
    while len(text) - start > max_characters:
        limit = start + max_characters
        border = limit
        for pattern in (_LINE_BORDER, _WORD_BORDER):
            found = _last_end(pattern, text, start + max_characters // 2, limit)
            if found is not None:
                border = found
                break
        stretches.append(text[start:border])
        start = border
    return [*stretches, text[start:]]


def _last_end(pattern: re.Pattern[str], text: str, first: int, limit: int) -> int | None:
    """The last end of a match that lies in `first:limit`, looked for in ever larger stretches."""
    width = 1 << 10
    while True:
        begin = max(first, limit - width)
        ends = [m.end() for m in pattern.finditer(text, begin, limit + 1) if m.end() <= limit]
        if ends:
            return ends[-1]
        if begin == first:
            return None
        width *= 8


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
