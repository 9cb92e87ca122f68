"""Every score equals what upstream's own scorers gave (tests/golden/README.md)."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from evals import infinitebench, infinitebench_scores, longbench, lveval, ruler_scores
from evals.data_files import read_records
from evals.example import Example

GOLDEN = Path(__file__).parent.parent / "golden"


def golden(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def example(answers: list[Any] | Any, **extra: Any) -> Example:
    values = answers if isinstance(answers, list) else [answers]
    if isinstance(values[0], list):
        values = values[0]
    return Example(
        id="golden", prompt="", answers=tuple(map(str, values)), max_new_tokens=1, extra=extra
    )


def spelled(prediction: str | list[Any]) -> str:
    """A long prediction is written as start, repeated part and how often."""
    if isinstance(prediction, str):
        return prediction
    start, part, times = prediction
    return (start + part * times).strip()


@pytest.mark.parametrize("name", longbench.names())
def test_longbench_scores_equal_upstream(name: str) -> None:
    wanted = golden("longbench")[name]
    scores = []
    for case in wanted["cases"]:
        asked = example(case["answers"], all_classes=wanted["all_classes"])
        scores.append(longbench.score(name, spelled(case["prediction"]), asked))
        assert scores[-1] == case["score"], case
    task = longbench.build(name, data="a/b", prompts="", max_examples=0)
    assert task.aggregate(scores) == wanted["total"]
    assert len(set(scores)) > 2, "the golden file tells nothing apart"


@pytest.mark.parametrize("name", list(lveval.SETS))
def test_lveval_scores_equal_upstream(name: str) -> None:
    wanted = golden("lveval")[name]
    scores = []
    for prediction, answers, keywords, score in wanted["cases"]:
        asked = example(answers, answer_keywords=keywords)
        scores.append(lveval.score(name, prediction, asked))
        assert scores[-1] == score, (prediction, answers, keywords)
    task = lveval.build(f"{name}_16k", data="a/b", prompts="", max_examples=0)
    assert task.aggregate(scores) == wanted["total"]


@pytest.mark.parametrize("name", infinitebench.names())
def test_infinitebench_scores_of_nasty_predictions_equal_upstream(name: str) -> None:
    for prediction, answers, score in golden("infinitebench_made_up")[name]:
        mine = infinitebench.score(name, prediction, example(answers))
        assert mine == (score or 0.0), (prediction, answers)  # None: upstream stops there


PUBLISHED = [(m, t) for m in ("gpt4", "kimi") for t in golden(f"infinitebench_{m}")]


@pytest.mark.parametrize(("model", "name"), PUBLISHED)
def test_the_shipped_predictions_get_the_published_scores(model: str, name: str) -> None:
    wanted = golden(f"infinitebench_{model}")[name]
    scores = []
    for number, prediction, answers, score in wanted["cases"]:
        scores.append(infinitebench.score(name, prediction, example(answers)))
        assert scores[-1] == score, number
    task = infinitebench.build(name, data="a/b", prompts="", max_examples=0)
    assert task.aggregate(scores) == pytest.approx(wanted["upstream"], abs=1e-12)
    if wanted["published"] is not None:
        assert round(task.aggregate(scores), 2) == pytest.approx(wanted["published"], abs=0.0051)


def test_ruler_scores_equal_upstream() -> None:
    wanted = golden("ruler")
    for name, rows in wanted.items():
        rule = ruler_scores.any_found if name == "qa" else ruler_scores.share_found
        scores = [rule(prediction, answers) for prediction, answers, _ in rows["cases"]]
        assert [round(s * 100, 2) for s in scores] == [score for *_, score in rows["cases"]]
        assert round(sum(scores) / len(scores) * 100, 2) == rows["total"]


@pytest.mark.skipif("INFINITEBENCH_COPY" not in os.environ, reason="INFINITEBENCH_COPY is not set")
@pytest.mark.parametrize("model", ["gpt4", "kimi"])
def test_a_whole_copy_of_upstream_gets_its_published_scores(model: str) -> None:
    folder = Path(os.environ["INFINITEBENCH_COPY"]) / "results" / model
    for name, rows in golden(f"infinitebench_{model}").items():
        scores = []
        for _, row in read_records(
            str(folder),
            [f"preds_{name}.jsonl"],
            suite="upstream",
            required={"ground_truth": object},
        ):
            asked = example(row["ground_truth"])
            scores.append(infinitebench.score(name, row["prediction"], asked))
        assert 100 * sum(scores) / len(scores) == pytest.approx(rows["upstream"], abs=1e-12)


def test_gpt4_repeats_the_first_number_of_a_calculation() -> None:
    right = infinitebench_scores.matching_prefix
    assert right("5, 42, 3", [42, 3, 14], first_given=True) == pytest.approx(2 / 3)
    assert right("5, 42, 3", [42, 3, 14]) == 0.0
