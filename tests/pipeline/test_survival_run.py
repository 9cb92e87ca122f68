"""The whole program on ranks that are started directly, as srun does: one is stopped, or dies.

The default test starts the program twice; more cases run with `-m slow`.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.run import main
from pipeline.survival import EXIT_RANK_LOST, EXIT_REQUEUE, EXIT_USER_ERROR

ENDLESS = 100_000
"""Steps that no test waits for."""


def _launcher() -> Callable[..., list[subprocess.Popen[bytes]]]:
    path = Path(__file__).with_name("test_survival_watchdog.py")
    spec = importlib.util.spec_from_file_location("survival_launcher", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.start_ranks


start_ranks = _launcher()


@dataclass
class Job:
    """The program on some ranks."""

    folder: Path
    ranks: list[subprocess.Popen[bytes]]

    def err(self, rank: int) -> str:
        return (self.folder / f"err-{rank}").read_text()

    def wait_for(self, is_there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 200
        while not is_there():
            assert time.monotonic() < deadline, [self.err(r) for r in range(len(self.ranks))]
            if any(rank.poll() is not None for rank in self.ranks):
                raise AssertionError((self.codes(), self.err(0), self.err(1)))
            time.sleep(0.02)

    def wait_for_steps(self, path: Path, number: int) -> None:
        self.wait_for(lambda: path.exists() and path.read_text().count("\n") >= number)

    def codes(self, timeout: float = 120) -> list[int]:
        return [rank.wait(timeout) for rank in self.ranks]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> list[str]:
    folder = tmp_path_factory.mktemp("survival")
    words = [*tiny_overrides, "stages=[prepare,pretrain]", "stage=all", f"run.dir={folder}"]
    assert main([*words, "pretrain.steps=2"]) == 0
    return words


@pytest.fixture
def job(tmp_path: Path, prepared: list[str], environment: dict[str, str]) -> Any:
    """Starts the program; what is left of it is ended afterwards."""
    jobs: list[Job] = []
    (tmp_path / "run").mkdir()
    made = Path(prepared[-1].removeprefix("run.dir="))
    (tmp_path / "run" / "prepare").symlink_to(made / "prepare")

    def start(number: int, *words: str) -> Job:
        folder = tmp_path / f"job{len(jobs)}"
        folder.mkdir()
        command = ["-m", "pipeline.run", *prepared, f"run.dir={tmp_path / 'run'}", *words]
        jobs.append(
            Job(folder, start_ranks(number, command, folder, {**os.environ, **environment}))
        )
        return jobs[-1]

    yield start
    for started in jobs:
        for rank in started.ranks:
            rank.kill()


def test_a_signal_to_one_rank_saves_and_a_killed_rank_ends_the_others(
    job: Callable[..., Job],
    tmp_path: Path,
    metrics_of: Callable[[Path], list[dict[str, Any]]],
):
    stage = tmp_path / "run" / "pretrain"
    words = ["stage=pretrain", f"pretrain.steps={ENDLESS}", f"pretrain.checkpoint_every={ENDLESS}"]
    first = job(2, *words)
    first.wait_for_steps(stage / "metrics.jsonl", 3)
    first.ranks[1].send_signal(signal.SIGUSR1)
    assert first.codes() == [EXIT_REQUEUE] * 2
    assert "SIGUSR1 on rank 1: stops and saves" in first.err(0)
    (saved,) = (stage / "checkpoints").glob("step_*")
    done = int(saved.name.removeprefix("step_"))
    assert metrics_of(stage)[-1]["step"] == done

    second = job(2, *words)
    second.wait_for_steps(stage / "metrics.jsonl", done + 3)
    assert f"going on after step {done}" in second.err(0)
    second.ranks[1].kill()
    started = time.monotonic()
    assert second.codes() == [EXIT_RANK_LOST, -signal.SIGKILL]
    assert time.monotonic() - started < 10
    assert "rank 0: rank 1 is gone since " in second.err(0)


@pytest.mark.slow
def test_the_death_of_rank_0_ends_the_others(job: Callable[..., Job], tmp_path: Path):
    started = job(3, "stage=pretrain", "pretrain.batch_size=6", f"pretrain.steps={ENDLESS}")
    started.wait_for_steps(tmp_path / "run" / "pretrain" / "metrics.jsonl", 2)
    started.ranks[0].kill()
    began = time.monotonic()
    assert started.codes() == [-signal.SIGKILL, EXIT_RANK_LOST, EXIT_RANK_LOST]
    assert time.monotonic() - began < 10
    assert "rank 2: rank 0 is gone since " in started.err(2)


@pytest.mark.slow
def test_evaluate_stops_on_all_ranks_when_one_is_asked(
    job: Callable[..., Job], tmp_path: Path, prepared: list[str]
):
    (tmp_path / "run" / "pretrain").symlink_to(
        Path(prepared[-1].removeprefix("run.dir=")) / "pretrain"
    )
    started = job(
        2, "stage=evaluate", "pretrain.steps=2", "eval.kinds=[text]", "eval.mixers=[full,swa]",
        "eval.controls=[]", f"eval.timing_repeats={ENDLESS}",
    )  # fmt: skip
    started.wait_for(lambda: "loading the base model" in started.err(0))
    started.ranks[1].send_signal(signal.SIGTERM)
    assert started.codes() == [EXIT_REQUEUE] * 2
    assert not (tmp_path / "run" / "evaluate" / "results.json").exists()


@pytest.mark.slow
def test_an_error_of_the_user_is_printed_once(job: Callable[..., Job]):
    started = job(3, "stage=pretrain", "pretrain.batch_size=4", "pretrain.steps=9")
    assert started.codes() == [EXIT_USER_ERROR] * 3
    assert "error: pretrain.batch_size=4 does not split over 3" in started.err(0)
    errors = [started.err(rank) for rank in range(3)]
    assert ["error" in text for text in errors] == [True, False, False]
    assert "gone" not in "".join(errors)


@pytest.mark.slow
def test_prepare_stops_on_all_ranks_when_one_is_asked(job: Callable[..., Job], tmp_path: Path):
    (tmp_path / "run" / "prepare").unlink()
    source = (
        "{kind: recall, name: recall, packages: [yaml], eval_packages: [rich], "
        "recall: {num_facts: [1, 2], num_queries: [1, 1], min_distance: 32}}"
    )
    started = job(
        2, "stage=prepare", "data.seq_length=256", "data.train_samples=5000",
        "data.num_processes=1", f"data.sources=[{source}]", "data.samples_per_shard=50",
    )  # fmt: skip
    started.wait_for(lambda: bool(list((tmp_path / "run").rglob("shard-*.tar"))))
    started.ranks[1].send_signal(signal.SIGTERM)
    assert started.codes() == [EXIT_REQUEUE] * 2
    assert not (tmp_path / "run" / "prepare" / "DONE.json").exists()
