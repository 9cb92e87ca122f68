"""From a configured source to samples by number: what `prepare` writes into shards."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep.chat import RefusedChatError, render_chat
from data_prep.config import PrepareConfig, SourceConfig
from data_prep.demo_chat import DemoChatGenerator
from data_prep.documents import Document, ReadReport, read_documents
from data_prep.filler import FillerBank
from data_prep.pack import Piece, build_sample, pack_documents
from data_prep.recall import RecallGenerator
from data_prep.repeats import RepeatGenerator
from data_prep.sample import Sample
from data_prep.tokenize import TokenizerLike, encode_text, end_of_text_id, pad_token_id

SPLITS = ("train", "eval")
_TOKENIZE_BATCH = 64
_SPARE_SAMPLES = 2048
"""Read up to four times the wanted samples, at most so many more, so that few do not come of one
large document alone."""
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
    "max_documents",
    "max_characters",
    "max_filler_tokens",
)
"""What decides the filler of a generated source."""
FillerCache = dict[tuple[Any, ...], tuple[FillerBank, ReadReport]]


class SampleSource(Protocol):
    """Samples of one source and split, by number."""

    name: str
    kind: str
    num_available: int | None
    """None: as many as wanted (generated)."""
    fingerprint: str
    """SHA-256 (hex) of the text behind the samples."""
    report: dict[str, Any]
    """Counts of what was read, dropped and unreadable."""

    def sample(self, index: int) -> Sample:
        """Sample number `index`, the same at every call."""
        ...


_MAKERS: dict[str, type[RecallGenerator] | type[DemoChatGenerator] | type[RepeatGenerator]] = {
    "recall": RecallGenerator,
    "demo_chat": DemoChatGenerator,
    "repeats": RepeatGenerator,
}


class PackedSource:
    """Documents that were read and tokenized, packed into samples.

    Tokens are held in one row in memory (5 bytes a token with the mask).
    """

    def __init__(
        self,
        config: SourceConfig,
        documents: Iterator[tuple[str, NDArray[np.int32], NDArray[np.uint8]]],
        report: ReadReport,
        *,
        seq_length: int,
        packing: str,
        pad_id: int,
        wanted: int | None = None,
    ) -> None:
        """Reads until `wanted` samples and some to spare are sure, or to the end where None."""
        self.name, self.kind = config.name, config.sample_kind
        self._seq_length, self._pad_id = seq_length, pad_id
        self._ids: list[str] = []
        rows: list[NDArray[np.int32]] = []
        masks: list[NDArray[np.uint8]] = []
        too_long = 0
        alone = self.kind == "chat" and packing == "none"
        sure = 0  # a lower bound of samples (of tokens, for best_fit: no bin holds more)
        goal = None
        if wanted is not None:
            goal = wanted + min(3 * wanted, _SPARE_SAMPLES)
            goal *= seq_length if packing == "best_fit" else 1
        for identity, tokens, mask in documents:
            if self.kind == "chat" and len(tokens) > seq_length:
                too_long += 1  # cutting a conversation would tear question and answer apart
                continue
            self._ids.append(identity)
            rows.append(tokens)
            masks.append(mask)
            if packing == "best_fit":
                sure += len(tokens)
            else:
                sure += 1 if alone else len(tokens) // seq_length
            if goal is not None and sure >= goal:
                break
        lengths = [len(row) for row in rows]
        if alone:  # a conversation shorter than seq_length is no remainder: it is padded
            self._samples = [[Piece(i, 0, length)] for i, length in enumerate(lengths)]
            dropped_pieces = dropped_tokens = 0
        else:
            packed = pack_documents(lengths, seq_length, packing=packing)
            self._samples = packed.samples
            dropped_pieces, dropped_tokens = packed.num_dropped_pieces, packed.num_dropped_tokens
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        self._tokens = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int32)
        self._masks = np.concatenate(masks) if masks else np.zeros(0, dtype=np.uint8)
        self.num_available: int | None = len(self._samples)
        digest = hashlib.sha256(self._tokens.astype("<i4").tobytes())
        digest.update(self._masks.tobytes())
        digest.update(self._starts.astype("<i8").tobytes())
        self.fingerprint = digest.hexdigest()
        self.report = {
            "num_documents": len(self._ids) + too_long,
            "num_tokens": int(self._starts[-1]),
            "num_samples_available": self.num_available,
            "num_dropped_tails": dropped_pieces,
            "num_dropped_tail_tokens": dropped_tokens,
            "num_dropped_too_long": too_long,
            **bad_records(report),
        }

    def sample(self, index: int) -> Sample:
        pieces = self._samples[index]
        segments = []
        for piece in pieces:
            base = int(self._starts[piece.document])
            span = slice(base + piece.start, base + piece.end)
            segments.append((self._tokens[span], self._masks[span]))
        return build_sample(
            segments,
            seq_length=self._seq_length,
            pad_id=self._pad_id,
            meta={
                "kind": self.kind,
                "source": self.name,
                "ids": [self._ids[piece.document] for piece in pieces],
                "offsets": [piece.start for piece in pieces],
                "queries": [],
            },
        )


class GeneratedSource:
    """Samples made up by number."""

    def __init__(
        self,
        config: SourceConfig,
        generator: RecallGenerator | DemoChatGenerator | RepeatGenerator,
        filler: FillerBank,
        report: ReadReport,
    ) -> None:
        self.name, self.kind = config.name, config.sample_kind
        self.num_available: int | None = None
        self._generator = generator
        self.fingerprint = hashlib.sha256(filler.tokens.astype("<i4").tobytes()).hexdigest()
        self.report = {
            "num_filler_documents": report.num_documents,
            "num_filler_tokens": len(filler),
            **bad_records(report),
        }

    def sample(self, index: int) -> Sample:
        return self._generator.sample(index)


def build_source(
    config: PrepareConfig,
    number: int,
    split: str,
    tokenizer: TokenizerLike,
    *,
    wanted: int | None = None,
    fillers: FillerCache | None = None,
) -> SampleSource:
    """Reads and tokenizes source `number` of the configuration for one split.

    Args:
        config: the configuration.
        number: which of its sources.
        split: `train` or `eval`.
        tokenizer: a fast tokenizer.
        wanted: read no more text than these samples need; all where None.
        fillers: filler that other sources have read already, kept and used by what names it.

    Raises:
        ValueError: unreadable text beyond max_bad_fraction, no text, facts that do not fit.
    """
    source = config.sources[number]
    report = ReadReport()
    documents = _read_split(source, split, config, report)
    if source.generated:
        fillers = {} if fillers is None else fillers
        key = (split, *(getattr(source, name) for name in _FILLER_FIELDS))
        if key not in fillers:
            texts = (document.text for document in documents)
            bank = FillerBank.from_texts(texts, tokenizer, max_tokens=source.max_filler_tokens)
            report.check(source.name, config.max_bad_fraction)
            fillers[key] = (bank, report)
        filler, report = fillers[key]
        generator = _MAKERS[source.kind](
            source.recall,
            tokenizer,
            filler,
            seq_length=config.seq_length,
            seed=stream_seed(config.seed, source.name, split),
            source=source.name,
        )
        return GeneratedSource(source, generator, filler, report)
    encoded = _encode_documents(documents, tokenizer, report)
    packed = PackedSource(
        source,
        encoded,
        report,
        seq_length=config.seq_length,
        packing=config.packing,
        pad_id=pad_token_id(tokenizer),
        wanted=wanted,
    )
    report.check(source.name, config.max_bad_fraction)
    return packed


def stream_seed(seed: int, name: str, split: str) -> int:
    """One seed for each source and split, the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{name}/{split}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def _encode_documents(
    documents: Iterator[Document], tokenizer: TokenizerLike, report: ReadReport
) -> Iterator[tuple[str, NDArray[np.int32], NDArray[np.uint8]]]:
    """(id, tokens, loss mask) of each document; plain text ends with the end-of-text token."""
    while batch := list(itertools.islice(documents, _TOKENIZE_BATCH)):
        plain = [document for document in batch if document.kind == "text"]
        rows = iter(encode_text(tokenizer, [document.text for document in plain]))
        for document in batch:
            if document.kind == "chat":
                try:
                    tokens, mask = render_chat(document.messages, tokenizer)
                except RefusedChatError as error:
                    report.num_documents -= 1
                    report.bad(str(error), document.id)
                    continue
            else:
                ids = [*next(rows), end_of_text_id(tokenizer)]
                tokens = np.asarray(ids, dtype=np.int32)
                mask = np.ones(len(ids), dtype=np.uint8)
            yield document.id, tokens, mask


