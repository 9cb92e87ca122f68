"""Phase 2: from the indexes alone, which pieces of which documents stand in which sample.

Reads no text and no tokens. Its memory does not grow with the corpus (but with `dedup`, which holds
some hundred bytes a document); packing goes in windows of `WINDOW_PIECES`. Every worker that comes
here first makes the same files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.atomic import AtomicFile, write_atomic
from data_prep.config import PrepareConfig
from data_prep.dedup import EXACT, NEAR, Signer, find_duplicates
from data_prep.engine.parts import Part, PartRecord, load_record
from data_prep.engine.streams import Stream, Used, unit_state
from data_prep.pack import WINDOW_PIECES, CutCounts, pack_pieces
from data_prep.readers import UnitReport
from data_prep.readers.base import MAX_EXAMPLES

PIECE = np.dtype([("part", "<u4"), ("document", "<u4"), ("start", "<u4"), ("length", "<u4")])
_BLOCK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """What phase 3 needs to know of a stream, but for the files of pieces."""

    num_available: int
    """Samples."""
    fingerprint: str
    """SHA-256 (hex) of the documents behind them."""
    report: dict[str, Any]
    """Counts for the manifest."""
    parts: list[dict[str, Any]]
    """The parts' files and records, in the order that pieces number them by."""


def plan_path(work: Path, stream: Stream, suffix: str) -> Path:
    """A file of a stream's plan; the `.json` is written last."""
    return work / "plan" / f"{stream.name}{suffix}"


def load_plan(work: Path, stream: Stream) -> StreamPlan | None:
    """The plan of a stream; None where it is not made yet."""
    path = plan_path(work, stream, ".json")
    return StreamPlan(**json.loads(path.read_bytes())) if path.is_file() else None


def make_plans(
    config: PrepareConfig, streams: list[Stream], work: Path, *, owner: str = ""
) -> list[StreamPlan]:
    """The plans of all streams; those that are there already are read.

    All units that count must be whole.

    Raises:
        ValueError: more records of a source are unreadable than `max_bad_fraction`.
    """
    found = [load_plan(work, stream) for stream in streams]
    plans = [plan for plan in found if plan is not None and _holds(work, plan)]
    if len(plans) == len(streams):
        return plans
    (work / "plan").mkdir(parents=True, exist_ok=True)
    duplicates = _find_duplicates(config, streams, work, owner)
    for stream, dropped in zip(streams, duplicates, strict=True):
        _Planner(config, stream, work, dropped, owner).run()
    return [plan for plan in (load_plan(work, stream) for stream in streams) if plan is not None]


def _holds(work: Path, plan: StreamPlan) -> bool:
    """Whether a plan was made from the parts that are there; text may have changed since."""
    for part in plan.parts:
        record = load_record(work / part["path"])
        if record is None or record.digest != part["record"]["digest"]:
            return False
    return True


def stream_parts(work: Path, stream: Stream) -> Iterator[tuple[Path, PartRecord]]:
    """Parts of a stream in order, up to the first unit that is missing or not whole."""
    for unit in range(len(stream.units)):
        state = unit_state(work, stream, unit, stamp=None)
        yield from state.parts
        if not state.complete:
            return


@dataclass(frozen=True)
class _Duplicates:
    """Documents of a stream that are left out, in its order up to its limits."""

    exact: NDArray[np.bool_]
    near: NDArray[np.bool_]
    examples: list[str]


def _find_duplicates(
    config: PrepareConfig, streams: list[Stream], work: Path, owner: str
) -> list[_Duplicates | None]:
    """Duplicates over all streams, those of the eval split first."""
    if config.dedup.mode == "none":
        return [None] * len(streams)
    signer = Signer(config.dedup)
    path = work / "plan" / f"signatures{owner}.bin"
    counts = []
    with open(path, "wb") as file:
        for stream in streams:
            counts.append(0)
            for _, part, rows, _ in _documents(stream, work, None):
                keep = len(rows)
                for block in part.signatures():
                    size = min(len(block), keep * signer.dtype.itemsize)
                    file.write(block[:size])
                    keep -= size // signer.dtype.itemsize
                counts[-1] += len(rows)
    if not sum(counts):
        return [None] * len(streams)
    rows = np.memmap(path, dtype=signer.dtype, mode="r")
    found = find_duplicates(rows, config.dedup)
    del rows
    path.unlink()
    exact, near = (found.keeper >= 0) & ~found.near, found.near
    ends = np.cumsum(counts)
    first = [
        end - count + np.flatnonzero(found.keeper[end - count : end] >= 0)[:MAX_EXAMPLES]
        for count, end in zip(counts, ends, strict=True)
    ]
    wanted = np.concatenate(first)
    names = _names(streams, work, {*wanted.tolist(), *found.keeper[wanted].tolist()})
    return [
        _Duplicates(
            exact[end - count : end],
            near[end - count : end],
            [f"{names[i]}: {found.reason(i)} of {names[found.keeper[i]]}" for i in shown.tolist()],
        )
        for count, end, shown in zip(counts, ends, first, strict=True)
    ]


