"""MLflow: what is shipped, and that a dead server costs nothing but a line."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient

from pipeline.config import compose
from pipeline.console import Reporter
from pipeline.context import StageContext
from pipeline.distributed import Ranks
from pipeline.metrics_log import MetricsLog, read_lines
from pipeline.schema import RunConfig
from pipeline.tracking import metric_name, track

ENTRY = "convert@mamba2"
LABEL = "convert_mamba2"


@pytest.fixture
def make(
    tmp_path: Path, tiny_overrides: list[str]
) -> Callable[..., tuple[RunConfig, StageContext]]:
    def build(*words: str) -> tuple[RunConfig, StageContext]:
        config = compose(
            [
                *[word for word in tiny_overrides if word != "tracking=none"],
                f"run.dir={tmp_path}",
                "tracking.interval_s=0.05",
                *words,
            ]
        )
        context = StageContext(
            entry=ENTRY,
            branch="mamba2",
            run_dir=tmp_path,
            ranks=Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu")),
            reporter=Reporter(),
            metrics=MetricsLog(tmp_path / LABEL / "metrics.jsonl"),
            fingerprint={},
            commit="abc+",
        )
        return config, context

    return build


def history(path: Path, run_name: str, metric: str) -> list[tuple[int, float]]:
    client = MlflowClient(tracking_uri=f"sqlite:///{path}/mlflow.db")
    experiment = client.get_experiment_by_name("allmem")
    (run,) = [
        run
        for run in client.search_runs([experiment.experiment_id])
        if run.info.run_name == run_name
    ]
    return [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, metric)]


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_names_and_values_that_mlflow_refuses_are_mended(tmp_path: Path, make: Callable[..., Any]):
    assert metric_name("recall@512/µ") == "recall_512/µ"
    config, context = make()
    with track(config, context):
        context.log(1, {"train/loss": 2.0, "recall@512": 0.5, "bad": float("inf"), "word": "x"})
        context.log(2, {"train/loss": 1.0, "bad": float("nan")})
    assert history(tmp_path, LABEL, "train/loss") == [(1, 2.0), (2, 1.0)]
    assert history(tmp_path, LABEL, "recall_512") == [(1, 0.5)]
    assert history(tmp_path, LABEL, "bad") == []


def test_a_dead_server_neither_stops_nor_slows_and_is_replayed(
    tmp_path: Path, make: Callable[..., Any], capsys: pytest.CaptureFixture[str]
):
    dead = f"tracking.uri=http://127.0.0.1:{closed_port()}"
    config, context = make(dead, "tracking.flush_s=1", "tracking.timeout_s=1")
    started = time.monotonic()
    with track(config, context):
        for step in range(1, 4):
            context.log(step, {"train/loss": 1.0 / step})
        logged = time.monotonic() - started
    assert logged < 1.0
    assert time.monotonic() - started < 30
    said = capsys.readouterr().err
    assert said.count("is not reachable") == 1
    assert "did not take all metrics" in said

    config, context = make()  # the same stage, done, with a server that lives
    with track(config, context, resume_only=True):
        pass
    assert history(tmp_path, LABEL, "train/loss") == [(1, 1.0), (2, 0.5), (3, 1.0 / 3)]
    assert json.loads((tmp_path / "tracking.json").read_text())[LABEL]["complete"]


def test_a_resumed_run_goes_on_in_the_same_run_without_doubles(
    tmp_path: Path, make: Callable[..., Any]
):
    for first, last in ((1, 5), (3, 8)):  # the second process repeats steps 3 to 5
        config, context = make()
        context.metrics.truncate_after(first - 1)
        with track(config, context):
            for step in range(first, last + 1):
                context.log(step, {"train/loss": float(step)})
            context.metrics.close()
    wanted = [(step, float(step)) for step in range(1, 9)]
    assert history(tmp_path, LABEL, "train/loss") == wanted
    assert history(tmp_path, "tiny " + tmp_path.name, f"{LABEL}/train/loss") == wanted


def test_long_histories_are_sent_in_batches(tmp_path: Path, make: Callable[..., Any]):
    config, context = make()
    with track(config, context):
        for step in range(1, 701):
            context.log(step, {"a": 1.0, "b": 2.0})
    assert len(history(tmp_path, LABEL, "a")) == 700


def test_a_failed_stage_is_marked_failed(tmp_path: Path, make: Callable[..., Any]):
    config, context = make()

    def fail() -> None:
        with track(config, context):
            context.log(1, {"a": 1.0})
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("allmem")
    states = {run.info.status for run in client.search_runs([experiment.experiment_id])}
    assert states == {"FAILED"}


def test_torn_last_line_is_left_out(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [line["step"] for _, line in read_lines(path)] == [1, 2]
    MetricsLog(path).truncate_after(1)
    assert path.read_text() == '{"step": 1}\n'
