"""Short tasks run offline from local files, and give what the harness's own model class gives."""

import bz2
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from evals.short import SHORT_TASKS
from pipeline.evaluating.short_tasks import load_harness_tasks

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed ([evals])"
)
QUESTIONS = 6


def choice_rows(count: int = QUESTIONS, options: int = 4) -> list[dict[str, Any]]:
    return [
        {
            "centerpiece": f"Which stone number {i} lies under the _ of the old house?",
            "options": [f"the stone {i * 7 + k} by the sea" for k in range(options)],
            "correct_options": ["ABCD"[i % options]],
            "correct_options_idx": [i % options],
        }
        for i in range(count)
    ]


def write_data(folder: Path) -> Path:
    """The five sets in the forms in which they are handed round."""
    folder.mkdir()
    for name, options in (("arc-easy", 4), ("piqa", 2), ("winogrande", 2)):
        rows = [json.dumps(row) for row in choice_rows(options=options)]
        (folder / f"{name}.test.jsonl").write_text("\n".join(rows) + "\n")
    blocks = [
        f"Roofing {i}: A man is on a roof. he\n{i % 4}\n" + "\n".join(f"end {k}" for k in range(4))
        for i in range(QUESTIONS)
    ]
    text = "\n".join(blocks) + "\n"
    (folder / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress(text.encode()))
    problems = [
        {"problem": f"What is {i} + 1?", "solution": rf"$\boxed{{{i + 1}}}$", "answer": str(i + 1)}
        for i in range(QUESTIONS)
    ]
    (folder / "math500_test.json").write_text(json.dumps(problems))
    return folder


NAMES = ("arc_easy", "hellaswag", "winogrande", "piqa", "math_500")


@needs_harness
def test_five_sets_run_offline_and_equal_the_harness_own_model(
    task_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = write_data(tmp_path / "data")
    config = task_run.task_config(
        tasks=(),
        mixers=("full", "allmem"),
        short_tasks=NAMES,
        data_dir=str(data),
        short_limit=QUESTIONS,
    )
    results = task_run.evaluate(config)
    for name in NAMES:
        about = results["tasks"][f"short/{name}"]
        for mixer in ("full", "allmem"):
            row = results["mixers"][mixer][f"short/{name}"]
            assert row["n"] == QUESTIONS
            assert 0 <= row[about["metric"]] <= 100
        assert f"short/{name}" not in results["controls"]["memory_off"]
        assert about["data"] == "local"
    answered = sum(map(len, task_run.journals().values()))
    task_run.evaluate(config)  # from the journals alone
    assert sum(map(len, task_run.journals().values())) == answered

    own = {
        name: {
            metric.partition(",")[0]: results["mixers"]["full"][f"short/{name}"][
                metric.partition(",")[0]
            ]
            for metric in SHORT_TASKS[name].metrics
        }
        for name in NAMES
    }
    assert own == by_the_harness_model(task_run.base_dir, data)


def by_the_harness_model(model_dir: Path, data: Path) -> dict[str, dict[str, float]]:
    """The same numbers by `HFLM` on the base model, as `transformers` has it."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=700)
    found = {}
    for name in NAMES:
        tasks = load_harness_tasks(name, data)
        results = evaluate(
            harness,
            {"tasks": tasks, "groups": {}, "group_map": {}},
            limit=QUESTIONS,
            bootstrap_iters=0,
        )
        (metrics,) = results["results"].values()
        found[name] = {m.partition(",")[0]: 100 * metrics[m] for m in SHORT_TASKS[name].metrics}
    return found


@needs_harness
@pytest.mark.slow
def test_gpqa_is_the_mean_of_ten_samplings(
    task_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    rows = [
        {"Question": f"Which of them is {i}?", "Correct Answer": "yes"}
        | {f"Incorrect Answer {k}": f"no {k}" for k in (1, 2, 3)}
        for i in range(2)
    ]
    (data / "gpqa").mkdir(parents=True)
    header = list(rows[0])
    lines = [",".join(header), *(",".join(row[key] for key in header) for row in rows)]
    (data / "gpqa" / "gpqa_diamond.csv").write_text("\n".join(lines) + "\n")
    (data / "gpqa" / "README.md").write_text(
        "---\nconfigs:\n- config_name: gpqa_diamond\n  data_files: gpqa_diamond.csv\n---\n"
    )
    config = task_run.task_config(
        tasks=(),
        mixers=("allmem",),
        controls=(),
        short_tasks=("gpqa_diamond",),
        data_dir=str(data),
        generation={"batch_size": 4},
    )
    results = task_run.evaluate(config)
    row = results["mixers"]["allmem"]["short/gpqa_diamond"]
    assert results["tasks"]["short/gpqa_diamond"]["metric"] == "exact_match"
    assert {"exact_match", "exact_match_strict-match"} <= set(row)
    assert row["num_samples"] == 10
    assert row["n"] == 2
    (answers,) = task_run.journals().values()
    assert sorted(set(answers)) == [f"allmem/gpqa_diamond_cot_zeroshot/{i}/0" for i in (0, 1)]
    assert len(answers) == 20


@needs_harness
def test_a_set_that_is_not_in_the_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no data of ceval \(looked for ceval-exam/\); put a"):
        load_harness_tasks("ceval", tmp_path)
    (tmp_path / "piqa.jsonl").write_text('{"goal": "x"}\n')
    with pytest.raises(ValueError, match=r"piqa\.jsonl record 1 is none of piqa \(KeyError"):
        load_harness_tasks("piqa", tmp_path)


@needs_harness
def test_every_short_task_is_in_the_installed_harness() -> None:
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    root = Path(lm_eval.tasks.__file__).parent
    for name, short in SHORT_TASKS.items():
        manager = TaskManager(
            include_defaults=False, include_path=[root / folder for folder in short.folders]
        )
        assert short.harness in manager.all_tasks, name


@needs_harness
@pytest.mark.slow
def test_a_group_reads_each_subject_from_a_copy_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import lm_eval.tasks

    subjects = [
        json.loads(line.partition(":")[2])
        for path in sorted((Path(lm_eval.tasks.__file__).parent / "ceval").glob("ceval-valid_*"))
        for line in path.read_text().splitlines()
        if line.startswith('"dataset_name"')
    ]
    folder = tmp_path / "data" / "ceval-exam"
    folder.mkdir(parents=True)
    rows = [f"{i},问题{i},甲,乙,丙,丁,{'ABCD'[i % 4]}," for i in range(6)]
    text = "\n".join(["id,question,A,B,C,D,answer,explanation", *rows, ""])
    (folder / "exam.csv").write_text(text)
    card = ["---", "configs:"]
    for subject in subjects:
        card += [f"- config_name: {subject}", "  data_files:"]
        card += [f"  - split: {split}\n    path: exam.csv" for split in ("val", "dev")]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    tasks = load_harness_tasks("ceval", tmp_path / "data")
    assert sorted(tasks) == sorted(f"ceval-valid_{subject}" for subject in subjects)
    assert len(tasks) == 52
    law = tasks["ceval-valid_law"]
    law.build_all_requests(limit=1, rank=0, world_size=1)
    prompt, letter = law.instances[0].args
    assert prompt.count("答案：") == 6  # five solved examples and the question
    assert prompt.startswith("以下是中国关于法学的单项选择题")
    assert letter.strip() == "A"
