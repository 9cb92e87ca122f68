"""Prompts are upstream's to the last character, or say that they are not."""

import json
from pathlib import Path
from typing import Any

import pytest

from evals import infinitebench, longbench, own_prompts, ruler_texts, upstream_prompts
from evals.task import SuiteConfig, Task, build_tasks, task_names


def sources(*patterns: str, **settings: Any) -> dict[str, str]:
    tasks: list[Task] = build_tasks(SuiteConfig(tasks=patterns, **settings))
    return {f"{task.suite}/{task.name}": task.prompts_source for task in tasks}


def test_the_harness_gives_upstreams_prompts_to_the_last_character() -> None:
    """Building checks each against the digest of upstream's; only math_calc is not there."""
    found = sources("longbench/*", "infinitebench/*")
    assert len(found) == 33
    assert {name for name, source in found.items() if source != "upstream:lm_eval"} == {
        "infinitebench/math_calc"
    }
    assert ruler_texts.templates()[1] == "upstream:lm_eval"


def test_six_sets_of_longbench_get_no_chat_template() -> None:
    bare = {t.name for t in build_tasks(SuiteConfig(tasks=("longbench/*",))) if not t.chat}
    assert bare == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}


def test_prompts_for_open_models_get_no_chat_template(tmp_path: Path) -> None:
    """InfiniteBench's are put to open models as they are; kv_retrieval has one for all models."""
    text = infinitebench._template("kv_retrieval", "")[0]
    (tmp_path / "src").mkdir()
    source = f"yarn_mistral_templates = {{'kv_retrieval': {text!r}}}"
    (tmp_path / "src" / "prompt.py").write_text(source)
    for folder, chat in (("", True), (str(tmp_path), False)):
        config = SuiteConfig(tasks=("infinitebench/kv_retrieval",), infinitebench_prompts=folder)
        assert build_tasks(config)[0].chat is chat


def test_a_harness_with_another_prompt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        upstream_prompts, "lm_eval_yaml", lambda path: {"doc_to_text": "{{context}} changed"}
    )
    with pytest.raises(ValueError, match=r"prompt of hotpotqa is not upstream's; install lm_eval"):
        sources("longbench/hotpotqa")


def test_without_the_harness_prompts_are_our_own_and_say_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(upstream_prompts, "lm_eval_installed", lambda: False)
    found = sources("longbench/*", "infinitebench/*", "lveval/*_32k")
    assert set(found.values()) == {"own"}
    assert len(found) == 21 + 12 + 11


def test_own_prompts_hold_what_each_set_asks() -> None:
    for name in longbench.SETS:
        assert "{context}" in own_prompts.LONGBENCH[name]
    for name in infinitebench.SETS:
        text = own_prompts.INFINITEBENCH[name]
        parts = dict.fromkeys(
            ("input", "question", "func", "func_call", "prefix", *infinitebench._OPTIONS), "q"
        )
        assert "CONTEXT" in text.format(context="CONTEXT", **parts)


def test_a_local_copy_must_be_upstreams(tmp_path: Path) -> None:
    config = tmp_path / "LongBench" / "config"
    with pytest.raises(ValueError, match=r"dataset2prompt.json is not there"):
        sources("longbench/qasper", longbench_prompts=str(tmp_path))
    config.mkdir(parents=True)
    (config / "dataset2prompt.json").write_text(json.dumps({"qasper": "{context} {input}"}))
    with pytest.raises(ValueError, match="prompt of qasper is not upstream's"):
        sources("longbench/qasper", longbench_prompts=str(tmp_path))
    with pytest.raises(ValueError, match="has no prompt for trec"):
        sources("longbench/trec", longbench_prompts=str(tmp_path))


def test_a_local_copy_that_is_upstreams_counts_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness's prompt is upstream's, so it stands for the copy."""
    text = longbench._template("qasper", "")[0]
    config = tmp_path / "LongBench" / "config"
    config.mkdir(parents=True)
    (config / "dataset2prompt.json").write_text(json.dumps({"qasper": text}))
    assert sources("longbench/qasper", longbench_prompts=str(tmp_path)) == {
        "longbench/qasper": "local"
    }


def test_constants_of_a_copy_are_read_without_running_it(tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    path.write_text("import absent_package\nA = {'x': 'y'}\nB = open('/absent')\n")
    assert upstream_prompts.literals(path) == {"A": {"x": "y"}}
    with pytest.raises(ValueError, match="has no prompt for cmrc_mixup"):
        sources("lveval/cmrc_mixup_16k", lveval_prompts=str(tmp_path))


def test_every_task_says_where_its_prompts_are_from() -> None:
    names = [n for n in task_names(SuiteConfig()) if not n.startswith(("ruler", "recall"))]
    assert set(sources(*names)) == set(names)
