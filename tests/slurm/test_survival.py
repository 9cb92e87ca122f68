"""What a job survives: the time limit, a node that dies, a task that dies.

All on a real Slurm of two nodes, one task each, with the tiny recipe.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import (
    FINAL_STATES,
    PATIENCE_S,
    ROOT,
    SlurmCluster,
    skip_without_slurm,
)
from tests.slurm.conftest import JOB_ENV, shape

STEPS = 40
SCRIPT = str(ROOT / "slurm" / "convert_qwen3_0_6b.sh")
OTHER_SCRIPT = str(ROOT / "slurm" / "convert_qwen3_1_7b.sh")


@pytest.fixture(scope="module")
def words(tiny_words: list[str]) -> list[str]:
    """`STEPS` steps of `pretrain`, long enough to be caught in the middle, with checkpoints."""
    steps = [f"pretrain.steps={STEPS}", "pretrain.checkpoint_every=5", "pretrain.batch_size=16"]
    return [*tiny_words, "stages=[prepare,pretrain]", *steps]


@pytest.fixture(scope="module")
def undisturbed(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory, words: list[str]):
    """The run that nothing happens to: its folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = cluster.sbatch(*shape(folder, nodes=2), OTHER_SCRIPT, *words, cwd=folder)
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.output(job)
    return folder / "runs" / "tiny"


def prepared(undisturbed: Path, folder: Path) -> Path:
    """A run in a folder, with the shards of another one."""
    run = folder / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "prepare").symlink_to(undisturbed / "prepare")
    return run


def start(cluster: SlurmCluster, folder: Path, words: list[str], **env: str) -> str:
    """Submit the job to two nodes."""
    return cluster.sbatch(*shape(folder, nodes=2), SCRIPT, *words, cwd=folder, **env)


def steps_of(run: Path) -> list[dict[str, Any]]:
    path = run / "pretrain" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def wait_for_step(cluster: SlurmCluster, job: str, run: Path, step: int) -> None:
    """Wait until the job has done a step.

    Raises:
        TimeoutError: it has not, or has ended before; with its output.
    """

    deadline, ask = time.monotonic() + PATIENCE_S, 0.0
    while (steps_of(run) or [{"step": 0}])[-1]["step"] < step:
        now = time.monotonic()
        if now > ask:
            ask, ended = now + 3, cluster.job(job)["JobState"] in FINAL_STATES
            if ended or now > deadline:
                raise TimeoutError(f"no step {step}; {cluster.job(job)}\n{cluster.output(job)}")
        time.sleep(0.03)


def mlflow_runs(run: Path) -> list[str]:
    """Ids of all MLflow runs, the oldest first."""
    query = "select run_uuid from runs order by start_time"
    with sqlite3.connect(run / "mlflow.db") as database:
        return [row[0] for row in database.execute(query)]


def points_of(run: Path) -> Iterator[tuple[str, int]]:
    """(run id, step) of every loss that MLflow keeps."""
    with sqlite3.connect(run / "mlflow.db") as database:
        yield from database.execute("select run_uuid, step from metrics where key='train/loss'")


def test_a_stopped_requeued_job_that_loses_a_node_has_the_losses_of_an_undisturbed_one(
    cluster: SlurmCluster, undisturbed: Path, tmp_path: Path, words: list[str]
) -> None:
    run = tmp_path / "runs" / "tiny"
    job = start(cluster, tmp_path, words)
    wait_for_step(cluster, job, run, 3)
    first_runs = mlflow_runs(run)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1@… before the limit
    cluster.wait_for(job, lambda it: it["Restarts"] == "1")
    saved = steps_of(run)[-1]["step"]
    wait_for_step(cluster, job, run, saved + 6)
    cluster.kill_node("node2")
    cluster.wait_for(job, lambda it: it["Restarts"] == "2")
    cluster.start_node("node2")
    ended = cluster.wait(job)
    output = cluster.output(job)
    assert ended["JobState"] == "COMPLETED", output
    assert "SIGUSR1: stops and saves" in output
    assert f"going on after step {saved}" in output
    assert "restart 2, nodes node1,node2" in output

    wanted, found = steps_of(undisturbed), steps_of(run)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert [line["train/loss"] for line in found] == [line["train/loss"] for line in wanted]
    assert mlflow_runs(run)[: len(first_runs)] == first_runs
    assert len(mlflow_runs(run)) == len(mlflow_runs(undisturbed))
    points = list(points_of(run))
    assert len(points) == len(set(points))
    assert not list(Path(cluster.env["ALLMEM_SCRATCH"]).iterdir())


