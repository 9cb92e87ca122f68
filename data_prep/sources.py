"""Samples of a source by number: made up, or put together from tokenized documents by a plan."""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep.atomic import write_atomic
from data_prep.config import PrepareConfig, SourceConfig
from data_prep.demo_chat import DemoChatGenerator
from data_prep.engine.parts import PartReader, PartRecord
from data_prep.engine.plan import PlanReader, StreamPlan
from data_prep.engine.streams import Stream
from data_prep.filler import FillerBank
from data_prep.loss import piece_mask
from data_prep.ngrams import mix64
from data_prep.pack import build_sample
from data_prep.readers import Document, UnitReport, list_units, read_unit
from data_prep.recall import RecallGenerator
from data_prep.repeats import RepeatGenerator
from data_prep.sample import Sample
from data_prep.settings import config_hash, to_dict
from data_prep.tokenize import TokenizerLike

SPLITS = ("train", "eval")
_EXACT_SHUFFLE = 1 << 20
"""Up to so many samples their order is a permutation held in memory; beyond, a Feistel network."""
_FILLER_FIELDS = (
    "filler",
    "file_order",
    "path",
    "eval_path",
    "pattern",
    "packages",
    "eval_packages",
    "text_field",
    "id_field",
    "fields",
    "subset",
    "revision",
    "dataset_split",
    "eval_dataset_split",
    "unit_bytes",
    "max_record_bytes",
    "max_documents",
    "max_characters",
    "max_filler_tokens",
)
"""What decides the filler of a generated source."""


class SampleSource(Protocol):
    """Samples of one source and split, by number."""

    def sample(self, index: int) -> Sample:
        """Sample number `index`, the same at every call."""
        ...


_MAKERS: dict[str, type[RecallGenerator] | type[DemoChatGenerator] | type[RepeatGenerator]] = {
    "recall": RecallGenerator,
    "demo_chat": DemoChatGenerator,
    "repeats": RepeatGenerator,
}


class PackedSource:
    """Documents that were read and tokenized, packed into samples by a plan.

    Args:
        config: the configuration.
        stream: the source's stream.
        plan: of the stream.
        work: folder of the work files.
        pad_id: the token that fills a sample's tail.
    """

    def __init__(
        self, config: PrepareConfig, stream: Stream, plan: StreamPlan, work: Path, *, pad_id: int
    ) -> None:
        self._source, self._seq_length, self._pad_id = stream.source, config.seq_length, pad_id
        self._pieces = PlanReader(work, stream)
        self._parts = PartReader(
            [(work / part["path"], PartRecord(**part["record"])) for part in plan.parts]
        )

    def sample(self, index: int) -> Sample:
        """Sample number `index` of the plan."""
        segments, ids, offsets = [], [], []
        for number, document, start, length in self._pieces.pieces(index).tolist():
            part = self._parts[number]
            rows = part.rows(document)
            row = rows[0]
            mask = piece_mask(self._source, part.mask(row, start, length))
            segments.append((part.tokens(row, start, length), mask))
            ids += part.identities(rows)
            offsets.append(start)
        return build_sample(
            segments,
            seq_length=self._seq_length,
            pad_id=self._pad_id,
            meta={
                "kind": self._source.sample_kind,
                "source": self._source.name,
                "ids": ids,
                "offsets": offsets,
                "queries": [],
            },
        )


def make_generator(
    config: PrepareConfig, number: int, split: str, tokenizer: TokenizerLike, filler: FillerBank
) -> SampleSource:
    """The generator of a source that is made up.

    Raises:
        ValueError: facts that do not fit.
    """
    source = config.sources[number]
    return _MAKERS[source.kind](
        source.recall,
        tokenizer,
        filler,
        seq_length=config.seq_length,
        seed=stream_seed(config.seed, source.name, split),
        source=source.name,
    )


