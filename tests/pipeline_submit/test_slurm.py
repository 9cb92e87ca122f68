"""A chain on a real Slurm: to its end, with a stage that fails, cancelled, and refused half-way."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.run import main as run
from pipeline.submit import main
from pipeline.submitting.record import read_record
from tests.slurm.cluster import SlurmCluster, skip_without_slurm

CPU = [
    *("slurm.every.nodes=1", "slurm.every.gpus_per_node=0", "slurm.every.mem=500M"),
    *("slurm.every.cpus_per_task=1", "slurm.prepare.workers=1"),
]
TINY = ["recipe=tiny", "tracking=none", "parallel.num_threads=1", *CPU]


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    """A Slurm of two nodes whose jobs run without the preflight, which has tests of its own."""
    skip_without_slurm()
    with SlurmCluster(2, env={"OMP_NUM_THREADS": "1", "ALLMEM_PREFLIGHT": "0"}) as started:
        yield started


@pytest.fixture(autouse=True)
def in_cluster(cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is a user of the cluster."""
    for name in ("SLURM_CONF", "OMP_NUM_THREADS", "ALLMEM_PREFLIGHT"):
        monkeypatch.setenv(name, cluster.env[name])


def job_of(run_dir: Path, entry: str) -> str:
    """The job of a stage."""
    record = read_record(run_dir)
    assert record is not None
    job = record.job_of(entry)
    assert job is not None
    return job.job


def states(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, str]]:
    """What `status --json` says, by stage."""
    capsys.readouterr()
    main(["status", f"run.dir={run_dir}", "--json"])
    return {row["entry"]: row for row in json.loads(capsys.readouterr().out)}


