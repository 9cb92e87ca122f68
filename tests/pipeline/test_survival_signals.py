"""SIGTERM and SIGUSR1: noted at once, twice ends at once, and every kind of stage takes them up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.console import Reporter
from pipeline.context import StageContext
from pipeline.run import main
from pipeline.survival import EXIT_REQUEUE, hearing_signals, stop

ROOT = Path(__file__).resolve().parents[2]

BUSY = """
import ctypes, sys, time
from pipeline.survival import hearing_signals, stop
with hearing_signals():
    print("ready", flush=True)
    {wait}
    print("asked" if stop.requested else "not asked", flush=True)
"""

DEADLOCK = "lock = bytes(64); [ctypes.CDLL(None).pthread_mutex_lock(lock) for _ in range(2)]"
"""As in a collective: no Python handler can run."""

FORKS = """
import os, signal, time
from pipeline.survival import hearing_signals, stop
with hearing_signals():
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    time.sleep(0.3)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), stop.requested)
"""


def start(code: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_second_signal_ends_a_process_that_is_stuck_in_a_call():
    process = start(BUSY.format(wait=DEADLOCK))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    started = time.monotonic()
    process.send_signal(signal.SIGUSR1)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - started < 20
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.splitlines() == [
        "SIGUSR1: stops and saves as soon as it can; once more ends it at once",
        "SIGTERM again: ends at once, without saving",
    ]


def test_a_launcher_that_sends_a_signal_twice_at_once_means_one():
    process = start(BUSY.format(wait="time.sleep(3)"))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, "asked\n")


def test_a_forked_worker_dies_of_a_signal_and_asks_nobody_to_stop():
    output, errors = start(FORKS).communicate(timeout=30)
    assert output == f"{-signal.SIGTERM} False\n", errors


def test_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with hearing_signals():
        assert signal.getsignal(signal.SIGTERM) == stop.on_signal
        signal.raise_signal(signal.SIGUSR1)
        assert stop.reason == "SIGUSR1"
    assert signal.getsignal(signal.SIGTERM) == before
    with hearing_signals():
        assert not stop.requested


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> list[str]:
    """Words of a run whose shards and base model are there."""
    folder = tmp_path_factory.mktemp("stop")
    words = [*tiny_overrides, "stages=[prepare,pretrain]", "pretrain.steps=2", f"run.dir={folder}"]
    words.append("data.samples_per_shard=8")
    assert main([*words, "stage=all"]) == 0
    return words


def test_prepare_stops_between_samples_and_goes_on_to_the_same_bytes(
    tmp_path: Path, prepared: list[str], monkeypatch: pytest.MonkeyPatch
):
    from data_prep.engine import write as module

    words = [*prepared, "stage=prepare", f"run.dir={tmp_path}", "data.num_processes=1"]
    whole = Path(prepared[-2].removeprefix("run.dir=")) / "prepare"
    write, written = module.write_samples, []

    def write_and_stop(stream: Any, samples: Any, **options: Any) -> Any:
        def interrupted() -> Any:
            for number, sample in enumerate(samples):
                if len(written) == 2 and number == 3:
                    signal.raise_signal(signal.SIGTERM)
                yield sample

        record = write(stream, interrupted(), **options)
        written.append(record)
        return record

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_samples", write_and_stop)
        assert main(words) == EXIT_REQUEUE
    assert sorted(p.name for p in (tmp_path / "prepare" / "train").glob("*.tar")) == [
        "shard-00000.tar", "shard-00001.tar",
    ]  # fmt: skip
    assert not (tmp_path / "prepare" / "DONE.json").exists()
    assert main(words) == 0
    for file in whole.rglob("*.tar"):
        assert (tmp_path / "prepare" / file.relative_to(whole)).read_bytes() == file.read_bytes()


def test_a_signal_while_a_stage_starts_ends_it_before_its_first_step(
    tmp_path: Path, prepared: list[str], monkeypatch: pytest.MonkeyPatch
):
    from pipeline.train_loop import _Trainer

    words = [*prepared, "stage=pretrain", f"run.dir={tmp_path}"]
    (tmp_path / "prepare").symlink_to(Path(prepared[-2].removeprefix("run.dir=")) / "prepare")
    resume = _Trainer._resume

    def stopped(self: _Trainer) -> None:
        signal.raise_signal(signal.SIGUSR1)
        resume(self)

    with monkeypatch.context() as patched:
        patched.setattr(_Trainer, "_resume", stopped)
        assert main(words) == EXIT_REQUEUE
    assert not (tmp_path / "pretrain" / "metrics.jsonl").exists()
    assert main(words) == 0


def test_evaluate_stops_between_batches_and_keeps_the_mixers_that_are_measured(
    tmp_path: Path,
    prepared: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    from pipeline.evaluating import documents

    run_dir = prepared[-2].removeprefix("run.dir=")
    words = [*prepared, "stage=evaluate", "eval.mixers=[full,swa]", "eval.controls=[]"]
    words += ["eval.batch_size=2", "eval.timing_repeats=0", "eval.kinds=[text]"]
    score, calls = documents.score_batch, []

    def score_and_stop(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:  # the first of swa's two batches
            signal.raise_signal(signal.SIGTERM)
        return score(*args, **options)

    monkeypatch.setattr("pipeline.run.commit", lambda: "0123456789ab")  # as in a clean clone
    with monkeypatch.context() as patched:
        patched.setattr(documents, "score_batch", score_and_stop)
        assert main(words) == EXIT_REQUEUE
    assert len(calls) == 3
    assert not (Path(run_dir) / "evaluate" / "results.json").exists()
    capsys.readouterr()
    assert main(words) == 0
    assert "full is kept from before" in capsys.readouterr().err
    results = json.loads((Path(run_dir) / "evaluate" / "results.json").read_text())
    assert set(results["mixers"]) == {"full", "swa"}


def test_a_stopped_run_is_killed_not_failed_for_mlflow(
    tmp_path: Path, prepared: list[str], monkeypatch: pytest.MonkeyPatch
):
    from mlflow.tracking import MlflowClient

    words = [w for w in prepared if w != "tracking=none"]
    words += ["stage=pretrain", f"run.dir={tmp_path}", "tracking=sqlite"]
    (tmp_path / "prepare").symlink_to(Path(prepared[-2].removeprefix("run.dir=")) / "prepare")
    log: Callable[..., None] = StageContext.log

    def log_and_stop(self: StageContext, step: int, values: dict[str, Any]) -> None:
        log(self, step, values)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(StageContext, "log", log_and_stop)
    assert main(words) == EXIT_REQUEUE
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("allmem")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"KILLED"}


def test_reporters_do_not_end_with_the_signal(capsys: pytest.CaptureFixture[str]):
    with Reporter(enabled=True).progress("work:", 2) as advance, hearing_signals():
        signal.raise_signal(signal.SIGTERM)
        advance(2)
    assert "work: 2/2" in capsys.readouterr().err
