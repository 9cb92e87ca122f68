"""The bridge to graders of their own: prompts in, answers out, finished ones kept."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.answer import main, read_prompts


def prompts(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_answers_are_written_in_order_and_drawn_once(task_run: Any, tmp_path: Path) -> None:
    given = [{"id": f"p{i}", "prompt": f"def f{i}(x):"} for i in range(3)]
    file, out = prompts(tmp_path / "prompts.jsonl", *given[:2]), tmp_path / "answers.jsonl"
    words = [f"model={task_run.base_dir}", f"prompts={file}", f"out={out}", "num_samples=2"]
    words += ["temperature=0.9", "max_new_tokens=6", "mode=swa", "window_size=8", "batch_size=3"]
    assert main(words) == 0
    first = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["id"] for record in first] == ["p0", "p1"]
    assert all(len(set(record["texts"])) == 2 for record in first)
    journal = next(tmp_path.glob(".answers.jsonl/answers/*/rank_00000.jsonl"))
    assert len(journal.read_text().splitlines()) == 4
    prompts(file, *given)  # one prompt more
    assert main(words) == 0
    second = [json.loads(line) for line in out.read_text().splitlines()]
    assert second[:2] == first
    assert len(second) == 3
    assert len(journal.read_text().splitlines()) == 6


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    record = {"id": "a", "prompt": "one\u2028two\x85three"}
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_prompts(file) == [record]


@pytest.mark.parametrize(
    ("records", "extra", "message"),
    [
        ([{"id": "a"}], [], "line 1 has neither prompt nor messages"),
        ([{"id": "a", "prompt": 5}], [], "line 1: prompt is no text"),
        ([{"id": "a", "prompt": "x"}] * 2, [], "line 2 has no id of its own ('a')"),
        ([{"id": "a", "messages": []}], [], "the tokenizer has no chat template"),
        ([{"id": "a", "prompt": "x" * 690}], ["max_new_tokens=20"], "leave 680"),
        ([{"id": "a", "prompt": "x"}], ["num_samples=2"], "greedy answers would all be one"),
        ([{"id": "a", "prompt": "x"}], ["samples=2"], "did you mean num_samples"),
    ],
)
def test_what_cannot_be_answered_is_said_in_one_line(
    task_run: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    records: list[dict[str, Any]],
    extra: list[str],
    message: str,
) -> None:
    file = prompts(tmp_path / "prompts.jsonl", *records)
    words = [f"model={task_run.base_dir}", f"prompts={file}", f"out={tmp_path / 'out.jsonl'}"]
    assert main([*words, "max_new_tokens=4", *extra]) == 2
    assert message in capsys.readouterr().err
