"""Tasks that generate: the right model answers, nothing is asked twice, controls stand beside."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from allmem_megatron.config import MixerSettings
from evals.longbench import build as longbench_task
from evals.task import SuiteConfig, build_tasks
from pipeline.evaluating.speaker import Sampling, Speaker
from pipeline.evaluating.suites import Asking, Prepared, TextTokenizer, prepare, suite_metrics
from pipeline.models import load_model
from pipeline.survival import StopRequested, stop
from pipeline.tokenizer import open_tokenizer

TASK = "longbench/2wikimqa"


def answers(run: Any, subject: str) -> dict[str, str]:
    """What a subject said, by example."""
    files = (run.dir / "evaluate" / "journal" / subject).glob("*/*/rank_*.jsonl")
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line["value"] for line in lines}


def prepared(run: Any, config: Any, task: Any) -> Prepared:
    tokenizer = TextTokenizer(open_tokenizer(config))
    return prepare(task, tokenizer, max_positions=700, chat_template=None, folder=run.dir)


def greedy(run: Any, config: Any, prompt: tuple[int, ...], **settings: Any) -> str:
    """A continuation by the training model, the whole text anew for each token."""
    branch = "none" if settings["mode"] in ("swa", "full") else "allmem"
    model = load_model(config, run.dir, branch=branch, device=torch.device("cpu"))
    mixer = MixerSettings(window_size=12, num_sinks=2, chunk_size=6, **settings)
    tokenizer = open_tokenizer(config)
    tokens = list(prompt)
    for _ in range(32):
        with torch.no_grad(), model.mixer(mixer):
            hidden = model.hidden_states(torch.tensor([tokens]))[:, -1:]
            token = int(model.logits(hidden)[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        tokens.append(token)
    return tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True)


def test_every_subject_answers_with_its_own_mixer_and_controls_stand_beside(
    task_run: Any,
) -> None:
    config = task_run.task_config(mixers=("full", "swa", "allmem"))
    results = task_run.evaluate(config)
    assert list(results["controls"]) == ["memory_off", "write_off", "state_shuffled"]
    for row in (*results["mixers"].values(), *results["controls"].values()):
        counts = [row[TASK][name] for name in ("n", "num_truncated", "num_refused")]
        assert counts == [9, 3, 0]
        assert 0 <= row[TASK]["f1"] <= 100
        assert set(row[f"{TASK}_by_length"]) == {"256-511", "512-1023"}
    assert results["tasks"][TASK]["prompts"].startswith("upstream")
    assert results["config"]["max_positions"] == 700
    assert results["mixers"]["allmem"]["alpha_by_layer"] == pytest.approx({"0": 0.7, "1": 0.7})
    said = {name: answers(task_run, name) for name in (*results["mixers"], *results["controls"])}
    assert said["memory_off"] == said["swa"]
    different = ("full", "swa", "allmem", "write_off", "state_shuffled")
    assert len({json.dumps(said[name], sort_keys=True) for name in different}) == 5
    task = longbench_task(
        "2wikimqa", data=str(task_run.base_dir / "longbench"), prompts="", max_examples=4
    )
    prompts = prepared(task_run, config, task)
    for place in (0, 2):  # the second one had lost its middle
        prompt, name = prompts.prompts[place], prompts.examples[place].id
        assert len(prompt) <= 700 - 32
        assert said["full"][name] == greedy(task_run, config, prompt, mode="full")
        assert said["swa"][name] == greedy(task_run, config, prompt, mode="swa")
        assert said["allmem"][name] == greedy(task_run, config, prompt, mode="allmem")
        off = greedy(task_run, config, prompt, mode="allmem", write_off=True)
        assert said["write_off"][name] == off


def test_greedy_answers_are_the_same_twice_and_samplings_have_seeds_and_an_error(
    task_run: Any,
) -> None:
    config = first_examples(task_run.task_config(controls=(), mixers=("allmem",)), 3)
    task_run.evaluate(config)
    first = answers(task_run, "allmem")
    (task_run.dir / "evaluate").rename(task_run.dir / "before")
    task_run.evaluate(config)
    assert answers(task_run, "allmem") == first

    drawn = {"temperature": 1.0, "num_samples": 2, "batch_size": 3}
    sampled = task_run.task_config(controls=(), mixers=("allmem",), generation=drawn)
    sampled = first_examples(sampled, 3)
    rows = []
    for _ in range(2):
        results = task_run.evaluate(sampled)
        journal = task_run.dir / "evaluate" / "journal" / "allmem"
        lines = [
            json.loads(line)
            for file in journal.glob("*/*/rank_*.jsonl")
            for line in file.read_text().splitlines()
        ]
        rows.append({(x["id"], x["sample"], x["asked"]): x["value"] for x in lines})
        (task_run.dir / "evaluate").rename(task_run.dir / f"before{len(rows)}")
    assert results["mixers"]["allmem"][TASK]["n"] == 3
    assert results["mixers"]["allmem"][TASK]["stderr"] >= 0
    both = {key: value for key, value in rows[1].items() if key in rows[0]}
    assert both == rows[1]
    assert len(both) == 6
    texts = {}
    for (name, sample, _), text in rows[1].items():
        texts.setdefault(name, {})[sample] = text
    assert all(said[0] != said[1] for said in texts.values())


def start_rank(folder: Path, *kinds: str, **environment: str) -> subprocess.Popen[bytes]:
    worker = Path(__file__).with_name("rank_worker.py")
    root = str(worker.parents[2])
    return subprocess.Popen(
        [sys.executable, str(worker), str(folder), *kinds],
        env={**os.environ, "PYTHONPATH": root, **environment},
        stderr=subprocess.PIPE,
    )


def test_a_killed_evaluation_goes_on_with_two_ranks_and_repeats_nothing(
    task_run: Any, tmp_path: Path
) -> None:
    """The first run has tasks alone, the second held-out documents too; one rank then says both."""
    kinds = ("text", "recall")
    process = start_rank(tmp_path)
    deadline = time.monotonic() + 240
    while sum(map(len, task_run.journals().values())) < 5:
        assert process.poll() is None, "ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = {name: Path(name).read_bytes() for name in task_run.journals()}
    torn = sorted(before)[-1]
    with Path(torn).open("ab") as file:
        file.write(b'{"id": "2wikimqa-8", "sam')  # killed in the middle of a line
    finished = [name for names in task_run.journals().values() for name in names]
    assert 5 <= len(finished) < 45

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    task_run.write_documents()
    ranks = [
        start_rank(tmp_path, *kinds, **launcher, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=300)[1].decode() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert "answers are kept from before" in said[0]

    after = task_run.journals()
    names = [name for found in after.values() for name in found]
    assert len(names) == len(set(names)) == 5 * 9  # swa, allmem and three controls
    for name, content in before.items():
        assert Path(name).read_bytes().startswith(content)
    assert any("rank_00001" in name for name in after)

    resumed = json.loads((task_run.dir / "evaluate/results.json").read_text())
    (task_run.dir / "evaluate").rename(task_run.dir / "killed")
    undisturbed = task_run.evaluate(task_run.task_config(kinds=kinds))
    for rows in ("mixers", "controls"):
        assert list(resumed[rows]) == list(undisturbed[rows])
        for name, tasks in undisturbed[rows].items():
            assert {TASK, f"{TASK}_by_length", "text", "recall"} <= set(tasks)
            for task in set(tasks) - {"memory"}:  # of a rank's own last batch
                same = tasks[task] if TASK in task else pytest.approx(tasks[task], abs=1e-6)
                assert resumed[rows][name][task] == same, (name, task)


def test_what_changes_an_answer_and_nothing_else_is_asked_anew(task_run: Any) -> None:
    config = task_run.task_config(controls=(), mixers=("full", "swa", "allmem"))
    config = first_examples(config, 2)

    def asked(config: Any) -> Counter[str]:
        task_run.evaluate(config)
        found = [name for names in task_run.journals().values() for name in names]
        return Counter(name.partition("/")[0] for name in found)

    assert asked(config) == {"full": 2, "swa": 2, "allmem": 2}
    assert asked(config) == {"full": 2, "swa": 2, "allmem": 2}
    task_run.train("convert", alpha=0.2)
    assert asked(config) == {"full": 2, "swa": 2, "allmem": 4}
    seeded = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=5))
    assert asked(seeded) == {"full": 2, "swa": 2, "allmem": 4}  # greedy
    narrow = dataclasses.replace(config, eval=dataclasses.replace(config.eval, window_size=10))
    assert asked(narrow) == {"full": 2, "swa": 4, "allmem": 6}
    file = task_run.base_dir / "longbench" / "2wikimqa.jsonl"
    file.write_text(file.read_text().replace("Where did", "Where, then, did", 1))
    assert asked(narrow) == {"full": 3, "swa": 5, "allmem": 7}


def first_examples(config: Any, count: int) -> Any:
    suites = dataclasses.replace(config.eval.suites, max_examples=count)
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, suites=suites))


def test_a_stop_request_keeps_what_is_answered(
    task_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = task_run.task_config(controls=(), mixers=("swa",))
    speak, calls = Speaker.speak, []

    def speak_and_stop(self: Speaker, *args: Any, **options: Any) -> list[str]:
        calls.append(args)
        stop.reason = "SIGTERM" if len(calls) == 2 else None
        return speak(self, *args, **options)

    monkeypatch.setattr(Speaker, "speak", speak_and_stop)
    try:
        with pytest.raises(StopRequested, match="finished answers are kept"):
            task_run.evaluate(config)
    finally:
        stop.reset()
    assert sum(map(len, task_run.journals().values())) == 4
    assert not (task_run.dir / "evaluate" / "results.json").exists()
    task_run.evaluate(config)
    (names,) = task_run.journals().values()
    assert len(names) == len(set(names)) == 9


def test_examples_beyond_the_position_range_are_refused_and_counted(task_run: Any) -> None:
    suites = SuiteConfig(tasks=("recall/single_*",), lengths=(600, 1000), samples=4)
    config = task_run.task_config(controls=(), mixers=("swa",), suites=suites)
    results = task_run.evaluate(config)
    row = results["mixers"]["swa"]
    assert row["recall/single_1000"] == {"n": 0.0, "num_refused": 4.0}
    assert row["recall/single_600"]["n"] == 4
    assert row["recall/single_600"]["n_outside_window"] == 4 - sum(
        max_distance < 12 for max_distance in distances(config)
    )
    assert 0 <= row["recall/single_600"]["exact_match_outside_window"] <= 100
    assert row["recall/single_600_by_length_and_depth"]
    assert results["tasks"]["recall/single_1000"]["num_refused"] == 4
    text = (task_run.dir / "evaluate/table.md").read_text()
    assert "Not in the scores: 4 examples of `recall/single_1000`, longer than 700" in text


def distances(config: Any) -> list[int]:
    tokenizer = TextTokenizer(open_tokenizer(config))
    (task,) = (t for t in build_tasks(config.eval.suites, tokenizer=tokenizer) if "600" in t.name)
    return [example.distance or 0 for example in task.examples()]


def test_an_answer_of_nothing_scores_by_the_suite_and_is_counted(task_run: Any) -> None:
    config = task_run.task_config()
    task = longbench_task(
        "2wikimqa", data=str(task_run.base_dir / "longbench"), prompts="", max_examples=2
    )
    asking = Asking(
        context=task_run.context(config),
        sampling=Sampling(),
        num_samples=1,
        batch_size=1,
        resamples=10,
        window_size=12,
        num_sinks=2,
    )
    said = prepared(task_run, config, task)
    assert [example.prompt for example in said.examples] == ["", ""]  # they wait on the disk
    row = suite_metrics(said, [[""], ["under the old stone"]], asking)[TASK]
    assert row["num_empty"] == 1
    assert row["f1"] == 50.0
    assert row["stderr"] > 0


def test_what_cannot_be_asked_is_said_in_one_line(task_run: Any) -> None:
    with pytest.raises(ValueError, match=r"max_positions=9999 exceeds .*=700; set it to 700"):
        task_run.evaluate(task_run.task_config(generation={"max_positions": 9999}))
    with pytest.raises(ValueError, match="did you mean 'longbench/2wikimqa'"):
        task_run.evaluate(task_run.task_config(tasks=("longbench/2wikimqu",)))
    with pytest.raises(ValueError, match=r"chat=always but the tokenizer has no chat template"):
        task_run.evaluate(task_run.task_config(generation={"chat": "always"}))
