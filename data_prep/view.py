"""A sample as a person sees it: checks, documents, and text cut where the loss mask changes.

Shape letters: `T` tokens of the sample, `N` documents packed into it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.sample import Sample
from data_prep.tokenize import TokenizerLike

_CONTEXT = 8
"""Tokens decoded before a stretch, so that what a tokenizer does at a text's begin is not seen."""
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_CONTROLS |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_DIRECTIONS = (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_SHOWN: dict[int, int | str] = {**_CONTROLS, **{code: f"\\u{code:04x}" for code in _DIRECTIONS}}
"""What acts on the terminal, or turns the direction of the text around it."""


@dataclass(frozen=True)
class DocumentView:
    """One document of a sample."""

    number: int
    start: int
    """First token in the sample."""
    end: int
    num_loss: int
    """Loss targets among its tokens."""
    is_padding: bool
    name: str
    """Its id; empty where the sample does not name it."""
    offset: int
    """Where it begins in the document that was read, in tokens."""

    @property
    def length(self) -> int:
        """In tokens."""
        return self.end - self.start


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one document that all carry loss, or none of them, as text."""

    start: int
    end: int
    loss: bool
    text: str
    """Decoded; empty where the run is left out."""
    left_out: bool = False

    @property
    def length(self) -> int:
        """In tokens."""
        return self.end - self.start


def check_sample(
    sample: Sample, *, seq_length: int | None = None, vocab_size: int | None = None
) -> list[str]:
    """What is wrong with a sample, in words; shapes and types are checked when it is read.

    Args:
        sample: as read from a shard.
        seq_length: tokens that it must have; None: any number.
        vocab_size: its ids must be below; None: any.
    """
    problems = []
    length = len(sample.tokens)
    if seq_length is not None and length != seq_length:
        problems.append(f"{length} tokens, the manifest says seq_length={seq_length}")
    low, high = int(sample.tokens.min()), int(sample.tokens.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        problems.append(f"token ids {low} to {high}, the vocabulary has {vocab_size}")
    if np.any(sample.loss_mask > 1):
        problems.append(f"loss_mask holds {int(sample.loss_mask.max())}, only 0 and 1 are allowed")
    documents = document_views(sample)
    firsts = [d.number for d in documents if sample.loss_mask[d.start]]
    if firsts:
        problems.append(
            f"the first token of document {firsts[0]} is a loss target, but nothing predicts it"
        )
    num_padding = int(sample.meta.get("num_padding", 0))
    padding = documents[-1].length if documents[-1].is_padding else 0
    if num_padding != padding:
        problems.append(
            f"num_padding={num_padding}, but the last segment has {documents[-1].length} tokens"
        )
    if num_padding and np.any(sample.loss_mask[length - num_padding :]):
        problems.append("padding carries loss")
    ids = sample.meta.get("ids", [])
    num_documents = len(documents) - bool(padding)
    if sample.kind == "text" and len(ids) != num_documents:
        problems.append(f"{len(ids)} ids for {num_documents} documents")
    return problems


def document_views(sample: Sample) -> list[DocumentView]:
    """The documents of a sample in order; padding, if any, is the last."""
    borders = sample.cu_seqlens.tolist()
    ids, offsets = sample.meta.get("ids", []), sample.meta.get("offsets", [])
    num_padding = int(sample.meta.get("num_padding", 0))
    views = []
    for number, (start, end) in enumerate(itertools.pairwise(borders)):
        views.append(
            DocumentView(
                number=number,
                start=start,
                end=end,
                num_loss=int(np.count_nonzero(sample.loss_mask[start:end])),
                is_padding=end == len(sample.tokens) and 0 < num_padding == end - start,
                name=str(ids[number]) if number < len(ids) else "",
                offset=int(offsets[number]) if number < len(offsets) else 0,
            )
        )
    return views


def document_runs(
    sample: Sample,
    document: DocumentView,
    tokenizer: TokenizerLike | None,
    *,
    max_tokens: int | None = None,
) -> Iterator[Run]:
    """The text of a document, cut where the loss mask changes.

    Args:
        sample: holds the document.
        document: one of `document_views(sample)`.
        tokenizer: a fast tokenizer; None: the ids instead of text.
        max_tokens: of a longer document the begin, the end, and where the loss begins; None: all.
    """
    mask = sample.loss_mask[document.start : document.end]
    at = 0
    for start, end in excerpts(mask, max_tokens):
        if start > at:
            yield _left_out(document, at, start)
        for first, last in _runs(mask[start:end]):
            begin, stop = document.start + start + first, document.start + start + last
            text = _decode(sample.tokens, begin, stop, document, tokenizer)
            yield Run(begin, stop, bool(mask[start + first]), visible(text))
        at = end
    if at < len(mask):
        yield _left_out(document, at, len(mask))


def _left_out(document: DocumentView, start: int, end: int) -> Run:
    return Run(document.start + start, document.start + end, False, "", left_out=True)


def excerpts(mask: NDArray[np.uint8], max_tokens: int | None) -> list[tuple[int, int]]:
    """Parts of a document to show: its begin, where loss first begins behind that, and its end.

    Args:
        mask: [T] the document's loss mask.
        max_tokens: tokens of all parts together; None: everything.
    """
    length = len(mask)
    if max_tokens is None or length <= max_tokens:
        return [(0, length)]
    third = max(max_tokens // 3, 1)
    head, tail = third, length - third
    begins = head + np.flatnonzero((mask[head:tail] != 0) & (mask[head - 1 : tail - 1] == 0))
    if not len(begins):
        return [(0, max_tokens - third), (tail, length)]
    start = max(int(begins[0]) - third // 2, head)
    end = min(start + third, tail)
    parts = [(0, head), (start, end), (tail, length)]
    merged = [parts[0]]
    for first, last in parts[1:]:
        if first <= merged[-1][1] + third // 4:  # a gap of a few words is no use
            merged[-1] = (merged[-1][0], last)
        else:
            merged.append((first, last))
    return merged


def _runs(mask: NDArray[np.uint8]) -> Iterator[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(mask != 0)) + 1
    borders = [0, *edges.tolist(), len(mask)]
    yield from itertools.pairwise(borders)


def _decode(
    tokens: NDArray[np.int32],
    start: int,
    end: int,
    document: DocumentView,
    tokenizer: TokenizerLike | None,
) -> str:
    """Text of `tokens[start:end]`; a character that goes on behind them belongs to what follows."""
    if tokenizer is None:
        return " ".join(map(str, tokens[start:end].tolist())) + " "
    backend = tokenizer.backend_tokenizer
    context = tokens[max(document.start, start - _CONTEXT) : start].tolist()
    own = tokens[start:end].tolist()
    before = str(backend.decode(context, skip_special_tokens=False)) if context else ""
    text = str(backend.decode(context + own, skip_special_tokens=False))
    pairs = zip(before, text, strict=False)
    text = text[sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)) :]
    return text.rstrip("\N{REPLACEMENT CHARACTER}") if end < document.end else text


def visible(text: str) -> str:
    """The text with control characters as signs that do nothing to a terminal or a page."""
    shown = text.replace("\r\n", "\n").translate(_SHOWN)
    return shown.encode("utf-8", "backslashreplace").decode()
