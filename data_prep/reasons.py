"""Why documents are left out, in words with the setting that decides it."""

from __future__ import annotations

import re
from typing import Any

from data_prep.decontaminate import CONTAMINATED
from data_prep.dedup import EXACT, NEAR

PIECE_REASONS = ("tail", "end beyond the first window")
"""Reasons that take a part of a document, not the document."""
_EXPLAINED = {
    EXACT: "the same words as an earlier document, upper and lower case aside (dedup.mode)",
    NEAR: "nearly the same words as an earlier document (dedup.threshold)",
    CONTAMINATED: "holds a passage of an evaluation set (decontaminate)",
    "tail": "a piece shorter than a sample, or than min_tail (packing, min_tail)",
    "end beyond the first window": "cut off because documents keep one window (long_documents)",
    "longer than a sample": "does not fit a sample and is not to be cut (long_documents)",
    "too few tokens": "shorter than filters.min_tokens",
    "too many tokens": "longer than filters.max_tokens",
    "conversation too long": "does not fit a sample (chat.too_long)",
    "no response within seq_length": "the first response lies beyond the sample (chat.too_long)",
    "no room for the document": "too little of it would be left (chat.min_document_tokens)",
    "empty after normalising": "nothing but control characters and spaces (filters.normalise)",
}
_PATTERNS = (
    (r"language ", "not one of filters.languages"),
    (r"fewer than .* characters", "filters.min_characters"),
    (r"more than .* characters", "filters.max_characters"),
    (r"fewer than .* words", "filters.min_words"),
    (r"more than .* words", "filters.max_words"),
    (r"less than .* letters", "mostly signs (filters.min_letter_fraction)"),
    (r".*repeated", "lines that come again (filters.max_repeated_line_fraction)"),
    (r".*line", "filters.max_line_characters"),
)


def explain(reason: str) -> str:
    """What a reason means and which setting decides it; empty for an unknown one."""
    if reason in _EXPLAINED:
        return _EXPLAINED[reason]
    return next((words for pattern, words in _PATTERNS if re.match(pattern, reason)), "")


def what_became_of(report: dict[str, Any]) -> str:
    """One sentence about where a source's documents went, with the reason that took most.

    Args:
        report: of a split and source, as the manifest has it.
    """
    read, bad = int(report.get("num_read", 0)), int(report.get("num_bad", 0))
    unreadable = f" and {bad:,} records were unreadable ({report['bad'][0]})" if bad else ""
    if not read:
        return f"no document was read{unreadable}"
    words = f"{read:,} document{'' if read == 1 else 's'} {'was' if read == 1 else 'were'} read"
    dropped = report.get("dropped", {})
    if not dropped:
        return words + unreadable
    reason = max(dropped, key=lambda name: int(dropped[name]["documents"]))
    count = int(dropped[reason]["documents"])
    noun = "pieces" if reason in PIECE_REASONS else "documents"
    why = explain(reason)
    lost = f"{count:,} {noun}{why and ': ' + why}"
    return f"{words}{unreadable}; most were lost as {reason!r} ({lost})"
