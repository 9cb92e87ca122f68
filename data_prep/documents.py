"""A source's documents in one stream, for one process; `data_prep.readers` has the parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from data_prep.config import SourceConfig
from data_prep.readers import (
    Document,
    ReadReport,
    Unit,
    UnitReport,
    find_files,
    list_units,
    package_files,
    read_unit,
)

__all__ = [
    "Document",
    "ReadReport",
    "SourceConfig",
    "Unit",
    "UnitReport",
    "find_files",
    "list_units",
    "package_files",
    "read_documents",
    "read_unit",
]


def read_documents(
    config: SourceConfig,
    *,
    evaluation: bool = False,
    keep: Callable[[str], bool] | None = None,
    report: ReadReport | None = None,
) -> Iterator[Document]:
    """Documents of a source's own text (for generated sources: of their filler), in a fixed order.

    Args:
        config: the source.
        evaluation: read the source's own text for the eval split (nothing where it names none).
        keep: which documents (by id) or packages (by name) to read; all where None.
        report: filled while reading.

    Raises:
        ValueError: path or package not there.
    """
    report = ReadReport() if report is None else report
    if keep is not None and config.read_kind == "python_packages":
        names = config.eval_packages if evaluation else config.packages
        names = tuple(name for name in names if keep(name))
        if not names:
            return
        if evaluation:
            config = replace(config, eval_packages=names)
        else:
            config = replace(config, packages=names)
        keep = None
    split = "eval" if evaluation else "train"
    units = list_units(config, split)
    for document in (document for unit in units for document in read_unit(unit, report)):
        if keep is not None and not keep(document.id):
            report.num_documents -= 1
            report.num_characters -= document.num_characters
            continue
        yield document
        if config.max_documents is not None and report.num_documents >= config.max_documents:
            return
        limit = config.max_characters
        if limit is not None and report.num_characters >= limit:
            return
