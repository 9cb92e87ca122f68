"""Filler: real text, tokenized once, from which documents with facts take random stretches.

A line can be put in wherever a line ends. Tokenizers differ in where that is: a newline may end a
token, be one, or begin one together with the indentation behind it. So a border is either behind a
newline (the new line then brings its own newline behind it) or before one (it brings it in front).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.tokenize import TokenizerLike, encode_text

MAX_FILLER_LINE = 64
"""Longer lines (tokens) are left out of the filler: mostly data, and facts need line ends."""


@dataclass(frozen=True)
class Stretch:
    """A run of filler and the places where a line may be put in."""

    tokens: NDArray[np.int32]
    """[F] token ids."""
    borders: NDArray[np.int64]
    """Sorted offsets in 0..F, the last one F."""
    before_newline: NDArray[np.bool_]
    """For each border: whether the newline comes after it rather than before."""

    def snap(self, allowed: slice, places: NDArray[np.int64]) -> list[int]:
        """Border numbers: the last allowed one at or before each place, else the first allowed."""
        first = allowed.start or 0
        at = np.searchsorted(self.borders[allowed], places, side="right") - 1
        return [first + max(int(i), 0) for i in at]


class FillerBank:
    """Filler tokens in one row, with the places where lines end.

    Args:
        tokens: [F] token ids.
        borders: sorted places in 0..F, the first 0, the last F, at most `MAX_FILLER_LINE` apart.
        before_newline: as in `Stretch`.
    """

    def __init__(
        self,
        tokens: NDArray[np.int32],
        borders: NDArray[np.int64],
        before_newline: NDArray[np.bool_],
    ) -> None:
        self.tokens = tokens
        self.borders = borders
        self.before_newline = before_newline

    @classmethod
    def from_texts(
        cls, texts: Iterable[str], tokenizer: TokenizerLike, *, max_tokens: int | None = None
    ) -> FillerBank:
        """Tokenizes texts and notes where lines end; stops after `max_tokens`.

        A line of more than `MAX_FILLER_LINE` tokens is left out.

        Raises:
            ValueError: no line is left.
        """
        rows: list[NDArray[np.int32]] = []
        total = 0
        for text in texts:
            whole = text if text.endswith("\n") else text + "\n"
            rows.append(np.asarray(encode_text(tokenizer, whole), dtype=np.int32))
            total += len(rows[-1])
            if max_tokens is not None and total >= max_tokens:
                break
        tokens = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int32)
        used, inverse = np.unique(tokens, return_inverse=True)
        shown = [tokenizer.decode([int(token)]) for token in used]
        behind = np.asarray([text.endswith("\n") for text in shown], dtype=bool)[inverse]
        before = np.asarray([text.startswith("\n") for text in shown], dtype=bool)[inverse]
        newline = np.asarray(encode_text(tokenizer, "\n"), dtype=np.int32)
        places = np.flatnonzero(before & ~behind)
        ends = np.concatenate([np.flatnonzero(behind) + 1, places]).astype(np.int64)
        kinds = np.concatenate(
            [np.zeros(len(ends) - len(places), bool), np.ones(len(places), bool)]
        )
        order = np.argsort(ends, kind="stable")
        return cls(*_keep_short_lines(tokens, ends[order], kinds[order], newline))

    def __len__(self) -> int:
        return len(self.tokens)

    def stretch(self, length: int, rng: np.random.Generator) -> Stretch:
        """A random run of `length` tokens that ends at a border."""
        first = int(np.searchsorted(self.borders, length))
        if first >= len(self.borders):
            raise ValueError(
                f"filler holds {len(self)} tokens, fewer than the {length} of one document; "
                "add text sources or shorten data.seq_length"
            )
        last = int(rng.integers(first, len(self.borders)))
        end = int(self.borders[last])
        begin = int(np.searchsorted(self.borders, end - length))
        return Stretch(
            self.tokens[end - length : end],
            self.borders[begin : last + 1] - (end - length),
            self.before_newline[begin : last + 1],
        )


def _keep_short_lines(
    tokens: NDArray[np.int32],
    ends: NDArray[np.int64],
    before_newline: NDArray[np.bool_],
    newline: NDArray[np.int32],
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.bool_]]:
    """Tokens and borders without the lines that are too long.

    Where the line before a gap lacks its newline and the one behind it brings none, one is put in.
    """
    parts: list[NDArray[np.int32]] = []
    borders, kinds = [0], [False]
    start, previous_kept, starts_with_newline = 0, True, False
    for end, before in zip(ends.tolist(), before_newline.tolist(), strict=True):
        if end == start:  # a border behind one newline and before the next
            continue
        kept = end - start <= MAX_FILLER_LINE
        if kept:
            if not previous_kept and kinds[-1] and not starts_with_newline:
                parts.append(newline)
                borders[-1] += len(newline)
                kinds[-1] = False
            parts.append(tokens[start:end])
            borders.append(borders[-1] + end - start)
            kinds.append(before)
        start, previous_kept, starts_with_newline = end, kept, before
    if not parts:
        raise ValueError(
            "no filler text for recall documents; name packages or a path (for the eval split "
            "eval_packages or eval_path, or raise data.eval_fraction)"
        )
    return np.concatenate(parts), np.asarray(borders, dtype=np.int64), np.asarray(kinds, dtype=bool)
