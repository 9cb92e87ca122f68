"""Parquet files, row group by row group."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from data_prep.config import SourceConfig
from data_prep.readers.base import Document, Part, UnitReport
from data_prep.readers.files import FileEntry, open_raw
from data_prep.readers.records import RecordReader

_BATCH_BYTES = 8 * 2**20
_MAX_BATCH = 1024


def parquet_parts(entry: FileEntry, source: SourceConfig, split: str) -> list[tuple[Part, int]]:
    """Ranges of row groups of about unit_bytes; an unreadable file is one part, told when read.

    Raises:
        ValueError: the table has no column for the text.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_raw(entry.path) as stream, pq.ParquetFile(stream) as file:
            _columns(file, source, entry.label)
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            sizes = [group.total_byte_size for group in groups]
    except (pa.ArrowException, OSError) as error:
        _raise_of_system(error)
        return [(Part(entry.path, entry.label, split=split), entry.size)]
    parts: list[tuple[Part, int]] = []
    first = total = 0
    for number, size in enumerate(sizes):
        if total and total + size > source.unit_bytes:
            parts.append((Part(entry.path, entry.label, first, number, split), total))
            first, total = number, 0
        total += size
    parts.append((Part(entry.path, entry.label, first, len(sizes), split), total))
    return parts


def _columns(file: Any, source: SourceConfig, label: str) -> list[str]:
    """The columns to read, of those that the table has."""
    reader = RecordReader(source)
    known = file.schema_arrow.names
    check_columns(reader, known, source.name, label)
    return [name for name in reader.columns if name in known]


def check_columns(reader: RecordReader, known: list[str], source: str, label: str) -> None:
    """Raises ValueError for a table without what records are read for."""
    missing = [name for name in reader.needed if name not in known]
    if missing or not any(name in known for name in reader.columns):
        shown = missing[0] if missing else "messages"
        raise ValueError(
            f"source {source}: {label} has no column {shown!r}; it has {', '.join(known)}: "
            f"set fields in data.sources"
        )


def read_parquet(part: Part, source: SourceConfig, report: UnitReport) -> Iterator[Document]:
    """Documents of a range of row groups, named `file:row` where they have no id."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    reader = RecordReader(source)
    try:
        with open_raw(part.path) as stream, pq.ParquetFile(stream, pre_buffer=False) as file:
            columns = _columns(file, source, part.label)
            stop = file.num_row_groups if part.stop is None else part.stop
            sizes = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            row = sum(group.num_rows for group in sizes[: part.start])
            chosen = sizes[part.start : stop]
            num_rows = sum(group.num_rows for group in chosen)
            num_bytes = sum(group.total_byte_size for group in chosen)
            batch_size = max(
                1, min(_MAX_BATCH, math.ceil(_BATCH_BYTES * num_rows / max(num_bytes, 1)))
            )
            groups = list(range(part.start, stop))
            for batch in file.iter_batches(batch_size, row_groups=groups, columns=columns):
                for record, problem in _records(batch):
                    row += 1
                    where = f"{part.label}:{row}"
                    if problem:
                        report.bad(problem, where)
                    elif _size(record) > source.max_record_bytes:
                        report.bad(f"record longer than {source.max_record_bytes} bytes", where)
                    elif document := reader.document(record, where, report):
                        yield document
    except (pa.ArrowException, OSError) as error:
        _raise_of_system(error)
        line = " ".join(str(error).split())[:200]
        report.broken("truncated or corrupt parquet file", part.label, detail=line)


def _raise_of_system(error: Exception) -> None:
    """Raises what the operating system says (no such file, no permission); the rest is the file."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def _records(batch: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows as dictionaries, or why a row is none."""
    try:
        for record in batch.to_pylist():
            yield record, ""
        return
    except UnicodeDecodeError:
        pass  # one row spoils the batch: row by row then
    for number in range(batch.num_rows):
        try:
            yield batch.slice(number, 1).to_pylist()[0], ""
        except UnicodeDecodeError:
            yield {}, "invalid UTF-8"


def _size(record: dict[str, Any]) -> int:
    """Characters of the texts of a row, at any depth."""
    total = 0
    stack: list[Any] = [record]
    while stack:
        value = stack.pop()
        if isinstance(value, str | bytes):
            total += len(value)
        elif isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)
    return total
