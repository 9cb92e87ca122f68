"""RULER and recall: what is generated has the wanted length, holds its answers, and is scored."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from data_prep.recall import NOTE_MARK, RECALL_MARK
from data_prep.words import RECALL_KEYS, RECALL_VALUES
from evals import generated, recall_tasks, ruler
from evals.task import Example, SuiteConfig, Task, build_tasks
from tests.evals.words import Words

LENGTH = 1500
FREE = [task for task in ruler.TASKS if not task.startswith("qa")]


def built(name: str, **settings: Any) -> Task:
    config = SuiteConfig(**{"tasks": (name,), "lengths": (LENGTH,), "samples": 4, **settings})
    (task,) = build_tasks(config, tokenizer=Words())
    return task


@pytest.fixture(scope="module")
def examples() -> dict[str, list[Example]]:
    names = [f"ruler/{task}_{LENGTH}" for task in FREE]
    names += [f"recall/{task}_{LENGTH}" for task in recall_tasks.TASKS]
    return {name: list(built(name).examples()) for name in names}


def test_prompts_fill_the_length_and_never_exceed_it(examples: dict[str, list[Example]]) -> None:
    words = Words()
    for name, found in examples.items():
        assert len({example.id for example in found}) == 4
        for example in found:
            tokens = len(words.encode(example.prompt + example.answer_prefix))
            total = tokens + example.max_new_tokens
            assert 0.9 * LENGTH < total <= LENGTH, name
            assert example.length == LENGTH


def test_the_right_answer_scores_one_and_silence_none(examples: dict[str, list[Example]]) -> None:
    for name, found in examples.items():
        task = built(name)
        for example in found:
            assert task.score(" " + ", ".join(example.answers), example) == 1.0, name
            assert task.score("", example) == 0.0, name


def test_distance_and_depth_point_at_the_evidence(examples: dict[str, list[Example]]) -> None:
    words = Words()
    for name, found in examples.items():
        for example in found:
            if name.startswith(("ruler/cwe", "ruler/fwe")):
                assert example.distance is None
                continue
            assert example.distance is not None
            assert example.depth is not None
            start = round(example.depth * len(example.prompt))
            tail = words.encode(example.prompt[start:] + example.answer_prefix)
            assert 1 <= len(tail) - example.distance <= 25, name  # the evidence itself
            if "single" in name:
                answer = example.answers[0]
                assert 0 <= example.prompt.index(answer) - start < 120, name


def test_recall_distances_run_evenly_from_near_to_far(examples: dict[str, list[Example]]) -> None:
    for task in recall_tasks.TASKS:
        distances = [e.distance or 0 for e in examples[f"recall/{task}_{LENGTH}"]]
        assert distances == sorted(distances)
        for index, distance in enumerate(distances):
            assert distance / LENGTH == pytest.approx((index + 0.5) / 4, abs=0.08), task


def test_of_overwritten_codes_the_last_one_is_right(examples: dict[str, list[Example]]) -> None:
    for example in examples[f"recall/overwritten_{LENGTH}"]:
        thing = re.search(r"What is the code of the (.+)\?", example.prompt)
        assert thing is not None
        stated = re.findall(rf"code of the {re.escape(thing[1])} is (\d+)\.", example.prompt)
        assert len(stated) == 3
        assert stated[-1] == example.answers[0]


def test_two_hops_have_to_be_put_together(examples: dict[str, list[Example]]) -> None:
    for example in examples[f"recall/multi_hop_{LENGTH}"]:
        hop = re.search(r"The (.+?) lies inside the (.+?)\.", example.prompt)
        assert hop is not None
        assert f"that the {hop[1]} lies inside?" in example.prompt
        assert f"The code of the {hop[2]} is {example.answers[0]}." in example.prompt
        assert f"The code of the {hop[1]} is" not in example.prompt


def test_notes_have_the_form_of_the_recall_documents_that_models_train_on() -> None:
    for separator in (" ->", ""):
        task = built(f"recall/notes_{LENGTH}", recall_separator=separator)
        for example in task.examples():
            noted = re.findall(rf"^# note: (\w+){separator} (\w+)$", example.prompt, re.M)
            assert len(noted) == len(dict(noted)) == 8
            thing, animal = next(pair for pair in noted if pair[1] == example.answers[0])
            assert example.answer_prefix == f"\n# recall: {thing}{separator}"
            assert task.score(f" {animal}_s", example) == 1.0
            assert task.score(f" {noted[0][1]}x, {animal}", example) == 0.0
            assert {thing} <= set(RECALL_KEYS)
            assert {pair[1] for pair in noted} <= set(RECALL_VALUES)
    assert NOTE_MARK == "# note:"
    assert RECALL_MARK == "# recall:"


def test_filler_can_be_a_folder_or_an_installed_package(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.py").write_text("zebra = 1\n\nstripes = 2\n" * 300)
    for task in recall_tasks.TASKS:
        found = built(f"recall/{task}_{LENGTH}", recall_filler=str(tmp_path))
        for example in found.examples():
            assert example.prompt.count("zebra = 1\n") > 50
            assert found.score(f" {example.answers[0]}", example) == 1.0
    assert built(f"recall/notes_{LENGTH}", recall_filler="hypothesis")
    for place in ("no_such_package", str(tmp_path / "absent")):
        with pytest.raises(ValueError, match="has no text in"):
            built(f"recall/notes_{LENGTH}", recall_filler=place)


def test_one_of_many_keys_is_asked_for(examples: dict[str, list[Example]]) -> None:
    for example in examples[f"recall/multi_key_{LENGTH}"]:
        stated = re.findall(r"The code of the (.+?) is (\d+)\.", example.prompt)
        assert len(stated) == 8
        assert len(dict(stated)) == 8


@pytest.mark.parametrize(
    ("task", "needles", "answers"),
    [
        *(("niah_single_1", 1, 1), ("niah_multikey_1", 4, 1), ("niah_multivalue", 4, 4)),
        *(("niah_multiquery", 4, 4), ("niah_single_3", 1, 1)),
    ],
)
def test_needles_are_as_many_as_rulers(
    examples: dict[str, list[Example]], task: str, needles: int, answers: int
) -> None:
    for example in examples[f"ruler/{task}_{LENGTH}"]:
        assert len(re.findall(r"One of the special magic", example.prompt)) == needles
        assert len(set(example.answers)) == answers
        assert ("A special magic" in example.prompt) == (answers == 1)
        assert example.answer_prefix.endswith(" is" if answers == 1 else " are")


def test_needle_haystacks_are_made_of_other_needles(examples: dict[str, list[Example]]) -> None:
    for task in ("niah_multikey_2", "niah_multikey_3"):
        for example in examples[f"ruler/{task}_{LENGTH}"]:
            assert example.prompt.count("One of the special magic") > 40
            assert example.prompt.count(example.answers[0]) == 1


def test_a_chain_of_variables_leads_to_its_value(examples: dict[str, list[Example]]) -> None:
    for example in examples[f"ruler/vt_{LENGTH}"]:
        text = example.prompt[example.prompt.rindex("Memorize") :]
        stated = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text))
        value = re.search(r"assigned the value (\d+)", example.answer_prefix)
        for variable in example.answers:
            while variable in stated:
                variable = stated[variable]
            assert value is not None
            assert variable == value[1]


def test_common_and_frequent_words_are_the_most_frequent(
    examples: dict[str, list[Example]],
) -> None:
    for example in examples[f"ruler/cwe_{LENGTH}"]:
        listed = re.findall(r"\d+\. (\S+)", example.prompt[example.prompt.rindex("Below is") :])
        top = sorted(set(listed), key=listed.count, reverse=True)[:10]
        assert set(top) == set(example.answers)
    for example in examples[f"ruler/fwe_{LENGTH}"]:
        coded = re.findall(r"\b[a-z]{6}\b", example.prompt)
        counts = [coded.count(word) for word in example.answers]
        assert counts == sorted(counts, reverse=True)
        others = max(coded.count(word) for word in set(coded) - set(example.answers))
        assert counts[-1] >= others
        assert counts[0] / counts[1] == pytest.approx((3 / 2) ** 2, rel=0.1)


def test_examples_are_the_same_each_time_and_do_not_depend_on_their_number() -> None:
    name = f"ruler/niah_single_2_{LENGTH}"
    many, few = list(built(name, samples=3).examples()), list(built(name, samples=2).examples())
    assert many[:2] == few
    other = list(built(name, samples=2, seed=7).examples())
    assert other[0].answers != few[0].answers


def test_the_haystack_can_be_a_folder_of_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Zebra stripes matter. " * 20)
    task = built(f"ruler/niah_single_2_{LENGTH}", ruler_data=str(tmp_path), samples=1)
    assert task.prompts_source == "upstream:lm_eval"
    assert next(iter(task.examples())).prompt.count("Zebra stripes matter.") > 20
    assert built(f"ruler/niah_single_2_{LENGTH}").prompts_source == "own"  # made-up prose
    with pytest.raises(ValueError, match=r"neither PaulGrahamEssays.json nor \*.txt"):
        built(f"ruler/niah_single_2_{LENGTH}", ruler_data=str(tmp_path / "absent"))


def squad() -> dict[str, Any]:
    def paragraph(topic: int, part: int) -> dict[str, Any]:
        fact = f"Fact {topic}-{part}. " + "More words follow here. " * 8
        answers = [{"text": f"{topic}-{part}"}]
        question = {"question": f"Which {topic}.{part}?", "answers": answers}
        return {
            "context": fact,
            "qas": [
                {**question, "is_impossible": False},
                {"question": "none", "answers": [], "is_impossible": True},
            ],
        }

    return {"data": [{"paragraphs": [paragraph(t, p) for p in range(3)]} for t in range(20)]}


def hotpotqa() -> list[dict[str, Any]]:
    return [
        {
            "question": f"Who {i}?",
            "answer": f"Name{i}",
            "context": [
                [f"Title {i}-{k}", [f"Name{i} did {k}. ", "And so on. " * 9]] for k in (0, 1)
            ],
        }
        for i in range(40)
    ]


@pytest.mark.parametrize(("task", "file"), [("qa_1", "squad"), ("qa_2", "hotpotqa")])
def test_questions_come_from_their_own_files(tmp_path: Path, task: str, file: str) -> None:
    data = squad() if file == "squad" else hotpotqa()
    (tmp_path / f"{file}.json").write_text(json.dumps(data))
    found = built(f"ruler/{task}_{LENGTH}", ruler_data=str(tmp_path))
    words = Words()
    for index, example in enumerate(found.examples()):
        tokens = len(words.encode(example.prompt + example.answer_prefix))
        assert tokens + 32 <= LENGTH
        assert example.answers[0] in example.prompt
        assert example.answers[0] == (f"0-{index}" if index < 3 else "1-0") or file == "hotpotqa"
        assert example.prompt.count("Document ") > 20
        assert found.score(f"I say {example.answers[0]}.", example) == 1.0


def test_questions_without_their_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"need squad.json in eval.suites.ruler_data, which is empty"
    ):
        built(f"ruler/qa_1_{LENGTH}")
    with pytest.raises(ValueError, match=r"hotpotqa.json"):
        built(f"ruler/qa_2_{LENGTH}", ruler_data=str(tmp_path))
    (tmp_path / "squad.json").write_text('{"other": 1}')
    with pytest.raises(ValueError, match="is not squad's own file"):
        list(built(f"ruler/qa_1_{LENGTH}", ruler_data=str(tmp_path)).examples())


def test_a_length_that_no_prompt_fits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cwe_300: its shortest prompt has .* larger length"):
        list(built("ruler/cwe_300", lengths=(300,)).examples())


@pytest.mark.parametrize("budget", [3, 10, 57, 1000, 123456])
def test_the_largest_size_that_fits_is_found_in_few_steps(budget: int) -> None:
    asked: list[int] = []

    def tokens_of(size: int) -> int:
        asked.append(size)
        return 7 + 3 * size

    size = generated._largest_size(tokens_of, budget, 2)
    assert len(asked) < 12
    if tokens_of(2) > budget:
        assert size == 2
    else:
        assert 0 <= budget - tokens_of(size) <= max(8, budget // 200)
