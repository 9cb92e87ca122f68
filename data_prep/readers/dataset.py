"""Hugging Face `datasets`: names on the hub, folders of data files, folders of save_to_disk."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.config import SourceConfig
from data_prep.readers.base import Document, Part, UnitReport
from data_prep.readers.parquet import check_columns
from data_prep.readers.records import RecordReader


def dataset_parts(source: SourceConfig, path: str, split: str) -> list[tuple[Part, int]]:
    """Rows of a saved data set, or shards of a streamed one.

    Raises:
        ValueError: it is not there or cannot be reached, or has no such split or column.
    """
    name = source.eval_dataset_split if split == "eval" else None
    name = name or source.dataset_split
    dataset = open_dataset(path, source.subset, source.revision, name)
    label = f"{Path(path).name if Path(path).is_dir() else path}[{name}]"
    if dataset.column_names is not None:
        check_columns(RecordReader(source), list(dataset.column_names), source.name, label)
    if not hasattr(dataset, "num_rows"):
        return [
            (Part(path, f"{label}#{i}", i, dataset.num_shards, split), source.unit_bytes)
            for i in range(dataset.num_shards)
        ]
    num_rows, num_bytes = dataset.num_rows, dataset.data.nbytes
    step = max(1, num_rows * source.unit_bytes // max(num_bytes, 1))
    return [
        (Part(path, label, first, min(first + step, num_rows), split), source.unit_bytes)
        for first in range(0, num_rows, step)
    ]


def read_dataset(part: Part, source: SourceConfig, report: UnitReport) -> Iterator[Document]:
    """Documents of a part, named `name[split]:row` where they have no id."""
    reader = RecordReader(source)
    split = part.label.rpartition("[")[2].partition("]")[0]
    dataset = open_dataset(part.path, source.subset, source.revision, split)
    row = 0
    if hasattr(dataset, "num_rows"):
        row = part.start
        dataset = dataset.select(range(part.start, part.stop or dataset.num_rows))
    else:
        dataset = dataset.shard(num_shards=part.stop, index=part.start)
    if dataset.column_names is not None:
        kept = [name for name in reader.columns if name in dataset.column_names]
        dataset = dataset.select_columns(kept)
    for number, record in enumerate(dataset, start=row + 1):
        document = reader.document(record, f"{part.label}:{number}", report)
        if document is not None:
            yield document


@functools.lru_cache(maxsize=4)
def open_dataset(path: str, subset: str | None, revision: str | None, split: str) -> Any:
    """A `Dataset` (saved on disk) or an `IterableDataset` (streamed).

    Raises:
        ValueError: it is not there or cannot be reached, or has no such split.
    """
    import datasets

    folder = Path(path)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            saved = datasets.load_from_disk(path)
            if not isinstance(saved, datasets.DatasetDict):
                return saved
            if split not in saved:
                raise ValueError(f"it has the splits {', '.join(saved)}")
            return saved[split]
        return datasets.load_dataset(path, subset, split=split, revision=revision, streaming=True)
    except ConnectionError as error:
        line = " ".join(str(error).split())
        raise ValueError(
            f"data set {path!r} is no folder here and cannot be reached ({line}); where there is a "
            f"network run `hf download --repo-type dataset {path} --local-dir DIR`, copy DIR here "
            "and set path=DIR"
        ) from error
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())
        raise ValueError(
            f"data set {path!r} (subset {subset}, split {split}) cannot be opened: {line}; correct "
            "path, subset or dataset_split"
        ) from error