def test_a_stage_that_fails_cancels_what_depends_on_it_and_a_second_call_submits_what_is_left(
    cluster: SlurmCluster,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    words = [*TINY, f"run.dir={tmp_path}", "model=demo", "stages=[prepare,convert,export]"]
    assert run([*words, "stage=prepare"]) == 0  # complete before anything is submitted
    monkeypatch.setenv("ALLMEM_ENV", "/no/environment")
    assert main(words) == 0
    monkeypatch.delenv("ALLMEM_ENV")
    table = capsys.readouterr().out
    assert "waits for convert" in table
    assert "complete before, not submitted" in table
    first = job_of(tmp_path, "convert")
    ended = cluster.wait(job_of(tmp_path, "export"))
    assert ended["JobState"] == "CANCELLED"
    assert cluster.job(first)["JobState"] == "FAILED"

    assert main(["status", f"run.dir={tmp_path}"]) == 1
    shown = capsys.readouterr().out
    assert f"because convert (job {first}) is FAILED" in shown
    assert f"convert: the end of {tmp_path}/logs/convert-{first}.out" in shown
    assert "ALLMEM_ENV=/no/environment is neither a virtual environment" in shown  # its own words
    found = states(tmp_path, capsys)
    assert [row["state"] for row in found.values()] == ["done", "FAILED", "CANCELLED"]
    assert [row["failed"] for row in found.values()] == [False, True, False]

    assert main(words) == 0
    assert job_of(tmp_path, "convert") != first
    ended = cluster.wait(job_of(tmp_path, "export"))
    assert ended["JobState"] == "COMPLETED"
    found = states(tmp_path, capsys)
    assert [row["state"] for row in found.values()] == ["done", "COMPLETED", "COMPLETED"]
    assert (tmp_path / "export" / "model.safetensors").is_file()
    assert main(words) == 0
    assert "nothing to submit: every stage is complete" in capsys.readouterr().out


def test_what_waits_is_not_submitted_twice_and_can_be_cancelled(
    cluster: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = [*TINY, f"run.dir={tmp_path}", "stages=[prepare,pretrain]"]
    held = [*words, "slurm.every.options=[--hold]"]
    assert main(held) == 0
    jobs = [job_of(tmp_path, entry) for entry in ("prepare", "pretrain")]
    assert main(words) == 0
    assert "every stage is complete or in the queue" in capsys.readouterr().out
    assert [job_of(tmp_path, entry) for entry in ("prepare", "pretrain")] == jobs
    assert main([*words, "pretrain.lr=1e-3"]) == 2
    error = capsys.readouterr().err
    assert f"jobs of other settings are in the queue for {tmp_path} (prepare {jobs[0]}" in error

    assert main(["cancel", f"run.dir={tmp_path}"]) == 0
    assert f"cancelled {jobs[0]}, {jobs[1]}" in capsys.readouterr().out
    assert {cluster.wait(job)["JobState"] for job in jobs} == {"CANCELLED"}
    assert {row["state"] for row in states(tmp_path, capsys).values()} == {"CANCELLED"}
    assert main(["cancel", f"run.dir={tmp_path}"]) == 0
    assert "nothing waits or runs" in capsys.readouterr().out


def test_where_sbatch_refuses_a_stage_what_was_submitted_before_it_is_cancelled(
    cluster: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = [*TINY, f"run.dir={tmp_path}", "stages=[prepare,pretrain,convert]"]
    words += ["slurm.every.options=[--hold]", "slurm.convert.partition=nowhere"]
    assert main(words) == 2
    error = capsys.readouterr().err
    jobs = [job_of(tmp_path, entry) for entry in ("prepare", "pretrain")]
    assert "convert was not submitted: sbatch refused: sbatch: error: invalid partition" in error
    assert f"cancelled again: prepare {jobs[0]}, pretrain {jobs[1]}" in error
    assert {cluster.wait(job)["JobState"] for job in jobs} == {"CANCELLED"}
    assert states(tmp_path, capsys)["convert"]["note"] == "was not submitted"


@pytest.mark.slow
def test_the_whole_tiny_recipe_runs_to_its_end_on_two_workers_and_two_ranks(
    cluster: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = [*TINY, f"run.dir={tmp_path}", "eval.kinds=[text]", "eval.timing_repeats=0"]
    words += ["slurm.prepare.workers=2", "slurm.collect.nodes=2", "slurm.on_policy.nodes=2"]
    assert main(words) == 0
    assert cluster.wait(job_of(tmp_path, "export"), timeout_s=500)["JobState"] == "COMPLETED"
    capsys.readouterr()
    found = states(tmp_path, capsys)
    assert {row["state"] for row in found.values()} == {"COMPLETED"}, found
    assert (tmp_path / "convert_on_policy" / "DONE.json").is_file()
    results = json.loads((tmp_path / "evaluate" / "results.json").read_text())
    assert set(results["mixers"]) == {"full", "swa", "mamba2", "allmem"}


@pytest.mark.slow
def test_a_running_stage_is_shown_with_its_progress_and_saves_when_it_is_cancelled(
    cluster: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = [*TINY, f"run.dir={tmp_path}", "stages=[prepare,pretrain]", "pretrain.steps=1000000"]
    assert main([*words, "pretrain.checkpoint_every=1000000"]) == 0
    job = job_of(tmp_path, "pretrain")
    cluster.wait_for(job, lambda it: it["JobState"] == "RUNNING")
    deadline = time.monotonic() + 200
    while "step " not in states(tmp_path, capsys)["pretrain"]["note"]:
        assert time.monotonic() < deadline
        time.sleep(1)
    assert main(["cancel", f"run.dir={tmp_path}"]) == 0
    assert cluster.wait(job)["JobState"] == "CANCELLED"
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("pretrain/checkpoints/step_*")):
        assert time.monotonic() < deadline
        time.sleep(1)


@pytest.mark.slow
def test_a_job_that_requeues_itself_keeps_its_place_in_the_chain(
    cluster: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = [*TINY, f"run.dir={tmp_path}", "stages=[prepare,pretrain,convert]"]
    assert main([*words, "pretrain.steps=3000", "pretrain.checkpoint_every=3000"]) == 0
    job, after = job_of(tmp_path, "pretrain"), job_of(tmp_path, "convert")
    metrics = tmp_path / "pretrain" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.is_file() or metrics.stat().st_size < 1000:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for(job, lambda it: it["Restarts"] == "1")
    assert cluster.job(after)["JobState"] == "PENDING"
    capsys.readouterr()
    found = states(tmp_path, capsys)
    assert "requeued 1 ×" in found["pretrain"]["note"]
    assert found["convert"]["note"] == "waits for pretrain"
    assert cluster.wait(after)["JobState"] == "COMPLETED"
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 3001))