def _read_split(
    source: SourceConfig, split: str, config: PrepareConfig, report: ReadReport
) -> Iterator[Document]:
    """Documents of a split: its own path or packages, else held out by hash of the name."""
    evaluation = split == "eval"
    packages = (source.filler if source.generated else source.kind) == "python_packages"
    if source.eval_packages if packages else source.eval_path:
        return read_documents(source, evaluation=evaluation, report=report)
    if packages:
        keep = _hold_out_packages(source.packages, config, evaluation)
    else:
        threshold = config.eval_fraction

        def keep(name: str) -> bool:
            return (_unit_hash(config.seed, name) < threshold) == evaluation

    return read_documents(source, keep=keep, report=report)


def _hold_out_packages(
    packages: tuple[str, ...], config: PrepareConfig, evaluation: bool
) -> Callable[[str], bool]:
    """Whole packages are held out: files of one package resemble each other."""
    count = 0
    if config.eval_fraction > 0 and len(packages) > 1:
        count = max(1, round(config.eval_fraction * len(packages)))
    ranked = sorted(packages, key=lambda name: _unit_hash(config.seed, name))
    chosen = set(ranked[:count] if evaluation else ranked[count:])
    return chosen.__contains__


def _unit_hash(seed: int, name: str) -> float:
    """A number in [0, 1) that depends on seed and name only."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def bad_records(report: ReadReport) -> dict[str, Any]:
    """The part of a report that tells what could not be read."""
    return {"num_bad": report.num_bad, "bad_reasons": report.reasons, "bad": report.examples}
