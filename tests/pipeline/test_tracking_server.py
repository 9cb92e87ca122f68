"""A real MLflow server that is killed while a stage runs, and comes back."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient

from pipeline.config import compose
from pipeline.console import Reporter
from pipeline.context import StageContext
from pipeline.distributed import Ranks
from pipeline.metrics_log import MetricsLog
from pipeline.tracking import track

pytestmark = pytest.mark.slow


def serve(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """Start a server in its own process group, and wait until it answers."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"),
            *("--port", str(port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{folder}/server.db"),
            *("--artifacts-destination", f"{folder}/artifacts"),
        ],
        env={
            **os.environ,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return process
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    kill(process)
    raise AssertionError("the MLflow server did not start")


def kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # killed before
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_what_a_killed_server_missed_is_there_after_the_same_run_is_resumed(
    tmp_path: Path, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    uri = f"http://127.0.0.1:{port}"
    words = [word for word in tiny_overrides if word != "tracking=none"]
    words += [f"run.dir={tmp_path}", f"tracking.uri={uri}", "tracking.interval_s=0.1"]
    config = compose([*words, "tracking.timeout_s=1"])
    context = StageContext(
        entry="evaluate",
        branch="allmem",
        run_dir=tmp_path,
        ranks=Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu")),
        reporter=Reporter(),
        metrics=MetricsLog(tmp_path / "evaluate" / "metrics.jsonl"),
        fingerprint={},
        commit="abc",
    )
    early, late = tmp_path / "early.txt", tmp_path / "late.txt"
    early.write_text("early")
    late.write_text("late")
    server = serve(tmp_path, port)
    client = MlflowClient(tracking_uri=uri)
    try:
        with track(config, context):
            context.artifact(early)
            context.log(1, {"a": 1.0})
            deadline = time.monotonic() + 30
            while not list((tmp_path / "artifacts").rglob("early.txt")):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            kill(server)
            started = time.monotonic()
            for step in range(2, 102):
                context.log(step, {"a": float(step)})
                time.sleep(0.02)
            assert time.monotonic() - started < 100 * 0.02 + 3.0
            context.artifact(late, on_parent=True)
            ended = time.monotonic()
        assert time.monotonic() - ended < 25
        assert "did not take everything" in capsys.readouterr().err
        server = serve(tmp_path, port)
        with track(config, context, resume_only=True):
            pass
        experiment = client.get_experiment_by_name("allmem")
        found = client.search_runs([experiment.experiment_id])
        runs = {run.info.run_name.partition(" (")[0]: run.info.run_id for run in found}
        assert len(runs) == len(found) == 2
        points = client.get_metric_history(runs["evaluate"], "a")
        wanted = [(step, float(step)) for step in range(1, 102)]
        assert [(point.step, point.value) for point in points] == wanted
        names = sorted(item.path for item in client.list_artifacts(runs["evaluate"]))
        assert names == ["early.txt", "late.txt"]
        parent = runs[f"tiny {tmp_path.name}"]
        assert [x.path for x in client.list_artifacts(parent, "evaluate")] == ["evaluate/late.txt"]
    finally:
        kill(server)
