"""A run killed by SIGKILL goes on bit for bit; the same command again does no harm.

One uninterrupted run and one that is killed in `pretrain` and again in `convert`, in the first
phase of one and the second of the other, both through the real command line, are compared number by
number. The killed one also logs to MLflow.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from pipeline.run import main

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24
FIRST_PHASE = {"pretrain": 5, "convert": 12}
"""Steps of each stage's first phase, with other lengths, shares and batches than the second."""
KILLED_AT = {"pretrain": 8, "convert": 7}
"""Steps after which the process is killed: past the phase's end, and before it."""
SHAPE = [
    "stage=all",
    "stages=[prepare,pretrain,convert]",
    f"pretrain.steps={STEPS}",
    f"convert.steps={STEPS}",
    "pretrain.checkpoint_every=5",
    "convert.checkpoint_every=5",
    "pretrain.phases=[{fraction: 0.2, seq_length: 24, batch_size: 8,"
    " weights: {code: 1, repeats: 3}}, {fraction: 0.8}]",
    "convert.phases=[{fraction: 0.5, seq_length: 32, batch_size: 2, weights: {repeats: 1},"
    " window_range: [8, 12], chunk_range: [4, 8]}, {fraction: 0.5}]",
]
NUMBERS = ("step", "tokens", "loss_tokens", "train/loss", "train/grad_norm", "train/lr")


@dataclass(frozen=True)
class Runs:
    """Folders of both runs, and what the killed one was called with."""

    whole: Path
    killed: Path
    words: list[str]
    killed_after: dict[str, int]


