"""Streams: the text of one source and split, as units, and how much of it is needed.

What is read of a stream ends at its cut, the first document with which a limit or the goal is
reached. The cut is a function of the documents alone; a worker may read past it and nobody minds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.config import PrepareConfig, SourceConfig
from data_prep.engine.parts import Encoded, PartRecord, load_record
from data_prep.pack import Cutting
from data_prep.readers import Unit, list_units

SPARE_SAMPLES = 2048
"""Read up to four times the wanted samples, at most so many more, so that few do not come of one
large document alone."""
_BATCH_CHARACTERS = (1 << 14, 1 << 19)
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True, kw_only=True)
class Used:
    """How much text: documents, characters, and samples (or their tokens) that are sure."""

    documents: int = 0
    characters: int = 0
    sure: int = 0

    def __add__(self, other: Used) -> Used:
        return Used(
            documents=self.documents + other.documents,
            characters=self.characters + other.characters,
            sure=self.sure + other.sure,
        )


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The text of one source and split."""

    number: int
    """Among all streams; in this order the first of duplicates is kept."""
    source_number: int
    source: SourceConfig
    split: str
    wanted: int | None
    """Samples; None: all."""
    units: list[Unit]
    cutting: Cutting
    all_read: bool
    """Whether the goal ends nothing: duplicates are known only when all is read."""

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.split}-{self.source_number:02d}"

    @property
    def goal(self) -> int | None:
        """`Used.sure` that is enough."""
        if self.wanted is None:
            return None
        samples = self.wanted + min(3 * self.wanted, SPARE_SAMPLES)
        return samples * self.cutting.sure_per_sample

    @property
    def limited(self) -> bool:
        """Whether reading may end before the text does."""
        goal = None if self.all_read else self.goal
        return (goal, self.source.max_documents, self.source.max_characters) != (None, None, None)

    @property
    def batch_characters(self) -> int:
        """Characters that are encoded together; less where little is wanted."""
        low, high = _BATCH_CHARACTERS
        wanted = high
        if self.source.max_characters is not None:
            wanted = min(wanted, self.source.max_characters // 8)
        if self.goal is not None and not self.all_read:
            tokens = self.goal * self.cutting.seq_length // self.cutting.sure_per_sample
            wanted = min(wanted, tokens * _CHARACTERS_PER_TOKEN // 8)
        return max(low, wanted)

    def reached(self, used: Used, *, reading: bool = True) -> bool:
        """Whether so much text is enough."""
        source = self.source
        goal = None if reading and self.all_read else self.goal
        return (
            (source.max_documents is not None and used.documents >= source.max_documents)
            or (source.max_characters is not None and used.characters >= source.max_characters)
            or (goal is not None and used.sure >= goal)
        )

    def cut(
        self, before: Used, rows: NDArray[Any], dropped: NDArray[np.bool_] | None
    ) -> tuple[Used, int | None]:
        """Where in index rows enough is reached.

        Args:
            before: what came before these rows.
            rows: index rows.
            dropped: [N] which of them are left out as duplicates; None: the goal does not count.

        Returns:
            what has come up to the end of the rows, and how many of them are needed, None: all.
        """
        enough = np.zeros(len(rows), dtype=bool)
        if self.source.max_documents is not None:
            enough |= before.documents + np.arange(1, len(rows) + 1) >= self.source.max_documents
        characters = before.characters + np.cumsum(rows["characters"], dtype=np.int64)
        sure = np.full(len(rows), before.sure, dtype=np.int64)
        if self.source.max_characters is not None:
            enough |= characters >= self.source.max_characters
        if self.goal is not None and dropped is not None:
            own = self.cutting.sure(rows["length"], rows["hash"])
            sure += np.cumsum(np.where(dropped, 0, own))
            enough |= sure >= self.goal
        after = Used(
            documents=before.documents + len(rows),
            characters=int(characters[-1]) if len(rows) else before.characters,
            sure=int(sure[-1]) if len(rows) else before.sure,
        )
        found = np.flatnonzero(enough)
        return after, int(found[0]) + 1 if len(found) else None

    def used_by(self, documents: Sequence[Encoded]) -> Used:
        """What documents hold, no duplicates taken out."""
        lengths = np.array([len(document.tokens) for document in documents], dtype=np.int64)
        data = b"".join(document.hash for document in documents)
        hashes = np.frombuffer(data, dtype=">u8").astype(np.uint64).reshape(-1, 2)
        return Used(
            documents=len(documents),
            characters=sum(document.characters for document in documents),
            sure=int(self.cutting.sure(lengths, hashes).sum()),
        )


def list_streams(config: PrepareConfig, shares: dict[str, list[int | None]]) -> list[Stream]:
    """The streams of all sources that are read; held-out text first.

    Args:
        config: the configuration.
        shares: by split the samples of each source; None: all.

    Raises:
        ValueError: a source is not there.
    """
    streams: list[Stream] = []
    for split in ("eval", "train"):
        for number, source in enumerate(config.sources):
            wanted = shares[split][number]
            if source.generated or wanted == 0:
                continue
            units = list_units(source, split, seed=config.seed, eval_fraction=config.eval_fraction)
            streams.append(
                Stream(
                    number=len(streams),
                    source_number=number,
                    source=source,
                    split=split,
                    wanted=wanted,
                    units=units,
                    cutting=Cutting.of(config, source),
                    all_read=config.dedup.mode != "none",
                )
            )
    return streams


def units_digest(streams: Sequence[Stream]) -> str:
    """SHA-256 (hex) of which files and ranges the units are."""
    digest = hashlib.sha256()
    for stream in streams:
        for unit in stream.units:
            parts = [[part.path, part.start, part.stop, part.split] for part in unit.parts]
            digest.update(json.dumps([stream.name, parts]).encode())
    return digest.hexdigest()


def unit_path(work: Path, stream: Stream, unit: int, part: int) -> Path:
    """Name of a part's files, without suffix."""
    return work / "documents" / stream.name / f"unit-{unit:06d}-part-{part:05d}"


def unit_stamp(unit: Unit) -> list[Any]:
    """What tells that a unit's files have not changed: sizes and dates where they are local."""
    stamp: list[Any] = []
    for part in unit.parts:
        try:
            status = Path(part.path).stat()
            found = [status.st_size, status.st_mtime_ns]
        except OSError:
            found = []  # a URL or a data set's name
        stamp.append([part.path, part.start, part.stop, *found])
    return stamp


@dataclass(frozen=True)
class UnitState:
    """Parts of a unit that are done."""

    parts: list[tuple[Path, PartRecord]]

    @property
    def complete(self) -> bool:
        """Whether the unit's end is among them."""
        return bool(self.parts) and self.parts[-1][1].last

    @property
    def used(self) -> Used:
        """What they hold."""
        total = Used()
        for _, record in self.parts:
            total += Used(**record.used)
        return total


def unit_state(work: Path, stream: Stream, unit: int, *, stamp: list[Any] | None) -> UnitState:
    """The parts of a unit that are whole.

    Args:
        work: folder of the work files.
        stream: the stream.
        unit: its number there.
        stamp: parts of files that were different do not count; None: do not look.
    """
    parts: list[tuple[Path, PartRecord]] = []
    while not parts or not parts[-1][1].last:
        path = unit_path(work, stream, unit, len(parts))
        record = load_record(path)
        if record is None or (stamp is not None and record.stamp != stamp):
            break
        parts.append((path, dataclasses.replace(record, stamp=[])))
    return UnitState(parts)
