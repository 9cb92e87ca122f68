"""What readers give and tell: documents, units of work, reports.

A unit is a piece of a source that one process reads from begin to end. `list_units` cuts a source
into units by its files alone, never by the number of workers, so that the documents of all units,
one after the other, are the same in the same order whoever reads them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from data_prep.config import SourceConfig

SPLITS = ("train", "eval")
MAX_EXAMPLES = 20
_MAX_EXCERPT = 200
_MAX_REASONS = 100
_OTHER_REASON = "other reasons"


@dataclass(frozen=True)
class Drop:
    """Why a step leaves out a document, or a passage of it."""

    reason: str
    """One of few, to be counted."""
    detail: str = ""
    """What is particular to this document, such as the evaluation item it matches."""


@dataclass(frozen=True)
class Document:
    """One document as read; `messages` only for kind `chat`, whose text is empty."""

    text: str
    id: str
    source: str
    kind: str = "text"
    messages: tuple[dict[str, str], ...] = ()
    context: str = ""
    """`chat`: the long document that the first user message speaks of; it stands before that
    message and is the part that may be cut."""
    split: str = "train"
    """`train` or `eval`."""
    cuts: tuple[Drop, ...] = ()
    """Passages that steps took out."""

    @property
    def content(self) -> str:
        """All text of the document; for chats the document part and the messages, by lines."""
        if self.kind != "chat":
            return self.text
        parts = [self.context] if self.context else []
        return "\n".join([*parts, *(message["content"] for message in self.messages)])

    @property
    def num_characters(self) -> int:
        """Characters of all its text."""
        return (
            len(self.text)
            + len(self.context)
            + sum(len(message["content"]) for message in self.messages)
        )


@dataclass(frozen=True)
class Part:
    """A file, or a range of one, as a unit reads it."""

    path: str
    """File, fsspec URL or data set."""
    label: str
    """How ids and reports name it."""
    start: int = 0
    """First byte, row group, row or shard, as the source's kind has it."""
    stop: int | None = None
    """Where the range ends (exclusive); None: to the end."""
    split: str = ""
    """`train` or `eval`; empty: each document's id decides."""


@dataclass(frozen=True)
class Unit:
    """A piece of a source; small files share one, large ones are cut. Can be pickled."""

    source: SourceConfig
    number: int
    """Its place in the list of units."""
    parts: tuple[Part, ...]
    split: str = "train"
    """`train`, `eval` or `both`: which documents to give."""
    seed: int = 0
    eval_fraction: float = 0.0
    num_bytes: int = 0
    """Size on disk, for planning; 0 where it is not known."""

    @property
    def name(self) -> str:
        """Source, number and first file, for messages and file names."""
        return f"{self.source.name}-{self.number:06d} ({self.parts[0].label if self.parts else ''})"


@dataclass(frozen=True)
class BadRecord:
    """A record that could not be read, or a document that was dropped, as an example."""

    where: str
    """File and line, file and byte offset (`file@offset`), or the document's id."""
    reason: str
    excerpt: str = ""
    """Its first characters (at most 200)."""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass
