"""LV-Eval's scores, as `metrics.py` and `evaluation.py` of infinigence/LVEval 63e7ae9 compute them.

Only the first answer of a record counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from evals.longbench_scores import chinese_f1, english_f1
from evals.lveval_words import is_left_out
from evals.normalise import chinese_text, chinese_words, cut_chinese, english_words
from evals.rouge_l import CHINESE_ROOM, rouge_l

ENGLISH_RECALL = 0.2
"""Recall of keywords below which an English answer scores 0."""
CHINESE_RECALL = 0.4


def english_gated_f1(prediction: str, answer: str, keywords: str | None) -> float:
    """Word F1, or 0 where too few of the keywords are found; without keywords nothing is gated.

    Raises:
        ValueError: the keywords have no word.
    """
    if keywords:
        wanted = english_words(keywords)
        recall = _keyword_recall(english_words(prediction), wanted, keywords, chinese=False)
        if recall < ENGLISH_RECALL:
            return 0.0
    return english_f1(prediction, answer)


def chinese_gated_f1(prediction: str, answer: str, keywords: str | None) -> float:
    """Word F1, or 0 where too few of the keywords, by default the answer's words, are found.

    Raises:
        ValueError: the keywords have no word.
    """
    keywords = keywords or answer
    if keywords:
        wanted = chinese_words(keywords)
        recall = _keyword_recall(chinese_words(prediction), wanted, keywords, chinese=True)
        if recall < CHINESE_RECALL:
            return 0.0
    return chinese_f1(prediction, answer)


def _keyword_recall(
    predicted: Sequence[str], wanted: Sequence[str], keywords: str, *, chinese: bool
) -> float:
    """Share of the wanted words that are predicted; left-out words lower it, for they still are
    among the wanted."""
    if not wanted:
        raise ValueError(
            f"answer_keywords={keywords!r} have no word left to look for; mend the data file"
        )
    common = Counter(predicted) & Counter(wanted)
    found = sum(n for word, n in common.items() if not is_left_out(word, chinese=chinese))
    return found / len(wanted)


def chinese_filtered_rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L of jieba's words, cut twice as upstream does, without the left-out ones."""
    return rouge_l(_filtered(prediction), _filtered(answer), room=CHINESE_ROOM)


def _filtered(text: str) -> str:
    words = (chinese_text(word) for word in cut_chinese(" ".join(cut_chinese(text))))
    return " ".join(word for word in words if not is_left_out(word, chinese=True))
