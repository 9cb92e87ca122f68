"""LongBench's scores, as `LongBench/{eval,metrics}.py` of THUDM/LongBench 2e00731 compute them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from evals.normalise import chinese_words, cut_chinese, english_words, token_f1
from evals.rouge_l import CHINESE_ROOM, rouge_l

_NUMBER = re.compile(r"\d+")


def english_f1(prediction: str, answer: str) -> float:
    """F1 of normalised words."""
    return token_f1(english_words(prediction), english_words(answer))


def chinese_f1(prediction: str, answer: str) -> float:
    """F1 of normalised words as jieba cuts them."""
    return token_f1(chinese_words(prediction), chinese_words(answer))


def chinese_rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L of words as jieba cuts them."""
    return rouge_l(
        " ".join(cut_chinese(prediction)), " ".join(cut_chinese(answer)), room=CHINESE_ROOM
    )


def share_of_numbers(prediction: str, number: str) -> float:
    """How many of the prediction's numbers are, digit for digit, the right one."""
    numbers = _NUMBER.findall(prediction)
    return sum(found == number for found in numbers) / len(numbers) if numbers else 0.0


def numbered(prefix: str, answer: str) -> str:
    """The number after the prefix in a reference, `Paragraph 7` to `7`.

    Raises:
        ValueError: the reference has none.
    """
    match = re.search(re.escape(prefix) + r"(\d+)", answer)
    if match is None:
        raise ValueError(
            f"reference {answer!r} does not hold {prefix!r} and a number; "
            "the data are of another suite or set"
        )
    return match.group(1)


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """One over the number of classes that the prediction names, if the right one is among them.

    Classes whose name is a part of the right one's are taken out; as upstream removes them from
    the list that it goes through, the class after a removed one is passed over.
    """
    named = [name for name in classes if name in prediction]
    index = 0
    while index < len(named):
        name = named[index]
        if name in answer and name != answer:
            named.remove(name)
        index += 1
    return 1.0 / len(named) if answer in named else 0.0


def code_similarity(prediction: str, answer: str) -> float:
    """`fuzz.ratio` of fuzzywuzzy without python-Levenshtein, of the first line that is code."""
    lines = prediction.lstrip("\n").split("\n")
    code = next((x for x in lines if not ("`" in x or "#" in x or "//" in x)), "")
    if code == answer:  # two empty lines too
        return 1.0
    if not code or not answer:
        return 0.0
    ratio = difflib.SequenceMatcher(None, code, answer).ratio()
    return round(100 * ratio) / 100


def first_line(prediction: str) -> str:
    """What counts of a prediction in trec, triviaqa, samsum and lsht."""
    return prediction.lstrip("\n").split("\n")[0]