def _names(streams: list[Stream], work: Path, wanted: set[int]) -> dict[int, str]:
    """Ids of some documents by their number over all streams."""
    names: dict[int, str] = {}
    first = 0
    for stream in streams if wanted else []:
        for _, part, rows, _ in _documents(stream, work, None):
            here = [number for number in wanted if first <= number < first + len(rows)]
            for number in here:
                place = number - first
                names[number] = part.identities(rows[place : place + 1])[0]
            first += len(rows)
    return names


def _documents(
    stream: Stream, work: Path, duplicates: _Duplicates | None, *, goal: bool = False
) -> Iterator[tuple[tuple[Path, PartRecord], Part, NDArray[Any], bool]]:
    """The index rows of each part up to the cut, and whether the part holds the cut.

    Args:
        stream: the stream.
        work: folder of the work files.
        duplicates: of the whole stream.
        goal: end with the goal too, not only with limits.
    """
    used, place = Used(), 0
    for path, record in stream_parts(work, stream):
        part = Part(path, record)
        try:
            rows = part.rows(0, record.num_documents)
            dropped = np.zeros(len(rows), dtype=bool)
            if duplicates is not None:
                span = slice(place, place + len(rows))
                dropped = duplicates.exact[span] | duplicates.near[span]
                dropped = np.pad(dropped, (0, len(rows) - len(dropped)))
            used, cut = stream.cut(used, rows, dropped if goal else None)
            place += len(rows)
            yield (path, record), part, rows if cut is None else rows[:cut], cut is not None
        finally:
            part.close()
        if cut is not None:
            return


