"""ROUGE-L as LongBench and LV-Eval get it from the package `rouge` 1.0.1, quirks included.

The package is not used because its result depends on the caller: it follows the common
subsequence by recursion, and both suites turn the `RecursionError` of long sentences into a score
of 0. Whether that happens there depends on how deep the call stack already is; here it is decided
by a number, the room that upstream's own script leaves.
"""

from __future__ import annotations

from collections.abc import Sequence

ROOM = 991
"""Deepest recursion that succeeds under LongBench's `eval.py` and Python's limit of 1000."""
CHINESE_ROOM = 990
"""Likewise where a function more is on the stack: LongBench's and LV-Eval's Chinese scores."""


def rouge_l(prediction: str, reference: str, *, room: int = ROOM) -> float:
    """F-measure of the union of common subsequences over sentences (summary level).

    Sentences end at `.`; words are separated by white space; words count once, however often they
    occur. 0 where a text has no sentence, and where upstream needs a deeper recursion than `room`.
    """
    predicted, references = _sentences(prediction), _sentences(reference)
    if not predicted or not references:
        return 0.0
    covered: set[str] = set()
    for sentence in references:
        for candidate in predicted:
            common = _common_words(sentence, candidate, room)
            if common is None:
                return 0.0
            covered |= common
    recall = len(covered) / len({word for sentence in references for word in sentence})
    precision = len(covered) / len({word for sentence in predicted for word in sentence})
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def _sentences(text: str) -> list[list[str]]:
    """Words of each sentence; one of white space only holds the empty word."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common_words(first: Sequence[str], second: Sequence[str], room: int) -> set[str] | None:
    """Words of the longest common subsequence that the package finds; None beyond its recursion.

    Of several longest ones it takes the one that steps back in `second` where the choice is free.
    """
    rows = [[0] * (len(second) + 1)]
    for word in first:
        last, row = rows[-1], [0]
        for j, other in enumerate(second):
            row.append(last[j] + 1 if word == other else max(last[j + 1], row[j]))
        rows.append(row)
    words: set[str] = set()
    i, j, depth = len(first), len(second), 1
    while i and j:
        if first[i - 1] == second[j - 1]:
            words.add(first[i - 1])
            i, j = i - 1, j - 1
        elif rows[i - 1][j] > rows[i][j - 1]:
            i -= 1
        else:
            j -= 1
        depth += 1
    return words if depth <= room else None
