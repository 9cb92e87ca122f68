"""Phase 1: units of text become parts, work files of tokens with an index.

One process reads and writes, the others of the pool run the steps and the tokenizer on batches, so
that a single compressed file keeps all of them busy. Batches and parts are cut by the text alone.
A part that is whole is kept after a kill; the unit is read again from its begin, and what the part
holds is skipped, not tokenized again.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.config import PrepareConfig
from data_prep.dedup import Signer
from data_prep.engine.documents import PortableTokenizer, Result, Task
from data_prep.engine.parts import PartWriter
from data_prep.engine.pool import Pool
from data_prep.engine.streams import Stream, Used, unit_path, unit_stamp, unit_state
from data_prep.readers import Document, Unit, UnitReport, read_unit
from data_prep.readers.files import COMPRESSED_SUFFIXES

PART_TOKENS = 1 << 24
PART_DOCUMENTS = 1 << 17
"""A part ends with the batch that reaches one of them."""
BATCH_DOCUMENTS = 4096

Progress = Callable[[str, int, int], None]
"""Called as progress("train shards", done, total)."""


@dataclass
class _UnitTask:
    """A unit that this worker reads."""

    stream: Stream
    number: int
    stamp: list[Any]
    skip: int
    """Documents that whole parts hold already."""
    next_part: int
    held: Used
    """What those parts hold."""


@dataclass
class _Batch:
    """Documents of a unit on their way; the order of batches is the order of the text."""

    unit: _UnitTask
    documents: list[Document] = field(default_factory=list)
    num_read: int = 0
    report: UnitReport = field(default_factory=UnitReport)
    last: bool = False


class _BadRecords:
    """Ends the job early where a stream's unreadable records are too many already.

    Args:
        stream: the stream.
        most: allowed share of its records.
    """

    def __init__(self, stream: Stream, most: float) -> None:
        self._name, self._most = stream.source.name, most
        self._all_bytes = sum(unit.num_bytes for unit in stream.units)
        self._bytes = 0
        self._read = UnitReport()

    def add(self, report: UnitReport) -> None:
        """Counts a batch."""
        self._read.merge(report)

    def end_unit(self, unit: Unit) -> None:
        """Looks whether they are more than twice what is allowed of all records that the stream
        can hold, by its bytes; the plan does the exact count once all is read.

        Raises:
            ValueError: they are.
        """
        self._bytes += unit.num_bytes
        read = self._read
        records = read.num_documents + read.num_other + read.num_bad
        if self._bytes and read.num_bad > 2 * self._most * records * self._all_bytes / self._bytes:
            read.check(self._name, self._most)


class EncodePhase:
    """This worker's part of phase 1.

    Args:
        config: the configuration.
        tokenizer: of the run.
        streams: all streams.
        work: folder of the work files.
        owner: part of temporary names.
        progress: told as units are done.
    """

    def __init__(
        self,
        config: PrepareConfig,
        tokenizer: PortableTokenizer,
        streams: Sequence[Stream],
        work: Path,
        *,
        owner: str = "",
        progress: Progress | None = None,
    ) -> None:
        self._config, self._streams, self._work, self._owner = config, streams, work, owner
        self._token_bytes = tokenizer.dtype.itemsize
        none = config.dedup.mode == "none"
        self._signature_bytes = 0 if none else Signer(config.dedup).dtype.itemsize
        self._progress = progress
        self._stopped: set[int] = set()
        """Streams of which enough has been read."""
        self._known: dict[int, dict[int, Used]] = {stream.number: {} for stream in streams}
        self._bad = [_BadRecords(stream, config.max_bad_fraction) for stream in streams]
        self._own = [
            (stream, unit)
            for number, (stream, unit) in enumerate(
                (stream, unit) for stream in streams for unit in range(len(stream.units))
            )
            if number % config.num_workers == config.worker_rank
        ]
        self._done = 0

    @property
    def num_bytes(self) -> int:
        """About how much text this worker has to read."""
        by_stream = itertools.groupby(self._own, key=lambda item: item[0].number)
        total = 0
        for number, items in by_stream:
            stream = self._streams[number]
            size = sum(_text_bytes(stream.units[unit]) for _, unit in items)
            if stream.goal is not None and not stream.all_read:
                tokens = stream.goal * stream.cutting.seq_length // stream.cutting.sure_per_sample
                size = min(size, 4 * tokens)
            total += min(size, stream.source.max_characters or size)
        return total

    def run(self, pool: Pool) -> None:
        """Reads, encodes and writes until nothing of this worker's units is missing.

        Raises:
            ValueError: text that cannot be read, or far more of it than `max_bad_fraction`; a
                tokenizer without a chat template.
            OSError: the disk is full.
        """
        waiting: list[_Batch] = []
        writer: _UnitWriter | None = None
        before = Used()

        def tasks() -> Iterator[Task]:
            for batch in self._batches():
                waiting.append(batch)
                yield Task(batch.unit.stream.source_number, batch.documents)

        try:
            for result in pool.map(tasks()):
                batch = waiting.pop(0)
                if batch.unit.stream.number in self._stopped:
                    continue
                if writer is None:
                    writer = self._open(batch.unit)
                    before = self._before(batch.unit.stream, batch.unit.number) + batch.unit.held
                used = writer.add(batch, result)
                if not batch.unit.skip:
                    self._bad[batch.unit.stream.number].add(batch.report)
                enough = batch.unit.stream.reached(before + used)
                if batch.last or enough:
                    writer.finish()
                    writer = None
                    self._known[batch.unit.stream.number][batch.unit.number] = (
                        batch.unit.held + used
                    )
                    self._tell(batch.unit.stream)
                    if batch.last and not batch.unit.skip:
                        unit = batch.unit.stream.units[batch.unit.number]
                        self._bad[batch.unit.stream.number].end_unit(unit)
                    if enough:
                        self._stopped.add(batch.unit.stream.number)
        finally:
            if writer is not None:
                writer.abandon()

    def _open(self, unit: _UnitTask) -> _UnitWriter:
        return _UnitWriter(
            unit,
            self._work,
            token_bytes=self._token_bytes,
            signature_bytes=self._signature_bytes,
            owner=self._owner,
        )

    def _tell(self, stream: Stream) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(f"{stream.split} text", self._done, len(self._own))

    def _batches(self) -> Iterator[_Batch]:
        for stream, number in self._own:
            if stream.number in self._stopped:
                self._tell(stream)
                continue
            stamp = unit_stamp(stream.units[number])
            state = unit_state(self._work, stream, number, stamp=stamp)
            if state.complete or stream.reached(self._before(stream, number) + state.used):
                if state.complete:
                    self._known[stream.number][number] = state.used
                self._tell(stream)
                continue
            yield from self._read(
                _UnitTask(
                    stream=stream,
                    number=number,
                    stamp=stamp,
                    skip=state.parts[-1][1].num_read if state.parts else 0,
                    next_part=len(state.parts),
                    held=state.used,
                )
            )

    def _before(self, stream: Stream, number: int) -> Used:
        """What units before this one hold for certain: this worker's and, if there, others'."""
        if not stream.limited:
            return Used()
        known = self._known[stream.number]
        if self._config.num_workers > 1:
            for other in range(number):
                if other not in known:
                    state = unit_state(self._work, stream, other, stamp=None)
                    if state.complete:
                        known[other] = state.used
        return sum((used for unit, used in known.items() if unit < number), Used())

    def _read(self, unit: _UnitTask) -> Iterator[_Batch]:
        """Batches of a unit from where its parts end."""
        stream = unit.stream
        report = UnitReport()
        batch = _Batch(unit, num_read=unit.skip)
        characters = num_read = 0
        for document in read_unit(stream.units[unit.number], report):
            num_read += 1
            if num_read <= unit.skip:
                if num_read == unit.skip:
                    _take(report)  # the parts tell of what came before
                continue
            batch.documents.append(document)
            characters += document.num_characters
            if characters >= stream.batch_characters or len(batch.documents) == BATCH_DOCUMENTS:
                batch.num_read, batch.report = num_read, _take(report)
                yield batch
                if stream.number in self._stopped:
                    return
                batch, characters = _Batch(unit), 0
        batch.num_read, batch.report, batch.last = num_read, _take(report), True
        yield batch


def _text_bytes(unit: Unit) -> int:
    """Bytes of a unit's text, compressed files at three times their size."""
    packed = unit.parts[0].path.endswith(COMPRESSED_SUFFIXES)
    return unit.num_bytes * (3 if packed else 1)


