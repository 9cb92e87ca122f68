"""Work files: tokenized documents of a unit, and an index that says all of them but their tokens.

A part is two files: `NAME.bin`, sections one after the other (tokens, documents, ids, spans,
signatures), and `NAME.json`, its record, which is written last: without it the part does not count.
Parts are read by `pread`, not by memory maps, so that what has been read does not stay in the
process's resident memory however large the corpus is.

Shape letters: `N` documents of a part, `S` spans.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.atomic import AtomicFile, write_atomic

ALL_LOSS = 2**32 - 1
"""`num_spans` of a document all of whose tokens are loss targets."""
DOCUMENT = np.dtype(
    [
        ("start", "<u8"),
        ("length", "<u4"),
        ("characters", "<u4"),
        ("id_start", "<u8"),
        ("id_bytes", "<u4"),
        ("num_spans", "<u4"),
        ("span_start", "<u8"),
        ("hash", "<u8", (2,)),
    ]
)
"""Start and length in tokens, characters of the text, place of the id (bytes) and of the loss spans
(pairs), 128 bits of the text's hash."""
_SECTIONS = ("tokens", "documents", "ids", "spans", "signatures")


@dataclass(frozen=True)
class Encoded:
    """One document ready for packing."""

    id: str
    tokens: NDArray[Any]
    """[T], in the part's type."""
    spans: NDArray[np.uint32] | None
    """[S, 2] tokens that are loss targets, start and end; None: all."""
    characters: int
    hash: bytes
    """16 bytes of the text's hash."""
    signature: bytes = b""
    """The row that the search for duplicates takes (`dedup.Signer`); empty where none is asked."""


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """What `NAME.json` says."""

    num_documents: int
    num_tokens: int
    token_bytes: int
    signature_bytes: int
    """Of one signature; 0: none."""
    sections: dict[str, tuple[int, int]]
    """(offset, bytes) of each."""
    num_bytes: int
    digest: str
    """SHA-256 (hex) of lengths, hashes and ids: the documents' fingerprint."""
    batches: list[dict[str, Any]]
    """Of each batch: `num_kept` documents of the part so far, `num_read` documents of the unit so
    far (dropped ones too), and the batch's own `report` (`UnitReport`)."""
    used: dict[str, int]
    """Documents, characters and sure samples (`streams.Used`)."""
    last: bool
    """Whether the unit ends with this part."""
    stamp: list[Any]
    """Sizes and dates of the unit's files."""

    @property
    def num_read(self) -> int:
        """Documents that were read of the unit when this part ended."""
        return int(self.batches[-1]["num_read"]) if self.batches else 0


class PartWriter:
    """Writes one part; tokens go to the disk as they come, the index is held until the end.

    Args:
        path: without suffix.
        token_bytes: 2 or 4.
        signature_bytes: of one signature; 0: none.
        owner: see `AtomicFile`.
    """

    def __init__(
        self, path: Path, *, token_bytes: int, signature_bytes: int, owner: str = ""
    ) -> None:
        self._path, self._owner = path, owner
        self._token_bytes, self._signature_bytes = token_bytes, signature_bytes
        self._file = AtomicFile(path.with_suffix(".bin"), owner=owner)
        self._documents: list[tuple[Any, ...]] = []
        self._ids = io.BytesIO()
        self._spans: list[NDArray[np.uint32]] = []
        self._signatures: list[bytes] = []
        self._num_spans = 0
        self._batches: list[dict[str, Any]] = []
        self.num_tokens = 0

    @property
    def num_documents(self) -> int:
        """Documents so far."""
        return len(self._documents)

    def add(self, document: Encoded) -> None:
        """Appends a document."""
        identity = document.id.encode()
        spans = document.spans
        num_spans = ALL_LOSS if spans is None else len(spans)
        if self._signature_bytes:
            self._signatures.append(document.signature)
        self._documents.append(
            (
                self.num_tokens,
                len(document.tokens),
                document.characters,
                self._ids.tell(),
                len(identity),
                num_spans,
                self._num_spans,
                (int.from_bytes(document.hash[:8]), int.from_bytes(document.hash[8:])),
            )
        )
        self._ids.write(identity)
        if spans is not None:
            self._spans.append(spans)
            self._num_spans += len(spans)
        self._file.write(document.tokens.astype(f"<u{self._token_bytes}", copy=False).tobytes())
        self.num_tokens += len(document.tokens)

    def end_batch(self, *, num_read: int, report: dict[str, Any]) -> None:
        """Notes that a batch of the unit ends here; parts end with a batch."""
        self._batches.append(
            {"num_kept": self.num_documents, "num_read": num_read, "report": report}
        )

    def finish(self, *, used: dict[str, int], stamp: list[Any], last: bool) -> PartRecord:
        """Writes the index and the record; from now on the part counts."""
        documents = np.array(self._documents, dtype=DOCUMENT)
        sections = {
            "documents": documents.tobytes(),
            "ids": self._ids.getvalue(),
            "spans": b"".join(span.astype("<u4").tobytes() for span in self._spans),
            "signatures": b"".join(self._signatures),
        }
        places = {"tokens": (0, self.num_tokens * self._token_bytes)}
        for name, data in sections.items():
            start, size = places[_SECTIONS[len(places) - 1]]
            places[name] = (start + size, len(data))
            self._file.write(data)
        digest = hashlib.sha256()
        for name in ("length", "hash"):
            digest.update(np.ascontiguousarray(documents[name]).tobytes())
        for name in ("ids", "spans"):
            digest.update(sections[name])
        self._file.commit()
        start, size = places["signatures"]
        record = PartRecord(
            num_documents=len(documents),
            num_tokens=self.num_tokens,
            token_bytes=self._token_bytes,
            signature_bytes=self._signature_bytes,
            sections=places,
            num_bytes=start + size,
            digest=digest.hexdigest(),
            batches=self._batches,
            used=used,
            last=last,
            stamp=stamp,
        )
        text = json.dumps(dataclasses.asdict(record), sort_keys=True) + "\n"
        write_atomic(self._path.with_suffix(".json"), text.encode(), owner=self._owner)
        return record

    def abandon(self) -> None:
        """Leaves nothing behind."""
        self._file.abandon()


