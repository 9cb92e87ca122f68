"""InfiniteBench's scores: `src/compute_scores.py` of OpenBMB/InfiniteBench 88b3daa.

That version is from after issue 18, which changed `longdialogue_qa_eng`. Where upstream stops with
an error (a decimal fraction predicted for a whole number in `math_find`), 0 is counted here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from evals.normalise import chinese_text, english_words, token_f1

_PUNCTUATION = str.maketrans(dict.fromkeys("\n:\"'.,?!{}", " "))
_CODE_PUNCTUATION = str.maketrans(dict.fromkeys("\n.`'\":", " "))
_CHOICE_PUNCTUATION = str.maketrans(dict.fromkeys("\n\"'.,?!{}", " "))
_NUMBER = re.compile(r"\d+\.\d+|\d+")
_LETTERS = "ABCD"


def first_integer(prediction: str, label: str) -> float:
    """passkey, number_string: the first run of digits is the label, digit for digit."""
    match = re.search("[0-9]+", prediction)
    return float((match.group(0) if match else "") == label)


def whole_word(prediction: str, label: str) -> float:
    """kv_retrieval: the label is one of the words once punctuation is white space."""
    return float(label in prediction.translate(_PUNCTUATION).split())


def whole_word_in_capitals(prediction: str, label: str) -> float:
    """longdialogue_qa_eng: the first label is one of the words, these in capitals."""
    return float(label in [w.upper() for w in prediction.strip().translate(_PUNCTUATION).split()])


def last_integer(prediction: str, label: int) -> float:
    """code_run: the last word is a whole number and the right one."""
    words = prediction.strip().translate(_CODE_PUNCTUATION).split()
    try:
        return float(bool(words) and int(words[-1]) == label)
    except ValueError:  # not a number: upstream counts 0
        return 0.0


def faulty_function(prediction: str, name: str, letter: str) -> float:
    """code_debug: the letter with `.` or `:` first, or letter or name after an announcement."""
    text = prediction.strip()
    if text[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    for part in ("\n", "`", "'", '"', "-", "*", "Option", "option"):
        text = text.replace(part, " ")
    text = re.sub("  +", " ", text)
    announcements = ("answer is:", "is:", "answer:", "correct option is:")
    after = _after_announcement(text, announcements)
    return float(after is not None and after.startswith((letter, name)))


def _after_announcement(text: str, announcements: Sequence[str]) -> str | None:
    """What follows the first announcement that there is, less one character; None without any.

    Empty where the announcement ends the text.
    """
    for announcement in announcements:
        start = text.find(announcement)
        if start >= 0:
            return text[start + len(announcement) + 1 :]
    return None


def chosen_option(prediction: str, labels: Sequence[str]) -> float:
    """longbook_choice_eng: first letter, then the whole, then after an announcement, then a word.

    Args:
        prediction: the model's.
        labels: the right option's text and its letter.
    """
    text = prediction.strip()
    if not text:
        return 0.0
    if text[0] in _LETTERS:
        return float(text[0] in labels)
    if text in labels:
        return 1.0
    text = re.sub("  +", " ", text.translate(_CHOICE_PUNCTUATION))
    announcements = ("answer is:", "answer:", "answer is", "option is")
    after = _after_announcement(text, announcements)
    if after is not None:
        return float(bool(after) and after.startswith(tuple(labels)))
    for word in text.split():
        if word in _LETTERS:  # "BC" too, which then is no label
            return float(word in labels)
    return 0.0


def first_number(prediction: str, label: float) -> float:
    """math_find: the first number has the label's value."""
    match = _NUMBER.search(prediction)
    if match is None:
        return 0.0
    if isinstance(label, int):
        return float(match.group(0).isdecimal() and int(match.group(0)) == label)
    return float(float(match.group(0)) == label)


def matching_prefix(prediction: str, labels: Sequence[int], *, first_given: bool = False) -> float:
    """math_calc: how many intermediate results are right before the first wrong one, as a share.

    Args:
        prediction: the model's.
        labels: all intermediate results.
        first_given: whether the prediction repeats the expression's first number before them, as
            upstream takes for GPT-4, whose prompt shows it.
    """
    numbers = [int(run) for run in re.findall("[0-9]+", prediction)][int(first_given) :]
    right = 0
    for number, label in zip(numbers, labels, strict=False):
        if number != label:
            break
        right += 1
    return right / len(labels)


def english_f1(prediction: str, answers: Sequence[str]) -> float:
    """longbook_qa_eng: best F1 of normalised words."""
    words = english_words(prediction)
    return max((token_f1(words, english_words(answer)) for answer in answers), default=0.0)


def chinese_f1(prediction: str, answers: Sequence[str]) -> float:
    """longbook_qa_chn: best F1 of normalised characters."""
    characters = chinese_text(prediction)
    return max((token_f1(characters, chinese_text(answer)) for answer in answers), default=0.0)


def rouge_l_sum(prediction: str, answers: Sequence[str]) -> float:
    """longbook_sum_eng: ROUGE-Lsum F-measure without stemming, best over the references."""
    return float(_rouge().score_multi(list(answers), prediction)["rougeLsum"].fmeasure)


@functools.cache
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        raise ValueError(
            "longbook_sum_eng needs the package rouge-score; pip install 'allmem[evals]'"
        ) from error
    return RougeScorer(["rougeLsum"], use_stemmer=False)
