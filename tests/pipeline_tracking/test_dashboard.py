"""`python -m pipeline.dashboard` as a user starts and ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from pipeline.metrics_log import MetricsLog
from tests.pipeline_tracking.conftest import ROOT

pytestmark = pytest.mark.slow


def make_run(folder: Path) -> None:
    log = MetricsLog(folder / "convert" / "metrics.jsonl")
    log.write(1, {"train/loss": 1.0})
    log.close()
    (folder / "configs").mkdir()
    (folder / "configs" / "convert.json").write_text('{"recipe": "demo", "stages": ["convert"]}')


def start(root: Path) -> tuple[subprocess.Popen[str], list[str]]:
    """The dashboard over `root`, and its lines until it says how to stop it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.dashboard", "--root", str(root), "--port", "0"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    timer = threading.Timer(300, process.kill)
    timer.start()
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.strip())
        if "Ctrl-C" in line:
            break
    timer.cancel()
    return process, lines


def address(lines: list[str]) -> str:
    return next(line.split()[-1] for line in lines if "training curves" in line).split("/#")[0]


def test_ctrl_c_stops_the_dashboard_and_its_server(tmp_path: Path):
    make_run(tmp_path / "mine")
    process, lines = start(tmp_path)
    uri = address(lines)
    body = json.dumps({"experiment_ids": ["1"]}).encode()
    request = urllib.request.Request(
        f"{uri}/api/2.0/mlflow/runs/search", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        names = {run["info"]["run_name"] for run in json.load(answer)["runs"]}
    assert names == {"demo mine", "convert (demo mine)"}
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{uri}/health", timeout=2)


def test_without_a_run_a_short_one_is_made(tmp_path: Path):
    process, lines = start(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert "recipe=tiny" in lines[0]
    read = [line.rpartition(" ")[2] for line in lines if line.startswith("read ")]
    assert read[0] == "prepare"
    assert read[-2:] == ["evaluate", "export"]
    assert (tmp_path / "tiny" / "evaluate" / "report.html").is_file()