class _Planner:
    """Makes the plan of one stream."""

    def __init__(
        self,
        config: PrepareConfig,
        stream: Stream,
        work: Path,
        duplicates: _Duplicates | None,
        owner: str,
    ) -> None:
        self._config, self._stream, self._work = config, stream, work
        self._duplicates, self._owner = duplicates, owner
        self._counts = CutCounts()
        self._window: list[NDArray[Any]] = []
        self._num_window = self._num_samples = self._num_pieces = self._num_tokens = 0
        self._histogram = np.zeros(33, dtype=np.int64)

    def run(self) -> None:
        """Writes the plan's files, the record last."""
        owner = self._owner
        self._pieces = AtomicFile(plan_path(self._work, self._stream, ".pieces"), owner=owner)
        self._samples = AtomicFile(plan_path(self._work, self._stream, ".samples"), owner=owner)
        self._samples.write(np.zeros(1, dtype="<u8").tobytes())
        try:
            record = self._plan()
        except BaseException:
            self._pieces.abandon()
            self._samples.abandon()
            raise
        self._pieces.commit()
        self._samples.commit()
        text = json.dumps(dataclasses.asdict(record)) + "\n"
        write_atomic(plan_path(self._work, self._stream, ".json"), text.encode(), owner=owner)

    def _plan(self) -> StreamPlan:
        parts: list[dict[str, Any]] = []
        report = UnitReport()
        digest = hashlib.sha256()
        totals = dict.fromkeys(("kept", "tokens", EXACT, NEAR, f"{EXACT}s", f"{NEAR}s"), 0)
        place = 0
        found = _documents(self._stream, self._work, self._duplicates, goal=True)
        for (path, record), _, rows, is_cut in found:
            read = 0
            for batch in _batches(record, len(rows) if is_cut else None):
                report.merge(UnitReport.from_dict(batch["report"]))
                read = int(batch["num_kept"])
            report.num_documents -= max(read - len(rows), 0)  # the batch goes on behind the cut
            for name in ("length", "hash", "num_spans"):
                digest.update(np.ascontiguousarray(rows[name]).tobytes())
            keep = np.ones(len(rows), dtype=bool)
            if self._duplicates is not None:
                span = slice(place, place + len(rows))
                for reason, which in (
                    (EXACT, self._duplicates.exact[span]),
                    (NEAR, self._duplicates.near[span]),
                ):
                    totals[reason] += int(which.sum())
                    totals[f"{reason}s"] += int(rows["length"][which].sum(dtype=np.int64))
                    keep &= ~which
            place += len(rows)
            lengths = rows["length"][keep].astype(np.int64)
            totals["kept"] += len(lengths)
            totals["tokens"] += int(lengths.sum())
            bins = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
            self._histogram += np.bincount(bins, minlength=33)
            self._add(rows, np.flatnonzero(keep), len(parts))
            parts.append(
                {
                    "path": str(path.relative_to(self._work)),
                    "record": {**dataclasses.asdict(record), "batches": [], "stamp": []},
                }
            )
        report.check(self._stream.source.name, self._config.max_bad_fraction)
        self._flush()
        return StreamPlan(
            num_available=self._num_samples,
            fingerprint=digest.hexdigest(),
            report=self._report(report, totals),
            parts=parts,
        )

    def _add(self, rows: NDArray[Any], keep: NDArray[np.int64], part: int) -> None:
        """Cuts the kept documents of a part and packs what fills a window."""
        for first in range(0, len(keep), _BLOCK):
            chosen = keep[first : first + _BLOCK]
            pieces = self._stream.cutting.cut(
                rows["length"][chosen], rows["hash"][chosen], self._counts
            )
            found = np.zeros(len(pieces), dtype=PIECE)
            found["part"] = part
            found["document"] = chosen[pieces.document]
            found["start"], found["length"] = pieces.start, pieces.length
            while len(found):
                room = WINDOW_PIECES - self._num_window
                self._window.append(found[:room])
                self._num_window += len(self._window[-1])
                found = found[room:]
                if self._num_window == WINDOW_PIECES:
                    self._flush()

    def _flush(self) -> None:
        """Packs the window."""
        if not self._num_window:
            return
        pieces = np.concatenate(self._window)
        self._window, self._num_window = [], 0
        if self._config.packing == "none":
            sizes = np.ones(len(pieces), dtype=np.int64)
        else:
            lengths = pieces["length"].astype(np.int64)
            order, sizes = pack_pieces(lengths, self._config.seq_length)
            pieces = pieces[order]
        ends = self._num_pieces + np.cumsum(sizes)
        self._pieces.write(pieces.tobytes())
        self._samples.write(ends.astype("<u8").tobytes())
        self._num_pieces += len(pieces)
        self._num_samples += len(sizes)
        self._num_tokens += int(pieces["length"].sum(dtype=np.int64))

    def _report(self, read: UnitReport, totals: dict[str, int]) -> dict[str, Any]:
        counts = self._counts
        dropped: dict[str, dict[str, int]] = {
            reason: {"documents": number, "characters": read.dropped_characters.get(reason, 0)}
            for reason, number in read.dropped.items()
        }
        for reason in (EXACT, NEAR):
            if totals[reason]:
                dropped[reason] = {"documents": totals[reason], "tokens": totals[f"{reason}s"]}
        for reason, number, tokens in (
            ("longer than a sample", counts.long, counts.long_tokens),
            ("end beyond the first window", counts.truncated, counts.truncated_tokens),
            ("tail", counts.tails, counts.tail_tokens),
        ):
            if number:
                dropped[reason] = {"documents": number, "tokens": tokens}
        too_long = read.dropped.get("conversation too long", 0) + counts.long
        room = self._num_samples * self._config.seq_length
        last = int(np.flatnonzero(self._histogram)[-1]) if self._histogram.any() else -1
        return {
            "num_documents": totals["kept"] + totals[EXACT] + totals[NEAR] + too_long - counts.long,
            "num_read": read.num_documents,
            "num_tokens": totals["tokens"],
            "num_samples_available": self._num_samples,
            "num_packed_tokens": self._num_tokens,
            "fill": round(self._num_tokens / room, 6) if room else 0.0,
            "num_dropped_tails": counts.tails,
            "num_dropped_tail_tokens": counts.tail_tokens,
            "num_dropped_too_long": too_long,
            "dropped": dropped,
            "dropped_examples": [str(sample) for sample in read.dropped_samples],
            "dropped_excerpts": [sample.excerpt for sample in read.dropped_samples],
            "duplicate_examples": self._duplicates.examples if self._duplicates else [],
            "cuts": read.cuts,
            "lengths": [int(number) for number in self._histogram[: last + 1]],
            "num_bad": read.num_bad,
            "bad_reasons": read.reasons,
            "bad": read.examples,
            "bad_excerpts": [sample.excerpt for sample in read.samples],
        }


def _batches(record: PartRecord, num_rows: int | None) -> Iterator[dict[str, Any]]:
    """A part's batches up to the one with its row `num_rows` - 1; None: all."""
    before = 0
    for batch in record.batches:
        if num_rows is not None and before >= num_rows:
            return
        yield batch
        before = int(batch["num_kept"])


class PlanReader:
    """Samples of a planned stream: which pieces each has.

    Args:
        work: folder of the work files.
        stream: the stream.
    """

    def __init__(self, work: Path, stream: Stream) -> None:
        self._samples = os.open(plan_path(work, stream, ".samples"), os.O_RDONLY)
        self._pieces = os.open(plan_path(work, stream, ".pieces"), os.O_RDONLY)

    def pieces(self, sample: int) -> NDArray[Any]:
        """[n] of `PIECE`."""
        first, last = np.frombuffer(os.pread(self._samples, 16, 8 * sample), dtype="<u8").tolist()
        size = PIECE.itemsize
        data = os.pread(self._pieces, (last - first) * size, first * size)
        return np.frombuffer(data, dtype=PIECE)

    def close(self) -> None:
        """Close the files."""
        os.close(self._samples)
        os.close(self._pieces)
