"""Data in each suite's own format are read; data of another suite and broken files are refused."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from evals.task import Example, SuiteConfig, Task, build_tasks

LONGBENCH = {
    **{"input": "Who?", "context": "Ann {met} Bob.", "answers": ["Ann"], "length": 3},
    **{"dataset": "hotpotqa", "language": "en", "all_classes": None, "_id": "a1"},
}
INFINITEBENCH = {
    **{"id": 4, "context": "noise 71432 noise", "input": "What is the pass key?"},
    **{"answer": ["71432"], "options": []},
}
LVEVAL = {
    **{"input": "谁？", "context": "张三来了", "answers": ["张三", "李四"], "length": 9},
    **{"dataset": "cmrc_mixup", "language": "zh", "answer_keywords": "张三", "confusing_facts": []},
}


def write(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def built(name: str, **settings: Any) -> Task:
    (task,) = build_tasks(SuiteConfig(tasks=(name,), **settings))
    return task


def only(task: Task) -> Example:
    (example,) = task.examples()
    return example


def test_longbench_records_become_examples(tmp_path: Path) -> None:
    write(tmp_path / "hotpotqa.jsonl", LONGBENCH)
    task = built("longbench/hotpotqa", longbench_data=str(tmp_path))
    example = only(task)
    assert (example.id, example.answers, example.length) == ("a1", ("Ann",), 3)
    assert example.max_new_tokens == 32
    assert "Ann {met} Bob." in example.prompt  # braces of the data are left alone
    assert example.prompt.endswith("Question: Who?\nAnswer:")
    assert task.score("It was Ann", example) == pytest.approx(0.5)
    assert task.score("", example) == 0.0
    assert (task.metric, task.chat, task.truncates) == ("f1", True, True)


def test_longbench_is_read_from_its_zip_and_beside_it(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/samsum.jsonl", json.dumps({**LONGBENCH, "dataset": "samsum"}))
    for place in (tmp_path, tmp_path / "data.zip"):
        example = only(built("longbench/samsum", longbench_data=str(place)))
        assert example.max_new_tokens == 128


def test_infinitebench_records_become_examples(tmp_path: Path) -> None:
    write(tmp_path / "passkey.jsonl", INFINITEBENCH)
    task = built("infinitebench/passkey", infinitebench_data=str(tmp_path))
    example = only(task)
    assert (example.id, example.answers, example.max_new_tokens) == ("4", ("71432",), 6)
    assert example.depth == pytest.approx(example.prompt.index("71432") / len(example.prompt))
    assert task.score("71432.", example) == 1.0
    assert task.aggregate([1.0, 0.0, 0.0]) == pytest.approx(100 / 3)


@pytest.mark.parametrize(
    ("name", "record", "answers"),
    [
        ("code_run", {"input": "What is func_7(-3)?", "answer": 5}, ("5",)),
        ("math_find", {"input": "The largest number of it", "answer": [3.5]}, ("3.5",)),
        ("math_calc", {"input": "", "answer": [[1, 2]]}, ("1", "2")),
        ("code_debug", {"answer": ["b"], "options": list("abcd")}, ("b", "B")),
        ("longbook_choice_eng", {"answer": ["c", "C"], "options": list("abcd")}, ("c", "C")),
    ],
)
def test_infinitebench_answers_of_every_form_are_read(
    tmp_path: Path, name: str, record: dict[str, Any], answers: tuple[str, ...]
) -> None:
    write(tmp_path / f"{name}.jsonl", {**INFINITEBENCH, **record})
    example = only(built(f"infinitebench/{name}", infinitebench_data=str(tmp_path)))
    assert example.answers == answers


def test_lveval_records_become_examples_at_each_level(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "cmrc_mixup.zip", "w") as archive:
        archive.writestr("cmrc_mixup/cmrc_mixup_16k.jsonl", json.dumps(LVEVAL))
    write(tmp_path / "cmrc_mixup" / "cmrc_mixup_64k.jsonl", {**LVEVAL, "input": "几时？"})
    near = built("lveval/cmrc_mixup_16k", lveval_data=str(tmp_path))
    assert "谁？" in only(near).prompt
    assert near.prompts_source == "own"
    assert near.score("张三", only(near)) == 1.0
    assert near.score("李四", only(near)) == 0.0  # only the first answer counts
    assert "几时？" in only(built("lveval/cmrc_mixup_64k", lveval_data=str(tmp_path))).prompt


BROKEN = [
    (INFINITEBENCH, "lacks answers, length, dataset, all_classes, _id"),
    ({**LONGBENCH, "dataset": "musique"}, "a record of musique, not of hotpotqa"),
    ({**LONGBENCH, "answers": []}, "empty list"),
    ({**LONGBENCH, "answers": "Ann"}, "answers is str"),
    ({**LONGBENCH, "answers": [1]}, "not a list of texts"),
    ({**LONGBENCH, "context": None}, "context is NoneType"),
    ("{broken", "is not JSON"),
    ("[1]", "is a list, not an object"),
    ("", "has no record"),
]


@pytest.mark.parametrize(("record", "message"), BROKEN)
def test_a_wrong_record_is_refused_with_its_place(
    tmp_path: Path, record: Any, message: str
) -> None:
    write(tmp_path / "hotpotqa.jsonl", record)
    with pytest.raises(ValueError, match=message) as caught:
        list(built("longbench/hotpotqa", longbench_data=str(tmp_path)).examples())
    assert "hotpotqa.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("passkey", LONGBENCH, "lacks answer and has"),
        ("passkey", {**INFINITEBENCH, "answer": []}, "empty list"),
        ("code_run", INFINITEBENCH, "calls no func_N"),
        ("code_run", {**INFINITEBENCH, "answer": ["x"]}, "is no number"),
        ("code_run", {**INFINITEBENCH, "input": "func_1(2)", "answer": 0.5}, "'0.5' .* is no"),
        ("math_calc", {**INFINITEBENCH, "answer": [1, 2.5]}, "'2.5' .* is no number"),
        ("math_find", {**INFINITEBENCH, "answer": 3}, "asks for no number"),
        ("code_debug", {**INFINITEBENCH, "answer": ["z"], "options": list("abcd")}, "none of the"),
        ("code_debug", {**INFINITEBENCH, "answer": ["a", ""], "options": list("abcd")}, "none of"),
        ("code_debug", INFINITEBENCH, "0 options instead of 4"),
    ],
)
def test_a_record_of_another_infinitebench_task_is_refused(
    tmp_path: Path, name: str, record: Any, message: str
) -> None:
    write(tmp_path / f"{name}.jsonl", record)
    with pytest.raises(ValueError, match=message):
        list(built(f"infinitebench/{name}", infinitebench_data=str(tmp_path)).examples())


def test_classification_needs_its_classes(tmp_path: Path) -> None:
    write(tmp_path / "trec.jsonl", {**LONGBENCH, "dataset": "trec"})
    with pytest.raises(ValueError, match="no all_classes"):
        list(built("longbench/trec", longbench_data=str(tmp_path)).examples())


def test_lveval_keywords_that_hold_no_word_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "hotpotwikiqa_mixup_16k.jsonl", {**LVEVAL, "answer_keywords": "the !"})
    task = built("lveval/hotpotwikiqa_mixup_16k", lveval_data=str(tmp_path))
    with pytest.raises(ValueError, match=r"16k.jsonl:1: answer_keywords='the !' have no word left"):
        only(task)


def test_references_that_cannot_be_scored_are_refused_before_any_answer(tmp_path: Path) -> None:
    write(tmp_path / "passage_retrieval_en.jsonl", {**LONGBENCH, "dataset": "passage_retrieval_en"})
    task = built("longbench/passage_retrieval_en", longbench_data=str(tmp_path))
    with pytest.raises(ValueError, match=r"en.jsonl:1: reference 'Ann' does not hold 'Paragraph '"):
        only(task)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("{}", "has none of hotpotqa.jsonl"),
        ("{}/absent", "neither a folder nor a zip"),
        ("plain", "neither a folder nor a zip"),
    ],
)
def test_a_place_without_the_file_is_refused(tmp_path: Path, place: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(built("longbench/hotpotqa", longbench_data=place.format(tmp_path)).examples())


def test_a_hub_that_does_not_answer_is_told_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="copy LongBench's files to a folder"):
        list(built("longbench/hotpotqa", longbench_data="owner/absent").examples())
