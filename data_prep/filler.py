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
        """Tokenizes texts and notes where lines end; stops after `max_tokens`.

        A line of more than `MAX_FILLER_LINE` tokens is left out. Lines end after tokens whose text
        ends with a newline; text after the last one of a document is left out.
        """
        rows: list[NDArray[np.int32]] = []
        total = 0
        for text in texts:
            rows.append(np.asarray(encode_text(tokenizer, text), dtype=np.int32))
            total += len(rows[-1])
            if max_tokens is not None and total >= max_tokens:
                break
        tokens = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int32)
        used, inverse = np.unique(tokens, return_inverse=True)
        breaks = np.asarray([tokenizer.decode([int(t)]).endswith("\n") for t in used], dtype=bool)
        ends = np.flatnonzero(breaks[inverse]) + 1 if len(tokens) else np.zeros(0, dtype=np.int64)
        lengths = np.diff(ends, prepend=0)
        kept = lengths <= MAX_FILLER_LINE
        if not kept.any():
            raise ValueError(
                "no filler text for recall documents; name packages or a path (for the eval split "
                "eval_packages or eval_path, or raise data.eval_fraction)"
            )
        tokens = tokens[: int(ends[-1])][np.repeat(kept, lengths)]
        starts = np.concatenate([[0], np.cumsum(lengths[kept])]).astype(np.int64)
        return cls(tokens, starts)

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