def test_one_dead_task_fails_the_job_within_seconds(
    cluster: SlurmCluster, undisturbed: Path, tmp_path: Path, words: list[str]
) -> None:
    run = prepared(undisturbed, tmp_path)
    endless = [*words, "pretrain.steps=100000", "tracking=none"]
    job = start(cluster, tmp_path, endless, ALLMEM_MAX_FAILURES="0")
    wait_for_step(cluster, job, run, 2)
    (task,) = tasks_of(cluster, "node2")
    os.kill(task, signal.SIGKILL)
    started = time.monotonic()
    ended = cluster.wait(job, timeout_s=120)
    assert time.monotonic() - started < 30
    assert ended["JobState"] == "FAILED"
    assert ended["Restarts"] == "0"
    output = cluster.output(job)
    assert ended["ExitCode"] == "137:0"
    assert "1 times without a checkpoint between" in output


@pytest.mark.slow
def test_a_cancelled_job_is_not_requeued(
    cluster: SlurmCluster, undisturbed: Path, tmp_path: Path, words: list[str]
) -> None:
    run = prepared(undisturbed, tmp_path)
    job = start(cluster, tmp_path, [*words, "pretrain.steps=100000"])
    wait_for_step(cluster, job, run, 2)
    cluster.run("scancel", job)
    ended = cluster.wait(job, timeout_s=120)
    assert ended["JobState"] == "CANCELLED"
    time.sleep(2)
    ended = cluster.job(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")


def tasks_of(cluster: SlurmCluster, node: str) -> list[int]:
    """Process ids of the pipeline's tasks on a node."""
    found = []
    for pid in cluster.processes(node=node):
        shown = subprocess.run(
            ["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, timeout=10
        )
        if shown.stdout.startswith("python -m pipeline.run"):
            found.append(pid)
    return found


@pytest.mark.slow
def test_the_node_of_the_batch_script_may_die_too(
    cluster: SlurmCluster, undisturbed: Path, tmp_path: Path, words: list[str]
) -> None:
    run = tmp_path / "runs" / "tiny"
    job = start(cluster, tmp_path, words)
    wait_for_step(cluster, job, run, 12)
    cluster.kill_node("node1", declare=False)  # Slurm finds out by itself
    cluster.wait_for(job, lambda it: it["Restarts"] == "1")
    cluster.start_node("node1")
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.output(job)
    wanted, found = steps_of(undisturbed), steps_of(run)
    assert [line["train/loss"] for line in found] == [line["train/loss"] for line in wanted]


@pytest.mark.slow
def test_the_time_limit_itself_requeues(
    cluster: SlurmCluster, undisturbed: Path, tmp_path: Path, words: list[str]
) -> None:
    run = prepared(undisturbed, tmp_path)
    limit = ["--time=2", "--signal=B:USR1@30"]
    job = cluster.sbatch(
        *shape(tmp_path, nodes=2), *limit, SCRIPT, *words, "pretrain.steps=100000", cwd=tmp_path
    )
    cluster.wait_for(job, lambda it: it["Restarts"] == "1")
    saved = steps_of(run)[-1]["step"]
    assert (run / "pretrain" / "checkpoints" / f"step_{saved:08}").is_dir()
    wait_for_step(cluster, job, run, saved + 1)
    assert "the time limit is near (SIGUSR1)" in cluster.output(job)
    cluster.run("scancel", job)


@pytest.mark.slow
def test_a_run_goes_on_over_four_nodes_in_another_layout(tmp_path: Path, words: list[str]) -> None:
    skip_without_slurm()
    with SlurmCluster(4, env={**JOB_ENV, "ALLMEM_SCRATCH": str(tmp_path)}) as cluster:
        job = start(cluster, tmp_path, [*words, "stage=prepare"])
        assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.output(job)
        four = [*shape(tmp_path, nodes=4), SCRIPT, *words, "parallel.tp=2", "parallel.cp=2"]
        job = cluster.sbatch(*four, cwd=tmp_path)
        run = tmp_path / "runs" / "tiny"
        wait_for_step(cluster, job, run, 3)
        cluster.run("scancel", "--batch", "--signal=USR1", job)
        cluster.wait_for(job, lambda it: it["Restarts"] == "1")
        ended = cluster.wait(job)
        assert ended["JobState"] == "COMPLETED", cluster.output(job)
        assert "4 task(s) on node1, node2, node3, node4 are fit" in cluster.output(job)
        assert [line["step"] for line in steps_of(run)] == list(range(1, STEPS + 1))