def stream_seed(seed: int, name: str, split: str) -> int:
    """One seed for each source and split, the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{name}/{split}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


class SampleOrder:
    """Which samples are taken, in which order: a shuffle that is the same everywhere.

    Args:
        num_available: samples that there are; None: generated, taken by number.
        seed: from `stream_seed`.
    """

    def __init__(self, num_available: int | None, seed: int) -> None:
        self._size, self._seed = num_available, seed

    def take(self, first: int, count: int) -> NDArray[np.int64]:
        """Sample numbers of places `first:first + count`."""
        places = np.arange(first, first + count, dtype=np.int64)
        if self._size is None:
            return places
        if self._size <= _EXACT_SHUFFLE:
            return self._permutation[places]
        return shuffle_places(places, self._size, self._seed)

    @functools.cached_property
    def _permutation(self) -> NDArray[np.int64]:
        assert self._size is not None
        return np.random.default_rng(self._seed).permutation(self._size).astype(np.int64)


def shuffle_places(places: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """A permutation of 0…size-1 at some places, without holding it: a Feistel network.

    What leaves the range is sent through again, until it is inside (Black and Rogaway 2002).
    """
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.default_rng([seed, 11]).integers(0, 2**63, size=6).astype(np.uint64)
    values = places.astype(np.uint64)
    todo = np.arange(len(values))
    while len(todo):
        left, right = values[todo] >> half, values[todo] & mask
        for key in keys:
            left, right = right, left ^ (mix64(right + key) & mask)
        values[todo] = (left << half) | right
        todo = todo[values[todo] >= size]
    return values.astype(np.int64)


# --- filler -----------------------------------------------------------------------------


def filler_name(source: SourceConfig, split: str) -> str:
    """Name of a filler: sources of the same text share one."""
    plain = to_dict(source)
    return config_hash({name: plain[name] for name in _FILLER_FIELDS} | {"split": split})[:16]


def filler_path(work: Path, source: SourceConfig, split: str) -> Path:
    """Its file."""
    return work / "filler" / f"{filler_name(source, split)}.npz"


def make_filler(
    config: PrepareConfig,
    source: SourceConfig,
    split: str,
    tokenizer: TokenizerLike,
    work: Path,
    *,
    owner: str = "",
) -> None:
    """Reads and tokenizes the text between the facts of a generated source, and keeps it.

    Raises:
        ValueError: unreadable text beyond max_bad_fraction, or no text.
    """
    report = UnitReport()
    texts = (document.text for document in _filler_documents(config, source, split, report))
    bank = FillerBank.from_texts(texts, tokenizer, max_tokens=source.max_filler_tokens)
    report.check(source.name, config.max_bad_fraction)
    facts = {
        "num_filler_documents": report.num_documents,
        "num_filler_tokens": len(bank),
        "num_bad": report.num_bad,
        "bad_reasons": report.reasons,
        "bad": report.examples,
        "fingerprint": hashlib.sha256(bank.tokens.astype("<i4").tobytes()).hexdigest(),
    }
    data = io.BytesIO()
    np.savez(
        data,
        tokens=bank.tokens,
        borders=bank.borders,
        before_newline=bank.before_newline,
        facts=np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8),
    )
    path = filler_path(work, source, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data.getvalue(), owner=owner)


def load_filler(work: Path, source: SourceConfig, split: str) -> tuple[FillerBank, dict[str, Any]]:
    """A filler that was kept, and the counts of its text."""
    with np.load(filler_path(work, source, split), allow_pickle=False) as stored:
        facts = json.loads(stored["facts"].tobytes())
        return FillerBank(stored["tokens"], stored["borders"], stored["before_newline"]), facts


def _filler_documents(
    config: PrepareConfig, source: SourceConfig, split: str, report: UnitReport
) -> Iterator[Document]:
    units = list_units(source, split, seed=config.seed, eval_fraction=config.eval_fraction)
    for document in (document for unit in units for document in read_unit(unit, report)):
        yield document
        if source.max_documents is not None and report.num_documents >= source.max_documents:
            return
        limit = source.max_characters
        if limit is not None and report.num_characters >= limit:
            return