class UnitReport:
    """What was read, what was not, and what steps dropped, with examples; reports add up."""

    num_documents: int = 0
    """Documents given by the reader, before any step."""
    num_characters: int = 0
    num_other: int = 0
    """Documents of the other split, read on the way: unreadable records have none, so all count in
    their share."""
    num_empty: int = 0
    """Records and files without any text; nothing is lost with them."""
    num_bad: int = 0
    num_broken_files: int = 0
    """Files that ended early or could not be opened (each counts once among the bad): how many
    records they held beyond that nobody knows."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Bad records by reason."""
    samples: list[BadRecord] = field(default_factory=list)
    """The first bad records."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Documents dropped by steps, by reason."""
    dropped_characters: dict[str, int] = field(default_factory=dict)
    dropped_samples: list[BadRecord] = field(default_factory=list)
    """The first dropped documents, with the detail of the drop."""
    cuts: dict[str, int] = field(default_factory=dict)
    """Documents that lost a passage, by reason."""
    cut_samples: list[BadRecord] = field(default_factory=list)

    def bad(self, reason: str, where: str, *, detail: str = "", excerpt: bytes | str = "") -> None:
        """Counts a record that could not be read.

        Args:
            reason: one of few, to be counted.
            where: file and line.
            detail: what is particular to this record.
            excerpt: how it begins.
        """
        self.num_bad += 1
        _count(self.reasons, reason, 1)
        if len(self.samples) < MAX_EXAMPLES:
            shown = f"{reason} ({detail})" if detail else reason
            self.samples.append(BadRecord(where, shown, _excerpt(excerpt)))

    def broken(self, reason: str, where: str, *, detail: str = "") -> None:
        """Counts a file that ends early or cannot be opened."""
        self.num_broken_files += 1
        self.bad(reason, where, detail=detail)

    def drop(self, drop: Drop, document: Document) -> None:
        """Counts a document that a step dropped."""
        _count(self.dropped, drop.reason, 1)
        _count(self.dropped_characters, drop.reason, document.num_characters)
        _show(self.dropped_samples, drop, document)

    def cut(self, drop: Drop, document: Document) -> None:
        """Counts a document that lost a passage."""
        _count(self.cuts, drop.reason, 1)
        _show(self.cut_samples, drop, document)

    @property
    def examples(self) -> list[str]:
        """The first bad records as `file:line: reason`."""
        return [str(sample) for sample in self.samples]

    def merge(self, other: UnitReport) -> None:
        """Adds another report; called in the order of units it gives the same on every machine."""
        for name in (
            "num_documents",
            "num_characters",
            "num_other",
            "num_empty",
            "num_bad",
            "num_broken_files",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("reasons", "dropped", "dropped_characters", "cuts"):
            for reason, count in getattr(other, name).items():
                _count(getattr(self, name), reason, count)
        for name in ("samples", "dropped_samples", "cut_samples"):
            mine = getattr(self, name)
            mine += getattr(other, name)[: MAX_EXAMPLES - len(mine)]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        plain = dict(vars(self))
        for name in ("samples", "dropped_samples", "cut_samples"):
            plain[name] = [vars(sample) for sample in getattr(self, name)]
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> UnitReport:
        """The inverse of `to_dict`."""
        fields = dict(plain)
        for name in ("samples", "dropped_samples", "cut_samples"):
            fields[name] = [BadRecord(**sample) for sample in fields[name]]
        return cls(**fields)

    def check(self, source: str, max_bad_fraction: float) -> None:
        """Raises ValueError when more than the allowed share of the records is bad."""
        total = self.num_documents + self.num_other + self.num_bad
        if total and self.num_bad > max_bad_fraction * total:
            raise ValueError(
                f"source {source}: {self.num_bad} of {total} records are unreadable, more than "
                f"max_bad_fraction={max_bad_fraction} (first: {self.examples[0]}); mend the "
                "files or raise data.max_bad_fraction"
            )


ReadReport = UnitReport


def _count(counts: dict[str, int], reason: str, number: int) -> None:
    """Adds to a count; there are at most a hundred reasons, so that reports stay small."""
    if reason not in counts and len(counts) >= _MAX_REASONS:
        reason = _OTHER_REASON
    counts[reason] = counts.get(reason, 0) + number


def _show(samples: list[BadRecord], drop: Drop, document: Document) -> None:
    """Adds a document to the examples while there are few."""
    if len(samples) < MAX_EXAMPLES:
        shown = f"{drop.reason} ({drop.detail})" if drop.detail else drop.reason
        samples.append(BadRecord(document.id, shown, _excerpt(document.text or document.content)))


def _excerpt(data: bytes | str) -> str:
    """The first characters; what is no UTF-8 shows as \\x.."""
    if isinstance(data, str):
        return data[:_MAX_EXCERPT].encode("utf-8", "backslashreplace").decode()
    return data[: 4 * _MAX_EXCERPT].decode("utf-8", "backslashreplace")[:_MAX_EXCERPT]


def unit_hash(seed: int, name: str) -> float:
    """A number in [0, 1) that depends on seed and name only."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def split_of(identity: str, seed: int, eval_fraction: float) -> str:
    """`train` or `eval`, by the document's id alone."""
    return "eval" if unit_hash(seed, identity) < eval_fraction else "train"
