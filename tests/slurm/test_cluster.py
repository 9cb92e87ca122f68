"""The Slurm that the other tests use is a real one, and cleans up behind itself."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT, SlurmCluster, skip_without_slurm


def test_two_clusters_run_side_by_side_and_leave_nothing(tmp_path: Path) -> None:
    skip_without_slurm()
    with SlurmCluster(2) as first, SlurmCluster(4) as second:
        for cluster in (first, second):
            number = len(cluster.nodes)
            words = [f"--nodes={number}", "--ntasks-per-node=1", f"--output={tmp_path}/%j-{number}"]
            job = cluster.sbatch(*words, "--wrap", "srun printenv SLURMD_NODENAME")
            assert cluster.wait(job)["JobState"] == "COMPLETED"
            assert sorted(cluster.output(job).split()) == cluster.nodes
        first.sbatch("--nodes=2", f"--output={tmp_path}/left", "--wrap", "srun sleep 100")
        folders, started = (first.folder, second.folder), time.monotonic()
    assert time.monotonic() - started < 30
    assert not any(folder.exists() for folder in folders)
    assert not [path for path in Path("/proc").glob("[0-9]*/environ") if _mentions(path, folders)]


def test_a_cluster_ends_with_a_process_that_is_killed() -> None:
    skip_without_slurm()
    text = (
        "import os, signal\nfrom tests.slurm.cluster import SlurmCluster\n"
        "with SlurmCluster(2) as it:\n"
        "    print(it.folder, flush=True)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.name.startswith("slurm-")
    deadline = time.monotonic() + 30
    while any(_mentions(path, (folder,)) for path in Path("/proc").glob("[0-9]*/environ")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    shutil.rmtree(folder)


@pytest.mark.slow
def test_a_job_on_a_node_that_dies_is_requeued(tmp_path: Path) -> None:
    skip_without_slurm()
    with SlurmCluster(2) as cluster:
        words = ["--nodes=2", "--requeue", f"--output={tmp_path}/%j"]
        job = cluster.sbatch(*words, "--wrap", "srun sleep $((SLURM_RESTART_COUNT ? 0 : 100))")
        cluster.wait_for(job, lambda it: it["JobState"] == "RUNNING")
        cluster.kill_node("node2")
        cluster.wait_for(job, lambda it: it["Restarts"] == "1")
        cluster.start_node("node2")
        assert cluster.wait(job)["JobState"] == "COMPLETED"


def _mentions(path: Path, folders: tuple[Path, ...]) -> bool:
    try:
        text = path.read_bytes()
    except OSError:
        return False
    return any(f"SLURM_CONF={folder}/".encode() in text for folder in folders)
