"""Items of evaluation sets, as text to be kept out of training.

Unlike a corpus an evaluation set must be whole: what cannot be read is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from data_prep.readers.files import (
    COMPRESSED_SUFFIXES,
    FileEntry,
    is_archive_error,
    list_files,
    open_bytes,
    open_raw,
)
from data_prep.settings import EvalSetConfig

_MAX_BYTES = 2**32


def read_items(config: EvalSetConfig) -> Iterator[tuple[str, str]]:
    """(name, text) of each item of a set: the texts of its chosen fields, by lines.

    Raises:
        ValueError: no file, one that cannot be read, or no item with any of the fields.
    """
    entries = list_files(config.path)
    found = False
    for entry in entries:
        label = config.name or entry.label
        if config.name and len(entries) > 1:
            label = f"{config.name}/{entry.label}"
        for number, record in enumerate(_records(entry), start=1):
            texts = list(_texts(record, config.fields))
            if texts:
                found = True
                yield f"{label}:{number}", "\n".join(texts)
    if not found:
        wanted = f"the fields {', '.join(config.fields)}" if config.fields else "any text"
        raise ValueError(
            f"evaluation set {config.path} has no item with {wanted}; correct "
            "data.decontaminate.sets"
        )


def _records(entry: FileEntry) -> Iterator[Any]:
    name = entry.label
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    try:
        if name.endswith(".parquet"):
            import pyarrow.parquet as pq

            with open_raw(entry.path) as stream:
                for batch in pq.ParquetFile(stream).iter_batches(256):
                    yield from batch.to_pylist()
            return
        with open_bytes(entry.path) as stream:
            if name.endswith((".jsonl", ".ndjson")):
                for line in stream:
                    if line.strip():
                        yield json.loads(line.decode("utf-8-sig"))
                return
            text = stream.read(_MAX_BYTES).decode("utf-8-sig")
        if name.endswith(".json"):
            yield from _top_level(json.loads(text))
        else:
            yield text
    except Exception as error:
        if not (isinstance(error, ValueError | OSError) or is_archive_error(error)):
            raise
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"evaluation set {entry.path} cannot be read ({said}); mend the file or take it out "
            "of data.decontaminate.sets"
        ) from error


def _top_level(value: Any) -> list[Any]:
    """Items of a JSON file: of its list, or of the lists in its object; else the whole."""
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        if lists:
            return [item for items in lists for item in items]
    return [value]


def _texts(record: Any, fields: tuple[str, ...]) -> Iterator[str]:
    """Texts of a record's fields, or all of them; a plain text is its own."""
    if isinstance(record, str):
        if record:
            yield record
        return
    values = [_follow(record, name) for name in fields] if fields else [record]
    for value in values:
        yield from _all_texts(value)


def _follow(record: Any, place: str) -> Any:
    """The value at a dotted path; a list on the way stands for each of its items."""
    if isinstance(record, dict) and place in record:
        return record[place]
    first, _, rest = place.partition(".")
    if isinstance(record, list):
        return [_follow(item, place) for item in record]
    if isinstance(record, dict) and first in record:
        return _follow(record[first], rest) if rest else record[first]
    return None


def _all_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if value:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _all_texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _all_texts(item)