def _take(report: UnitReport) -> UnitReport:
    """What has been counted since the last call; the reader goes on counting in the same object."""
    taken = UnitReport()
    taken.merge(report)
    vars(report).update(vars(UnitReport()))
    return taken


class _UnitWriter:
    """Writes the parts of one unit."""

    def __init__(
        self,
        unit: _UnitTask,
        work: Path,
        *,
        token_bytes: int,
        signature_bytes: int,
        owner: str,
    ) -> None:
        self._unit, self._work = unit, work
        self._sizes = {"token_bytes": token_bytes, "signature_bytes": signature_bytes}
        self._owner = owner
        self._number = unit.next_part
        self._part: PartWriter | None = None
        self._part_used = self._used = Used()

    def add(self, batch: _Batch, result: Result) -> Used:
        """Writes a batch; gives what this writer has written of the unit."""
        if self._part is not None and self._is_large(self._part):
            self._end_part(last=False)
        if self._part is None:
            path = unit_path(self._work, self._unit.stream, self._unit.number, self._number)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._part = PartWriter(path, owner=self._owner, **self._sizes)
            self._part_used = Used()
        for document in result.documents:
            self._part.add(document)
        batch.report.merge(result.report)
        self._part.end_batch(num_read=batch.num_read, report=batch.report.to_dict())
        added = self._unit.stream.used_by(result.documents)
        self._part_used += added
        self._used += added
        return self._used

    def finish(self) -> None:
        """The unit's last part ends."""
        self._end_part(last=True)

    def abandon(self) -> None:
        """Leaves nothing of the part that is not whole."""
        if self._part is not None:
            self._part.abandon()

    def _end_part(self, *, last: bool) -> None:
        assert self._part is not None
        self._part.finish(
            used=dataclasses.asdict(self._part_used), stamp=self._unit.stamp, last=last
        )
        self._part = None
        self._number += 1

    @staticmethod
    def _is_large(part: PartWriter) -> bool:
        return part.num_tokens >= PART_TOKENS or part.num_documents >= PART_DOCUMENTS
