"""Local data of tasks are inputs of the stage: a changed file undoes its mark."""

from pathlib import Path
from typing import Any

from evals.config import EvalConfig
from evals.task import SuiteConfig
from pipeline.done import inputs_of
from pipeline.evaluating.data_files import data_files


def test_files_of_the_tasks_asked_for_are_named_and_no_others(tmp_path: Path) -> None:
    for name in ("piqa.jsonl", "arc_easy.jsonl", "ceval-exam/law.csv", "ceval-exam/.git/x"):
        (tmp_path / "short" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "short" / name).write_text("x")
    (tmp_path / "long").mkdir()
    (tmp_path / "long" / "qasper.jsonl").write_text("x")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("x")
    suites = SuiteConfig(
        tasks=("long*/qasper", "recall/*"),
        longbench_data=str(tmp_path / "long"),
        infinitebench_data=str(tmp_path / "long"),
        recall_filler=str(tmp_path / "notes"),
    )
    settings = EvalConfig(
        short_tasks=("piqa", "ceval"), data_dir=str(tmp_path / "short"), suites=suites
    )
    assert sorted(data_files(settings)) == [
        "eval.data_dir/ceval/law.csv",
        "eval.data_dir/piqa/piqa.jsonl",
        "eval.suites.longbench_data/qasper.jsonl",
        "eval.suites.recall_filler/a.md",
    ]
    assert data_files(EvalConfig()) == {}


def test_a_changed_data_file_changes_the_inputs_of_evaluate(task_run: Any) -> None:
    config = task_run.task_config()
    before = inputs_of(config, task_run.context(config))
    name = "eval.suites.longbench_data/2wikimqa.jsonl"
    assert name in before
    file = task_run.base_dir / "longbench" / "2wikimqa.jsonl"
    file.write_text(file.read_text().replace("old stone", "new stone"))
    after = inputs_of(config, task_run.context(config))
    assert after[name]["sha256"] != before[name]["sha256"]
    assert {k: v for k, v in after.items() if k != name} == {
        k: v for k, v in before.items() if k != name
    }
