"""Whether every tool of the data benchmark made the tokens that the tokenizer makes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.data_cases import SEQ_LENGTH
from benchmarks.data_text import Text
from data_prep.shards import Manifest, read_shard

_BATCH = 1000
"""Rows that `datasets.map` gives to a function at a time."""


class CheckError(ValueError):
    """A tool made other tokens: its speed says nothing."""


@dataclass(frozen=True)
class Reference:
    """Token ids of all documents, each ended by the end-of-text token, in the files' order."""

    tokens: NDArray[np.int32]
    """[T]."""
    ends: NDArray[np.int64]
    """[N] where each document ends."""
    places: dict[str, int]
    """Number of each document by its id."""

    def document(self, number: int) -> NDArray[np.int32]:
        """Tokens of a document."""
        return self.tokens[int(self.ends[number - 1]) if number else 0 : int(self.ends[number])]


def make_reference(text: Text, tokenizer: Any, end: int) -> Reference:
    """The tokenizer's own answer, a document at a time."""
    rows, places = [], {}
    for number, (name, content) in enumerate(text.documents()):
        encoding = tokenizer.backend_tokenizer.encode(content, add_special_tokens=False)
        rows.append(np.array([*encoding.ids, end], dtype=np.int32))
        places[name] = number
    return Reference(np.concatenate(rows), np.cumsum([len(row) for row in rows]), places)


def check_ours(out: Path, reference: Reference) -> None:
    """Every token of every document once, in order, over all pieces of all samples.

    Raises:
        CheckError: not so.
    """
    found = np.full(len(reference.tokens), -1, dtype=np.int32)
    for record in Manifest.load(out).splits["train"]:
        for sample in read_shard(out / record.path):
            borders = list(pairwise(sample.cu_seqlens.tolist()))
            names = zip(sample.meta["ids"], sample.meta["offsets"], strict=True)
            for (start, stop), (name, offset) in zip(borders, names, strict=False):
                number = reference.places[name]
                first = (int(reference.ends[number - 1]) if number else 0) + offset
                span = slice(first, first + stop - start)
                if (found[span] != -1).any():
                    raise CheckError(f"prepare gave tokens of document {name} twice")
                found[span] = sample.tokens[start:stop]
    if not np.array_equal(found, reference.tokens):
        raise CheckError("prepare made other tokens than the tokenizer alone")


def check_datasets(out: Path, reference: Reference, processes: int) -> int:
    """Blocks are the stream cut up; gives how many tokens are missing at the ends of batches.

    Raises:
        CheckError: not so.
    """
    from datasets import load_from_disk

    blocks = iter(load_from_disk(str(out / "saved")).with_format("numpy"))
    number = len(reference.ends)
    div, mod = divmod(number, processes)
    borders = [process * div + min(process, mod) for process in range(processes + 1)]
    kept = 0
    for first, last in pairwise(borders):
        for start in range(first, last, _BATCH):
            stop = min(start + _BATCH, last)
            span = reference.tokens[
                int(reference.ends[start - 1]) if start else 0 : int(reference.ends[stop - 1])
            ]
            for at in range(0, len(span) // SEQ_LENGTH * SEQ_LENGTH, SEQ_LENGTH):
                block = next(blocks)["input_ids"]
                if not np.array_equal(block, span[at : at + SEQ_LENGTH]):
                    raise CheckError("datasets.map made other tokens than the tokenizer alone")
                kept += SEQ_LENGTH
    return len(reference.tokens) - kept


def check_datatrove(out: Path, reference: Reference, vocab_size: int) -> None:
    """Files hold the stream, in the order of their numbers.

    Raises:
        CheckError: not so.
    """
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    files = sorted(Path(out, "tokens").glob("*.ds"))
    found = np.concatenate([np.fromfile(file, dtype=dtype) for file in files])
    if not np.array_equal(found.astype(np.int32), reference.tokens):
        raise CheckError("datatrove made other tokens than the tokenizer alone")
