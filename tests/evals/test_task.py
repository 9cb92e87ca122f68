"""Tasks by name, and prompts that are cut, refused and put into templates as upstream does."""

import subprocess
import sys

import pytest

from evals.task import (
    Example,
    SuiteConfig,
    SuiteTask,
    build_tasks,
    evidence_distance,
    prepare_prompt,
    task_names,
    truncate_middle,
)
from tests.evals.words import Words


def example(prompt: str, **changes: object) -> Example:
    given = {"id": "1", "prompt": prompt, "answers": ("x",), "max_new_tokens": 4, **changes}
    return Example(**given)  # type: ignore[arg-type]


def task(**changes: object) -> SuiteTask:
    given = {
        **{"name": "t", "suite": "s", "metric": "f1", "prompts_source": "own"},
        **{"load": lambda: iter(()), "scorer": lambda p, e: 0.5, **changes},
    }
    return SuiteTask(**given)


def test_the_suites_hold_every_task_of_upstream() -> None:
    names = task_names(SuiteConfig(lengths=(4096, 8192)))
    count = {
        suite: sum(name.startswith(suite + "/") for name in names)
        for suite in ("longbench", "infinitebench", "lveval", "ruler", "recall")
    }
    assert count == {
        "longbench": 21,
        "infinitebench": 12,
        "lveval": 55,
        "ruler": 2 * 13,
        "recall": 2 * 5,
    }
    assert len(set(names)) == len(names)


def test_patterns_and_groups_name_tasks_once_in_the_suites_order() -> None:
    config = SuiteConfig(tasks=("lveval/*_16k", "longbench/paper", "longbench/hotpot*"))
    built = [f"{t.suite}/{t.name}" for t in build_tasks(config)]
    assert len(built) == 6 + 11
    assert built[:2] == ["longbench/narrativeqa", "longbench/hotpotqa"]
    assert built[-1] == "lveval/dureader_mixup_16k"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("longbench/hotpoqa", "longbench/hotpotqa"),
        ("infinitbench/kv_retrieval", "infinitebench/kv_retrieval"),
        ("ruler/niah_single_1_8192", "ruler/niah_single_1_4096"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
        build_tasks(SuiteConfig(tasks=(name,)))


def test_generated_suites_ask_for_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="needs a tokenizer"):
        build_tasks(SuiteConfig(tasks=("recall/single_4096",)))


@pytest.mark.parametrize(
    "changes", [{"lengths": (100,)}, {"lengths": (512, 512)}, {"samples": 0}, {"max_examples": -1}]
)
def test_settings_out_of_range_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="suites"):
        SuiteConfig(**changes)  # type: ignore[arg-type]


def test_the_suites_load_no_torch() -> None:
    code = (
        "import sys; from evals.task import *; "
        "build_tasks(SuiteConfig(tasks=('longbench/*', 'infinitebench/*'))); "
        "import evals.compare; sys.exit('torch' in sys.modules or 'lm_eval' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_example_without_answers_is_refused() -> None:
    with pytest.raises(ValueError, match="empty list of answers"):
        example("a", answers=())


def test_the_middle_is_cut_as_upstream_cuts_it() -> None:
    assert truncate_middle([1, 2, 3], 3) == ([1, 2, 3], ())
    assert truncate_middle([1, 2, 3, 4, 5], 4) == ([1, 2], [4, 5])
    assert truncate_middle([1, 2, 3, 4, 5, 6], 5) == ([1, 2], [5, 6])  # an odd limit loses one
    with pytest.raises(ValueError, match="leaves no prompt"):
        truncate_middle([1, 2], 1)


def test_a_long_prompt_keeps_its_ends_and_leaves_room_to_generate() -> None:
    words = Words()
    given = example(" ".join(f"w{i}" for i in range(100)))
    prompt = prepare_prompt(task(), given, words, max_positions=24)
    text = words.decode(prompt.tokens)
    assert text.startswith("w0 w1")
    assert text.endswith("w98 w99")
    assert len(prompt.tokens) == 20
    assert prompt.num_cut == 80


def test_the_template_is_put_around_what_was_cut_and_is_never_cut() -> None:
    words = Words()
    given = example(" ".join(f"w{i}" for i in range(100)), answer_prefix=" So:")
    prompt = prepare_prompt(
        task(), given, words, max_positions=24, chat_template=lambda t: f"<user> {t} <assistant>"
    )
    text = words.decode(prompt.tokens)
    assert text.startswith("<user> w0")
    assert text.endswith("w99 <assistant> So:")
    assert len(prompt.tokens) <= 20
    bare = prepare_prompt(
        task(chat=False), given, words, max_positions=500, chat_template=lambda t: f"<user> {t}"
    )
    assert words.decode(bare.tokens).startswith("w0")


class Swelling(Words):
    """Decodes to a text that encodes to more tokens, as real tokenizers sometimes do."""

    def decode(self, tokens: object) -> str:
        return super().decode(tokens) + " +"  # type: ignore[arg-type]


def test_a_text_that_swells_when_encoded_again_is_cut_further() -> None:
    given = example(" ".join(f"w{i}" for i in range(100)))
    prompt = prepare_prompt(task(), given, Swelling(), max_positions=24)
    assert 16 <= len(prompt.tokens) <= 20


def test_a_suite_that_cuts_nothing_refuses_what_does_not_fit() -> None:
    given = example(" ".join(f"w{i}" for i in range(100)))
    with pytest.raises(ValueError, match="100 tokens and generates 4, more than the model's 24"):
        prepare_prompt(task(truncates=False), given, Words(), max_positions=24)
    with pytest.raises(ValueError, match="leave no room"):
        prepare_prompt(task(), given, Words(), max_positions=5)


def test_distances_come_from_the_depth_where_that_is_known() -> None:
    words = Words()
    given = example("a b c d", depth=0.25)
    prompt = prepare_prompt(task(), given, words, max_positions=100)
    assert evidence_distance(given, len(prompt.tokens), prompt.num_cut) == 3
    assert evidence_distance(example("a", distance=7), 100, 0) == 7
    assert evidence_distance(example("a"), 100, 0) is None


def test_evidence_is_as_far_as_the_cut_prompt_has_it() -> None:
    places = {0.0: 100, 0.04: 60, 0.1: None, 0.9: None, 0.96: 40, 1.0: 0}
    found = {d: evidence_distance(example("a", depth=d), 100, 900) for d in places}
    assert found == places


def test_aggregates_are_percent_and_refuse_nothing_to_average() -> None:
    assert task().aggregate([0.0, 1.0, 1.0]) == 66.67
    assert task(decimals=None).aggregate([0.0, 1.0, 1.0]) == pytest.approx(200 / 3)
    with pytest.raises(ValueError, match="no scores"):
        task().aggregate([])


def test_only_the_first_examples_are_used_where_that_is_asked() -> None:
    many = task(load=lambda: iter([example("a"), example("b"), example("c")]), max_examples=2)
    assert [e.prompt for e in many.examples()] == ["a", "b"]
    assert [e.prompt for e in many.examples()] == ["a", "b"]  # anew
