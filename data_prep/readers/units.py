"""Cutting a source into units: by its files alone, whoever reads them."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from data_prep.config import SourceConfig
from data_prep.readers.base import SPLITS, Part, Unit, split_of, unit_hash
from data_prep.readers.dataset import dataset_parts
from data_prep.readers.files import COMPRESSED_SUFFIXES, FileEntry, is_url, list_files
from data_prep.readers.parquet import parquet_parts

_MAX_FILES = 1024
"""Most files of a unit."""
_MARKDOWN_SUFFIXES = (".md", ".markdown")
LINE_SUFFIXES = (".jsonl", ".ndjson")
ARRAY_SUFFIX = ".json"
Sized = tuple[Part, int]
"""A part and its size in bytes."""


def list_units(
    source: SourceConfig, split: str, *, seed: int = 0, eval_fraction: float = 0.0
) -> list[Unit]:
    """The units of a source's own text (for generated sources: of their filler), in order.

    The eval split has text of its own where the source names it (eval_path, eval_packages,
    eval_dataset_split). Otherwise whole packages, or documents by the hash of their id, are held
    out.

    Args:
        source: the source.
        split: `train`, `eval`, or `both`: then every document says its split itself.
        seed: of what is held out.
        eval_fraction: share of what is held out.

    Raises:
        ValueError: a path, package or data set is not there; a table has no column for the text.
    """
    if split not in (*SPLITS, "both"):
        raise ValueError(f"split={split!r} is not train, eval or both")
    kind = source.read_kind
    wanted = SPLITS if split == "both" else (split,)
    sized: list[Sized] = []
    if kind == "python_packages":
        for name in wanted:
            sized += _package_parts(source, name, seed, eval_fraction)
    elif source.eval_path or source.eval_dataset_split:
        for name in wanted:
            path = source.eval_path if name == "eval" and source.eval_path else source.path
            sized += _parts(replace(source, path=path), name, seed, eval_fraction)
    elif split != "eval" or eval_fraction > 0:
        sized = _parts(source, "", seed, eval_fraction)
        sized = [(p, size) for p, size in sized if not p.split or p.split in wanted]
    return [
        Unit(source, number, tuple(parts), split, seed, eval_fraction, size)
        for number, (parts, size) in enumerate(_group(sized, source.unit_bytes))
    ]


def _group(sized: Iterable[Sized], unit_bytes: int) -> Iterator[tuple[list[Part], int]]:
    """Neighbours go together while they are small."""
    group: list[Part] = []
    total = 0
    for part, size in sized:
        if group and (total + size > unit_bytes or len(group) == _MAX_FILES):
            yield group, total
            group, total = [], 0
        group.append(part)
        total += size
    if group:
        yield group, total


def _parts(source: SourceConfig, split: str, seed: int, eval_fraction: float) -> list[Sized]:
    kind = source.read_kind.removeprefix("chat_")
    path = source.path
    assert path is not None  # SourceConfig has checked it
    if kind == "dataset":
        return dataset_parts(source, path, split)
    entries = list_files(path, source.pattern)
    if kind == "markdown":
        entries = _with_suffix(entries, _MARKDOWN_SUFFIXES, path)
    if kind in ("text", "markdown"):
        entries = _in_order(entries, source.file_order)
        return [
            (Part(e.path, e.label, split=split or split_of(e.label, seed, eval_fraction)), e.size)
            for e in entries
        ]
    if kind == "parquet":
        return [
            sized
            for entry in _with_suffix(entries, (".parquet",), path)
            for sized in parquet_parts(entry, source, split)
        ]
    plain = (*LINE_SUFFIXES, ARRAY_SUFFIX) if source.pattern != "*" else LINE_SUFFIXES
    suffixes = tuple(s + c for s in plain for c in ("", *COMPRESSED_SUFFIXES))
    entries = _with_suffix(entries, suffixes, path)
    return [sized for entry in entries for sized in _line_parts(entry, source.unit_bytes, split)]


def _with_suffix(entries: list[FileEntry], suffixes: tuple[str, ...], path: str) -> list[FileEntry]:
    """Of a folder's files those of a kind; a file or a glob says itself what to read."""
    if not is_url(path) and not Path(path).is_dir():
        return entries
    if is_url(path) and (len(entries) == 1 or "*" in path):
        return entries
    found = [entry for entry in entries if entry.label.endswith(suffixes)]
    if not found:
        raise ValueError(
            f"path={path} has {len(entries)} files but none that ends in {', '.join(suffixes)}; "
            "correct it or give a glob such as path=FOLDER/*.txt"
        )
    return found


def _in_order(entries: list[FileEntry], file_order: str) -> list[FileEntry]:
    if file_order == "sorted":
        return entries
    return sorted(entries, key=lambda entry: hashlib.sha256(entry.label.encode()).digest())


def _line_parts(entry: FileEntry, unit_bytes: int, split: str) -> list[Sized]:
    """The file, or equal byte ranges of it where its lines can be reached by seeking."""
    whole = entry.path.endswith((*COMPRESSED_SUFFIXES, ARRAY_SUFFIX))
    count = 1 if whole else max(1, -(-entry.size // unit_bytes))
    if count == 1:
        return [(Part(entry.path, entry.label, split=split), entry.size)]
    borders = [entry.size * i // count for i in range(count + 1)]
    return [
        (Part(entry.path, entry.label, start, stop, split), stop - start)
        for start, stop in itertools.pairwise(borders)
    ]


def _package_parts(
    source: SourceConfig, split: str, seed: int, eval_fraction: float
) -> list[Sized]:
    if source.eval_packages:
        names = source.eval_packages if split == "eval" else source.packages
    else:
        names = held_out_packages(source.packages, split, seed, eval_fraction)
    files = [pair for name in names for pair in package_files(name)]
    entries = [FileEntry(str(file), label, file.stat().st_size) for label, file in files]
    entries = _in_order(entries, source.file_order)
    return [(Part(e.path, e.label, split=split), e.size) for e in entries]


def held_out_packages(
    packages: tuple[str, ...], split: str, seed: int, eval_fraction: float
) -> tuple[str, ...]:
    """Packages of a split, by the hash of their names: files of one package resemble each other."""
    count = 0
    if eval_fraction > 0 and len(packages) > 1:
        count = max(1, round(eval_fraction * len(packages)))
    ranked = sorted(packages, key=lambda name: unit_hash(seed, name))
    chosen = set(ranked[:count] if split == "eval" else ranked[count:])
    return tuple(name for name in packages if name in chosen)


def package_files(name: str) -> list[tuple[str, Path]]:
    """(id, file) of an installed package's .py files, sorted by id; a module is one file.

    Raises:
        ValueError: not installed, or without source files.
    """
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None:
        raise ValueError(
            f"package {name!r} is not installed here; install it or take it out of packages"
        )
    files: list[tuple[str, Path]] = []
    roots = list(spec.submodule_search_locations or [])
    for root in roots:
        for file in Path(root).rglob("*.py"):
            files.append((f"{name}/{file.relative_to(root).as_posix()}", file))
    if not roots and spec.origin and spec.origin.endswith(".py"):
        files.append((f"{name}.py", Path(spec.origin)))
    if not files:
        raise ValueError(f"package {name!r} has no .py files; take it out of packages")
    return sorted(files)
