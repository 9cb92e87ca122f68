"""Data of short tasks from a local folder, in the schema of the hub's data sets.

Two things serve: a copy of the hub's repository (`DIR/ceval-exam`, `DIR/ceval/ceval-exam` …), or
one file of a set (`DIR/arc-easy.test.jsonl`) whose lines have the hub's columns, or those of a
multiple-choice list: `centerpiece`, `options`, `correct_options_idx`.
"""

from __future__ import annotations

import bz2
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_LETTERS = "ABCDEFGHIJ"


def find_repository(data_dir: Path, dataset_path: str) -> Path | None:
    """A copy of the hub's data set under `data_dir`, by its name with or without its owner's."""
    name = dataset_path.rsplit("/", 1)[-1]
    for candidate in (dataset_path, dataset_path.replace("/", "__"), name):
        if (data_dir / candidate).is_dir():
            return data_dir / candidate
    return None


def find_file(data_dir: Path, names: Sequence[str]) -> Path | None:
    """The first of some file names that is there."""
    return next((data_dir / name for name in names if (data_dir / name).is_file()), None)


def read_rows(path: Path, task: str) -> list[Row]:
    """Rows of a file in the columns that the harness's task reads.

    Raises:
        ValueError: a line that is no such record, or no record at all.
    """
    rows = []
    for number, text in _texts(path):
        try:
            rows.append(CONVERTERS[task](json.loads(text) if isinstance(text, str) else text))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} record {number} is none of {task} ({type(error).__name__}: {error}); "
                "use the hub's columns, or centerpiece, options and correct_options_idx"
            ) from error
    if not rows:
        raise ValueError(f"{path} holds no record; put the set's examples there")
    return rows


def _texts(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, line) of JSON lines; (number, record) of a JSON list or HellaSwag's plain text."""
    if ".txt" in path.suffixes:
        yield from enumerate(_hellaswag_text(path), start=1)
        return
    text = _read(path)
    if path.suffix == ".json":
        try:
            yield from enumerate(json.loads(text), start=1)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON ({error}); fetch it again") from error
        return
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines knows other line ends
        if line.strip():
            yield number, line


def _read(path: Path) -> str:
    data = path.read_bytes()
    return (bz2.decompress(data) if path.suffix == ".bz2" else data).decode("utf-8")


def _hellaswag_text(path: Path) -> Iterator[Row]:
    """Blocks of six lines: context, the right ending's number, four endings."""
    lines = _read(path).removesuffix("\n").split("\n")
    if len(lines) % 6:
        raise ValueError(f"{path} has {len(lines)} lines, no multiple of 6; fetch it again")
    for start in range(0, len(lines), 6):
        context, label, *endings = lines[start : start + 6]
        yield {"context": context, "label": label, "endings": endings}


def _choices(record: Mapping[str, Any]) -> Row:
    """ARC's and OpenBookQA's columns `choices` and `answerKey`."""
    options = list(record["options"])
    letters = list(_LETTERS[: len(options)])
    return {
        "choices": {"text": options, "label": letters},
        "answerKey": letters[record["correct_options_idx"][0]],
    }


def _arc(record: Mapping[str, Any]) -> Row:
    if "centerpiece" not in record:
        return {key: record[key] for key in ("question", "choices", "answerKey")}
    return {"question": record["centerpiece"], **_choices(record)}


def _openbookqa(record: Mapping[str, Any]) -> Row:
    if "centerpiece" not in record:
        return {key: record[key] for key in ("question_stem", "choices", "answerKey")}
    return {"question_stem": record["centerpiece"], **_choices(record)}


def _piqa(record: Mapping[str, Any]) -> Row:
    if "centerpiece" not in record:
        return {key: record[key] for key in ("goal", "sol1", "sol2", "label")}
    first, second = record["options"]
    label = int(record["correct_options_idx"][0])
    return {"goal": record["centerpiece"], "sol1": first, "sol2": second, "label": label}


def _winogrande(record: Mapping[str, Any]) -> Row:
    if "centerpiece" not in record:
        return {key: record[key] for key in ("sentence", "option1", "option2", "answer")}
    first, second = record["options"]
    answer = str(int(record["correct_options_idx"][0]) + 1)
    sentence = record["centerpiece"]
    if "_" not in sentence:
        raise ValueError("the sentence has no blank _")
    return {"sentence": sentence, "option1": first, "option2": second, "answer": answer}


def _hellaswag(record: Mapping[str, Any]) -> Row:
    if "context" not in record:
        return {
            key: record[key] for key in ("activity_label", "ctx_a", "ctx_b", "endings", "label")
        }
    activity, _, context = record["context"].partition(": ")
    whole, begun = _begun_sentence(context)
    return {
        "activity_label": activity,
        "ctx_a": whole,
        "ctx_b": begun,
        "endings": record["endings"],
        "label": str(int(record["label"])),
    }


def _begun_sentence(context: str) -> tuple[str, str]:
    """Whole sentences, and the words of the one that the ending completes.

    The plain text has both in one line; the begun sentence is written small there, and the harness
    capitalises it.
    """
    match = re.search(r"^(.*[.!?\"”')\]]) ([^.!?A-Z][^.!?]*)$", context, flags=re.DOTALL)
    return (match.group(1), match.group(2)) if match else (context, "")


def _math(record: Mapping[str, Any]) -> Row:
    return {key: record[key] for key in ("problem", "solution", "answer")}


CONVERTERS: dict[str, Callable[[Mapping[str, Any]], Row]] = {
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "hellaswag": _hellaswag,
    "math_500": _math,
    "openbookqa": _openbookqa,
    "piqa": _piqa,
    "winogrande": _winogrande,
}
"""By short task: a record of a single file as a row with the hub's columns."""
