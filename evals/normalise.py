"""Text to comparable words: the normalisations that LongBench, LV-Eval and InfiniteBench share."""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_CHINESE_RANGES = (
    *((0x2013, 0x2014), (0x2018, 0x2019), (0x201B, 0x201F), (0x2026, 0x2027)),
    *((0x3001, 0x3003), (0x300B, 0x3011), (0x3014, 0x301F), (0x3030, 0x3030)),
    *((0x303E, 0x303F), (0xFE4F, 0xFE4F), (0xFF01, 0xFF0D), (0xFF0F, 0xFF0F)),
    *((0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF64)),
)
_NO_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NO_PUNCTUATION = {
    **_NO_ASCII_PUNCTUATION,
    **{code: None for first, last in _CHINESE_RANGES for code in range(first, last + 1)},
}


def english_words(text: str) -> list[str]:
    """Lower case, ASCII punctuation and then articles taken out, split at white space."""
    bare = text.lower().translate(_NO_ASCII_PUNCTUATION)
    return _ARTICLE.sub(" ", bare).split()


def chinese_text(text: str) -> str:
    """Lower case without punctuation (ASCII or Chinese) and white space."""
    return "".join(text.lower().translate(_NO_PUNCTUATION).split())


def chinese_words(text: str) -> list[str]:
    """Words as jieba cuts them, each normalised, empty ones left out."""
    return [word for word in map(chinese_text, cut_chinese(text)) if word]


def cut_chinese(text: str) -> Iterator[str]:
    """jieba's words of a text, white space and punctuation among them."""
    return _jieba_cut()(text)


@functools.cache
def _jieba_cut() -> Callable[[str], Iterator[str]]:
    try:
        import jieba
    except ModuleNotFoundError as error:
        raise ValueError(
            "Chinese scores need the package jieba; pip install 'allmem[evals]'"
        ) from error
    jieba.setLogLevel("WARNING")
    return jieba.cut


def token_f1(predicted: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of two bags of tokens; 0 where nothing is common, so also where one is empty."""
    common = sum((Counter(predicted) & Counter(reference)).values())
    if common == 0:
        return 0.0
    precision = common / len(predicted)
    recall = common / len(reference)
    return 2 * precision * recall / (precision + recall)
