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

__all__ = [
    "SPLITS",
    "BadRecord",
    "Document",
    "Drop",
    "Part",
    "ReadReport",
    "Unit",
    "UnitReport",
    "split_of",
]