def run_until_killed(
    words: list[str], environment: dict[str, str], stage_dir: Path, step: int
) -> int:
    """Start the command, SIGKILL it once `step` is logged; the last step that was logged."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.run", *words],
        env=environment,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = stage_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        if len(lines) > step:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    assert process.stderr is not None
    errors = process.stderr.read()
    assert process.wait() == -signal.SIGKILL, errors
    return len(metrics.read_text().splitlines())


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_overrides: list[str],
    cli: Callable[..., Any],
    environment: dict[str, str],
) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    repeats = ", {kind: repeats, name: repeats, packages: [yaml], eval_packages: [rich]}]"
    tiny_overrides = [
        word.removesuffix("]") + repeats if word.startswith("data.sources") else word
        for word in tiny_overrides
    ]
    whole, killed = folder / "whole", folder / "killed"
    cli(*tiny_overrides, *SHAPE, f"run.dir={whole}")
    words = [
        *tiny_overrides,
        *SHAPE,
        f"run.dir={killed}",
        "tracking=sqlite",
        "tracking.interval_s=0.05",
    ]
    after = {
        stage: run_until_killed(words, environment, killed / stage, step=step)
        for stage, step in KILLED_AT.items()
    }
    cli(*words)
    return Runs(whole=whole, killed=killed, words=words, killed_after=after)


def numbers(lines: list[dict[str, Any]]) -> list[list[Any]]:
    return [[line[key] for key in NUMBERS] for line in lines]


@pytest.mark.parametrize("stage", ["pretrain", "convert"])
def test_losses_after_kill_9_are_those_of_an_uninterrupted_run(
    runs: Runs, stage: str, metrics_of: Callable[[Path], list[dict[str, Any]]]
):
    assert KILLED_AT[stage] < runs.killed_after[stage] < STEPS
    whole, resumed = (numbers(metrics_of(d / stage)) for d in (runs.whole, runs.killed))
    assert [line[0] for line in resumed] == list(range(1, STEPS + 1))
    assert resumed == whole
    assert whole[-1][3] < whole[0][3] or stage == "convert"
    tokens = [line[1] for line in whole]
    first, rest = {"pretrain": (8 * 24, 4 * 64), "convert": (2 * 32, 4 * 64)}[stage]
    end = FIRST_PHASE[stage]
    assert tokens[end - 1] == end * first
    assert tokens[-1] == end * first + (STEPS - end) * rest


@pytest.mark.parametrize("stage", ["pretrain", "convert"])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_final_weights_and_moments_are_the_same(runs: Runs, stage: str, file: str):
    name = f"{stage}/checkpoints/step_{STEPS:08d}/{file}"
    assert (runs.whole / name).read_bytes() == (runs.killed / name).read_bytes()


def test_convert_saves_the_memory_alone_under_canonical_names(runs: Runs):
    path = runs.whole / f"convert/checkpoints/step_{STEPS:08d}/model.safetensors"
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    assert names
    assert all(name.startswith("model.layers.") and ".memory." in name for name in names)
    assert "model.layers.0.memory.fast_gate" in names


def test_pretrain_leaves_a_model_that_transformers_loads(runs: Runs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = runs.whole / "pretrain" / "hf"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "qwen3"
    assert len(tokenizer("def f(x):")["input_ids"]) > 1


def test_only_the_last_checkpoints_stay_and_nothing_unfinished(runs: Runs):
    for stage in ("pretrain", "convert"):
        names = sorted(os.listdir(runs.killed / stage / "checkpoints"))
        assert names == ["step_00000020", "step_00000024"]


def test_running_again_changes_nothing(runs: Runs, capsys: pytest.CaptureFixture[str]):
    before = {
        path: path.stat().st_mtime_ns
        for path in runs.whole.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    words = [word for word in runs.words if "tracking" not in word]
    assert main([*words, "tracking=none", f"run.dir={runs.whole}"]) == 0
    assert capsys.readouterr().err.count("already complete") == 3
    after = {
        path: path.stat().st_mtime_ns
        for path in runs.whole.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    assert after == before


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("convert.lr=0.5", "convert.lr=0.003, this run has convert.lr=0.5"),
        ("mixer.memory.eta_init=0.7", "mixer.memory.eta_init=0.3"),
        ("run.seed=3", "run.seed=0, this run has run.seed=3"),
        ("pretrain.steps=30", "pretrain.steps=24, this run has pretrain.steps=30"),
    ],
)
@pytest.mark.parametrize("done", [True, False])
def test_a_checkpoint_of_another_configuration_is_refused(
    runs: Runs, override: str, named: str, done: bool, capsys: pytest.CaptureFixture[str]
):
    mark = runs.killed / "convert" / "DONE.json"
    content = mark.read_text()
    if not done:
        mark.unlink()
    try:
        words = [*runs.words, "tracking=none", "stage=convert", override]
        assert main(words) == 2
    finally:
        mark.write_text(content)
    errors = capsys.readouterr().err.strip().splitlines()
    assert named in errors[-1]
    assert "another run.dir, or delete" in errors[-1]


def test_free_settings_do_not_make_another_run(runs: Runs, capsys: pytest.CaptureFixture[str]):
    free = ["convert.checkpoint_every=7", "convert.micro_batch_size=1", "convert.log_every=3"]
    assert main([*runs.words, "tracking=none", "stage=convert", *free]) == 0
    assert "already complete" in capsys.readouterr().err


def test_mark_holds_hash_configuration_and_commit(runs: Runs):
    mark = json.loads((runs.whole / "convert" / "DONE.json").read_text())
    assert len(mark["hash"]) == 64
    assert mark["config"]["convert.steps"] == STEPS
    assert mark["commit"]


def test_mlflow_has_every_step_once_after_two_kills(
    runs: Runs, metrics_of: Callable[[Path], list[dict[str, Any]]]
):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{runs.killed}/mlflow.db")
    experiment = client.get_experiment_by_name("allmem")
    found = client.search_runs([experiment.experiment_id])
    by_name = {run.info.run_name.removesuffix(" (tiny killed)"): run for run in found}
    assert sorted(by_name) == ["convert", "prepare", "pretrain", "tiny killed"]
    parent = by_name["tiny killed"]
    for stage in ("pretrain", "convert"):
        run = by_name[stage]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == "FINISHED"
        assert run.data.params["convert.steps"] == str(STEPS)
        assert run.data.params["recipe"] == '"tiny"'
        assert run.data.tags["commit"]
        lines = metrics_of(runs.killed / stage)
        for run_id, name in (
            (run.info.run_id, "train/loss"),
            (parent.info.run_id, f"train/loss {stage}"),
        ):
            points = client.get_metric_history(run_id, name)
            assert sorted((p.step, p.value) for p in points) == [
                (line["step"], line["train/loss"]) for line in lines
            ]


def test_a_second_process_in_the_same_folder_is_refused(
    runs: Runs, capsys: pytest.CaptureFixture[str]
):
    import fcntl

    with (runs.whole / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main([*runs.words, "tracking=none", f"run.dir={runs.whole}"]) == 2
    assert "is in use by another process" in capsys.readouterr().err


def test_sigterm_saves_and_the_same_command_goes_on(
    tmp_path: Path,
    runs: Runs,
    environment: dict[str, str],
    metrics_of: Callable[[Path], list[dict[str, Any]]],
):
    words = [*runs.words, "tracking=none", f"run.dir={tmp_path}", "pretrain.checkpoint_every=1000"]
    (tmp_path / "prepare").symlink_to(runs.whole / "prepare")
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.run", *words], env=environment, cwd=ROOT
    )
    metrics = tmp_path / "pretrain" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size > 1000):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    saved = os.listdir(tmp_path / "pretrain" / "checkpoints")
    assert len(saved) == 1
    assert main([*words, "stage=pretrain"]) == 0
    assert numbers(metrics_of(tmp_path / "pretrain")) == numbers(
        metrics_of(runs.whole / "pretrain")
    )
