"""Reading a unit: its documents one after the other, in constant memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from data_prep.config import FILE_KINDS, SourceConfig
from data_prep.readers.base import Document, Part, Unit, UnitReport, split_of
from data_prep.readers.dataset import read_dataset
from data_prep.readers.files import COMPRESSED_SUFFIXES, is_archive_error, open_bytes
from data_prep.readers.lines import BrokenArrayError, Line, read_array, read_lines
from data_prep.readers.parquet import read_parquet
from data_prep.readers.records import RecordReader
from data_prep.readers.units import ARRAY_SUFFIX

_BROKEN_ARCHIVE = "truncated or corrupt archive"


def read_unit(unit: Unit, report: UnitReport) -> Iterator[Document]:
    """Documents of a unit and of its split, in order; what cannot be read is counted.

    Args:
        unit: from `list_units`.
        report: filled while reading; `num_documents` counts what is given.

    Raises:
        ValueError: a file that was there is gone; a data set that cannot be reached.
    """
    for part in unit.parts:
        for document in _read_part(part, unit.source, report):
            split = part.split or split_of(document.id, unit.seed, unit.eval_fraction)
            if unit.split not in (split, "both"):
                report.num_other += 1
                continue
            report.num_documents += 1
            report.num_characters += document.num_characters
            yield document if split == "train" else replace(document, split=split)


def _read_part(part: Part, source: SourceConfig, report: UnitReport) -> Iterator[Document]:
    kind = source.read_kind.removeprefix("chat_")
    try:
        if kind == "dataset":
            yield from read_dataset(part, source, report)
        elif kind == "parquet":
            yield from read_parquet(part, source, report)
        elif kind in FILE_KINDS:
            yield from _read_file(part, source, report)
        elif part.path.removesuffix(_compression(part.path)).endswith(ARRAY_SUFFIX):
            yield from _read_json(part, source, report)
        else:
            yield from _read_lines(part, source, report)
    except FileNotFoundError as error:
        raise ValueError(
            f"source {source.name}: {part.path} is gone since it was listed; put it back"
        ) from error


def _compression(path: str) -> str:
    return next((suffix for suffix in COMPRESSED_SUFFIXES if path.endswith(suffix)), "")


def _read_file(part: Part, source: SourceConfig, report: UnitReport) -> Iterator[Document]:
    """A document a file; an empty one is none."""
    limit = source.max_record_bytes
    with open_bytes(part.path) as stream:
        try:
            data = stream.read(limit + 1)
        except Exception as error:
            if not is_archive_error(error):
                raise
            report.broken(_BROKEN_ARCHIVE, part.label, detail=str(error))
            return
    if len(data) > limit:
        report.bad(f"file longer than {limit} bytes", part.label, excerpt=data[:1024])
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        report.bad("invalid UTF-8", part.label, detail=f"byte {error.start}", excerpt=data[:1024])
        return
    if text:
        yield Document(text, part.label, source.name)
    else:
        report.num_empty += 1


def _read_lines(part: Part, source: SourceConfig, report: UnitReport) -> Iterator[Document]:
    """A document a line, named `file:line`, or `file@offset` where the file is cut."""
    reader = RecordReader(source)
    with open_bytes(part.path) as stream:
        lines = read_lines(stream, source.max_record_bytes, start=part.start, stop=part.stop)
        for line in _until_broken(lines, part, report):
            name = f":{line.number}" if part.stop is None else f"@{line.offset}"
            where = part.label + name
            if line.too_long:
                reason = f"record longer than {source.max_record_bytes} bytes"
                report.bad(reason, where, excerpt=line.data)
            elif line.data.strip():
                record = _parse(line.data, where, report)
                if record is not None:
                    excerpt = line.data[:1024]
                    document = reader.document(record, where, report, excerpt=excerpt)
                    if document is not None:
                        yield document


def _until_broken(lines: Iterator[Line], part: Part, report: UnitReport) -> Iterator[Line]:
    """Lines of a file; a truncated or corrupt archive ends it, counted."""
    while True:
        try:
            line = next(lines, None)
        except Exception as error:
            if not is_archive_error(error):
                raise
            report.broken(_BROKEN_ARCHIVE, part.label, detail=str(error))
            return
        if line is None:
            return
        yield line


def _parse(data: bytes, where: str, report: UnitReport) -> Any:
    """The JSON value of a line; None, counted, where it is none."""
    try:
        record = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        report.bad("invalid UTF-8", where, detail=f"byte {error.start}", excerpt=data[:1024])
        return None
    except (ValueError, RecursionError):
        report.bad("invalid JSON", where, excerpt=data[:1024])
        return None
    if record is None:
        report.bad("record is no JSON object", where, excerpt=data[:1024])
    return record


def _read_json(part: Part, source: SourceConfig, report: UnitReport) -> Iterator[Document]:
    """A document an item of the file's one array, named `file:number`."""
    reader = RecordReader(source)
    with open_bytes(part.path) as stream:
        items = read_array(stream, source.max_record_bytes)
        while True:
            try:
                item = next(items, None)
            except BrokenArrayError as error:
                report.broken("JSON array ends early or is broken", part.label, detail=str(error))
                return
            except Exception as error:
                if not is_archive_error(error):
                    raise
                report.broken(_BROKEN_ARCHIVE, part.label, detail=str(error))
                return
            if item is None:
                return
            number, record = item
            document = reader.document(record, f"{part.label}:{number}", report)
            if document is not None:
                yield document
