"""The preflight finds what is wrong and says on which node; as plain processes and under Slurm."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.preflight import EXIT_PREFLIGHT, Report, shared_gpus
from pipeline.preflight_place import Place
from tests.slurm.cluster import ROOT, SlurmCluster
from tests.slurm.conftest import JOB_ENV, shape

SCRIPT = str(ROOT / "slurm" / "stage.sh")


def start(rank: int, words: list[str], port: int, **env: str) -> subprocess.Popen[str]:
    """One of two tasks, one on each of node1 and node2, as srun and common.sh start them."""
    # a test of one rank in this process may have left its own place here
    foreign = ("SLURM", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_")
    ours = {
        **{key: value for key, value in os.environ.items() if not key.startswith(foreign)},
        **JOB_ENV,
        "PYTHONPATH": str(ROOT),
        "ALLMEM_NODES": "node1,node2",
        "SLURM_TASKS_PER_NODE": "1(x2)",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
        "SLURM_JOB_ID": "17",
        "SLURMD_NODENAME": f"node{rank + 1}",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.preflight", *words],
        env={**ours, **env},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def outcome(tasks: list[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    """Exit codes and outputs; whatever hangs is ended."""
    try:
        outputs = [task.communicate(timeout=300)[0] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    return [task.returncode for task in tasks], outputs


def a_port() -> int:
    return random.SystemRandom().randrange(20000, 30000)


def fake_package(folder: Path, name: str, version: str) -> str:
    """A folder for PYTHONPATH in which Python finds another version of a package."""
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return str(folder)


def test_two_nodes_that_are_fit_pass_and_leave_nothing(tmp_path: Path) -> None:
    words = ["recipe=tiny", f"run.dir={tmp_path}/run", "parallel.device=cpu"]
    port = a_port()
    codes, outputs = outcome([start(rank, words, port) for rank in (0, 1)])
    assert codes == [0, 0], outputs
    assert "2 task(s) on node1, node2 are fit" in outputs[0]
    assert not outputs[1]
    assert not list((tmp_path / "run").iterdir())


def test_all_that_is_wrong_is_said_with_the_node(tmp_path: Path) -> None:
    words = ["recipe=tiny", f"run.dir={tmp_path}/run", "parallel.tp=3"]
    other = fake_package(tmp_path / "other", "transformers", "0.0.1")
    port, gpus = a_port(), {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": ""}
    tasks = [start(0, words, port, CUDA_VISIBLE_DEVICES="")]
    tasks += [start(1, words, port, PYTHONPATH=f"{other}:{ROOT}", **gpus)]
    codes, outputs = outcome(tasks)
    assert codes == [EXIT_PREFLIGHT] * 2
    lines = [line.removeprefix("preflight: ") for line in outputs[0].splitlines()]
    assert len(lines) == 3, outputs
    assert lines[0].startswith("node1 (rank 0): the recipe is refused: parallel.tp=3 x parallel.cp")
    assert lines[1].startswith("node2 (rank 1): Slurm gave 8 GPU(s) but PyTorch sees none")
    assert lines[2].startswith("node2 (rank 1): transformers is 0.0.1, but ")


@pytest.mark.slow
def test_a_node_that_does_not_share_the_folder_is_named(tmp_path: Path) -> None:
    words = ["recipe=tiny", "parallel.device=cpu"]
    tasks = [start(rank, [*words, f"run.dir={tmp_path}/{rank}"], a_port()) for rank in (0, 1)]
    codes, outputs = outcome(tasks)
    assert codes == [EXIT_PREFLIGHT] * 2
    assert "node2 (rank 1): no report within 35 s" in outputs[0]
    assert f"node2 (rank 1): run.dir={tmp_path}/1 is not shared" in outputs[1]


@pytest.mark.slow
def test_a_node_that_imports_slowly_is_waited_for(tmp_path: Path) -> None:
    """As from a network file system that has not been read for a while; longer than `REPORTS_S`."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, time\n"
        "class Slow:\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'torch': time.sleep(45)\n"
        "sys.meta_path.insert(0, Slow)\n"
    )
    words = ["recipe=tiny", f"run.dir={tmp_path}/run", "parallel.device=cpu"]
    port, slow = a_port(), {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    codes, outputs = outcome([start(0, words, port), start(1, words, port, **slow)])
    assert codes == [0, 0], outputs
    assert "2 task(s) on node1, node2 are fit" in outputs[0]


@pytest.mark.slow
def test_a_node_whose_libraries_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open')\n")
    words = ["recipe=tiny", f"run.dir={tmp_path}/run"]
    port, other = a_port(), {"PYTHONPATH": f"{broken.parent}:{ROOT}"}
    codes, outputs = outcome([start(0, words, port), start(1, words, port, **other)])
    assert codes == [EXIT_PREFLIGHT] * 2, outputs
    assert "node2 (rank 1): its environment is broken: OSError: libcudart.so.13" in outputs[0]


@pytest.mark.slow
def test_a_node_that_cannot_reach_rank_0_is_named_within_a_minute(tmp_path: Path) -> None:
    words = ["recipe=tiny", f"run.dir={tmp_path}/run", "parallel.device=cpu"]
    started = time.monotonic()
    codes, outputs = outcome([start(rank, words, a_port()) for rank in (0, 1)])
    assert time.monotonic() - started < 90  # a minute, and the imports before it
    assert set(codes) == {EXIT_PREFLIGHT}
    assert "node2 (rank 1): no all-reduce with the other ranks" in outputs[1], outputs


def output_of_refused_job(cluster: SlurmCluster, folder: Path, on_node2: str) -> str:
    """What a job prints whose preflight fails within a minute, for what is done on node2.

    Args:
        cluster: of two nodes.
        folder: to submit from.
        on_node2: lines of bash that start the words that they are given in another way.
    """
    wrapper = folder / "on_node2"
    wrapper.write_text(f'#!/bin/bash\n[ "$SLURMD_NODENAME" = node2 ] || exec "$@"\n{on_node2}\n')
    wrapper.chmod(0o755)
    words = [*shape(folder, nodes=2), SCRIPT, "stage=all", "recipe=tiny"]
    env = {"ALLMEM_WRAPPER": str(wrapper), "ALLMEM_PREFLIGHT": "1"}
    job = cluster.sbatch(*words, cwd=folder, **env)
    started = time.monotonic()
    ended = cluster.wait(job)
    output = cluster.output(job)
    assert time.monotonic() - started < 90  # a minute, and the imports before it
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", f"{EXIT_PREFLIGHT}:0"), output
    assert not (folder / "runs" / "tiny" / "prepare").exists()
    return output


def test_a_job_whose_second_node_is_not_fit_fails_and_names_it(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    other = fake_package(tmp_path / "other", "torch", "0.0.1")
    line = f'PYTHONPATH="{other}:$PYTHONPATH" exec "$@"'
    output = output_of_refused_job(cluster, tmp_path, line)
    assert "preflight: node2 (rank 1): torch is 0.0.1, but " in output


@pytest.mark.slow
def test_a_job_whose_folder_is_not_shared_fails_within_a_minute(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    """On node2 another file system lies over the folder of the runs."""
    runs = tmp_path / "runs"
    line = f'exec unshare --mount bash -c \'mount -t tmpfs none "{runs}" && exec "$@"\' in "$@"'
    output = output_of_refused_job(cluster, tmp_path, line)
    assert f"node2 (rank 1): run.dir={runs}/tiny is not shared" in output


def test_ranks_are_told_by_their_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLMEM_NODES", "a,b,c")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "2(x2),1")
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURMD_NODENAME", "b")
    place = Place.from_environment()
    assert [place.who(rank) for rank in (0, 1, 2, 3, 4, 5)] == [
        "a (rank 0)", "a (rank 1)", "b (rank 2)", "b (rank 3)", "c (rank 4)", "rank 5",
    ]  # fmt: skip
    reports = [Report(rank=2, node="b", gpu=["x"]), Report(rank=3, node="b", gpu=["x"])]
    assert shared_gpus([*reports, Report(rank=4, node="c", gpu=["x"])], place) == [
        "b (rank 3): shares a GPU with rank 2; set --ntasks-per-node and --gpus-per-node to the "
        "same number"
    ]
