"""Filler: real text, tokenized once, from which documents with facts take random stretches."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from data_prep.tokenize import TokenizerLike, encode_text

MAX_FILLER_LINE = 64
"""Longer lines (tokens) are left out of the filler: mostly data, and facts need line ends."""


class FillerBank:
    """Filler tokens in one row, with the places where a line begins.

    Args:
        tokens: [F] token ids of whole lines, one text after the other.
        line_starts: sorted places in 0..F at which a line begins; F, the end of the last, included.
    """

    def __init__(self, tokens: NDArray[np.int32], line_starts: NDArray[np.int64]) -> None:
        self.tokens = tokens
        self.line_starts = line_starts

    @classmethod
    def from_texts(
        cls, texts: Iterable[str], tokenizer: TokenizerLike, *, max_tokens: int | None = None
    ) -> FillerBank:
        """Tokenizes texts line by line; stops after `max_tokens`.

        Lines are encoded with their newline, in one batch a text. A line of more than
        `MAX_FILLER_LINE` tokens is left out.
        """
        pieces: list[list[int]] = []
        lengths: list[int] = []
        total = 0
        for text in texts:
            for ids in _encode_lines(tokenizer, text):
                if len(ids) > MAX_FILLER_LINE:
                    continue
                pieces.append(ids)
                lengths.append(len(ids))
                total += len(ids)
            if max_tokens is not None and total >= max_tokens:
                break
        if total == 0:
            raise ValueError("no filler text: recall documents need at least one text source")
        tokens = np.fromiter((t for piece in pieces for t in piece), dtype=np.int32, count=total)
        ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
        return cls(tokens, np.concatenate([[0], ends]).astype(np.int64))

    def __len__(self) -> int:
        return len(self.tokens)

    def stretch(
        self, length: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """A random run of `length` tokens that ends with a line, and its line borders.

        Returns:
            tokens [length] and the sorted offsets (in 0..length) at which a line may be put in.
        """
        first = int(np.searchsorted(self.line_starts, length))
        if first >= len(self.line_starts):
            raise ValueError(
                f"filler holds {len(self)} tokens, fewer than the {length} of one document; "
                "add text sources or shorten data.seq_length"
            )
        end_index = int(rng.integers(first, len(self.line_starts)))
        end = int(self.line_starts[end_index])
        start = end - length
        begin_index = int(np.searchsorted(self.line_starts, start))
        return self.tokens[start:end], self.line_starts[begin_index : end_index + 1] - start


def _encode_lines(tokenizer: TokenizerLike, text: str) -> list[list[int]]:
    lines = [line + "\n" for line in text.split("\n")]
    if lines[-1] == "\n":
        lines.pop()  # the text ended with a newline
    return encode_text(tokenizer, lines)