def load_record(path: Path) -> PartRecord | None:
    """The record of a part (path without suffix) that is whole; None where there is none."""
    try:
        plain = json.loads(path.with_suffix(".json").read_bytes())
        sections = {name: tuple(place) for name, place in plain.pop("sections").items()}
        record = PartRecord(sections=sections, **plain)
        whole = path.with_suffix(".bin").stat().st_size == record.num_bytes
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return None  # half written, of another program, or not there: it is made again
    return record if whole else None


class Part:
    """A whole part, open for reading.

    Args:
        path: without suffix.
        record: its record.
    """

    def __init__(self, path: Path, record: PartRecord) -> None:
        self.path, self.record = path, record
        self._descriptor = os.open(path.with_suffix(".bin"), os.O_RDONLY)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def rows(self, first: int, count: int = 1) -> NDArray[Any]:
        """Index rows `first:first + count`."""
        size = DOCUMENT.itemsize
        return np.frombuffer(self._read("documents", first * size, count * size), dtype=DOCUMENT)

    def identities(self, rows: NDArray[Any]) -> list[str]:
        """The ids of consecutive index rows."""
        if not len(rows):
            return []
        first = int(rows["id_start"][0])
        last = int(rows["id_start"][-1]) + int(rows["id_bytes"][-1])
        data = self._read("ids", first, last - first)
        ends = (rows["id_start"] + rows["id_bytes"] - first).tolist()
        starts = (rows["id_start"] - first).tolist()
        return [data[a:b].decode() for a, b in zip(starts, ends, strict=True)]

    def tokens(self, row: Any, start: int, length: int) -> NDArray[Any]:
        """Tokens `start:start + length` of a document (an index row)."""
        size = self.record.token_bytes
        data = self._read("tokens", (int(row["start"]) + start) * size, length * size)
        return np.frombuffer(data, dtype=f"<u{size}")

    def mask(self, row: Any, start: int, length: int) -> NDArray[np.uint8]:
        """Loss mask of the same tokens."""
        count = int(row["num_spans"])
        if count == ALL_LOSS:
            return np.ones(length, dtype=np.uint8)
        mask = np.zeros(length, dtype=np.uint8)
        data = self._read("spans", int(row["span_start"]) * 8, count * 8)
        for begin, end in np.frombuffer(data, dtype="<u4").reshape(-1, 2).tolist():
            mask[max(begin - start, 0) : max(end - start, 0)] = 1
        return mask

    def signatures(self, block: int = 1 << 14) -> Iterator[bytes]:
        """All signatures, some at a time."""
        total = self.record.sections["signatures"][1]
        step = max(1, self.record.signature_bytes) * block
        for start in range(0, total, step):
            yield self._read("signatures", start, min(step, total - start))

    def _read(self, section: str, start: int, size: int) -> bytes:
        offset, total = self.record.sections[section]
        if start + size > total:
            raise ValueError(f"{self.path}.bin is damaged; delete {self.path.parent} and run again")
        pieces: list[bytes] = []
        while size:
            data = os.pread(self._descriptor, size, offset + start)
            if not data:
                raise ValueError(f"{self.path}.bin ended early; delete it and run again")
            pieces.append(data)
            start, size = start + len(data), size - len(data)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def mask_spans(mask: NDArray[np.uint8]) -> NDArray[np.uint32] | None:
    """Runs of ones as [S, 2]; None where all are."""
    if mask.all():
        return None
    edges = np.diff(np.concatenate([[0], (mask != 0).astype(np.int8), [0]]))
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return np.stack([starts, ends], axis=1).astype(np.uint32)


class PartReader:
    """Many parts, few of them open at a time.

    Args:
        paths: path (without suffix) and record of each, in order.
        max_open: files that are kept open.
    """

    def __init__(self, paths: Sequence[tuple[Path, PartRecord]], max_open: int = 128) -> None:
        self._paths, self._max_open = paths, max_open
        self._open: dict[int, Part] = {}

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> Part:
        part = self._open.pop(number, None)
        if part is None:
            part = Part(*self._paths[number])
            if len(self._open) >= self._max_open:
                self._open.pop(next(iter(self._open))).close()
        self._open[number] = part
        return part

    def close(self) -> None:
        """Close all."""
        for part in self._open.values():
            part.close()
        self._open.clear()
