"""Readers: every source of text as a stream of `Document`, in an order that never changes."""

from __future__ import annotations

from data_prep.readers.base import (
    SPLITS,
    BadRecord,
    Document,
    Drop,
    Part,
    ReadReport,
    Unit,
    UnitReport,
    split_of,
)
from data_prep.readers.files import find_files
from data_prep.readers.read import read_unit
from data_prep.readers.units import held_out_packages, list_units, package_files

__all__ = [
    "SPLITS",
    "BadRecord",
    "Document",
    "Drop",
    "Part",
    "ReadReport",
    "Unit",
    "UnitReport",
    "find_files",
    "held_out_packages",
    "list_units",
    "package_files",
    "read_unit",
    "split_of",
]
