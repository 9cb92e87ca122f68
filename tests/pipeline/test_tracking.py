"""MLflow: what is shipped, and that a dead server costs nothing but seconds and a line."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import tempfile
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
from pipeline.tracking import MANIFEST_TAG, track
from pipeline.tracking_names import metric_name

ENTRY = "convert@mamba2"
LABEL = "convert_mamba2"


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables: making them takes seconds, copying them none."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def make(
    tmp_path: Path, tiny_overrides: list[str], empty_store: Path
) -> Callable[..., tuple[RunConfig, StageContext]]:
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")

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


def runs_of(path: Path) -> tuple[MlflowClient, dict[str, Any]]:
    client = MlflowClient(tracking_uri=f"sqlite:///{path}/mlflow.db")
    experiment = client.get_experiment_by_name("allmem")
    found = client.search_runs([experiment.experiment_id])
    return client, {run.info.run_name.partition(" (")[0]: run for run in found}


def artifacts_of(path: Path, run_name: str) -> dict[str, str]:
    """Contents of a run's artifacts by their names in MLflow."""
    client, runs = runs_of(path)
    run_id = runs[run_name].info.run_id
    with tempfile.TemporaryDirectory() as folder:
        root = Path(client.download_artifacts(run_id, "", folder))
        files = sorted(file for file in root.rglob("*") if file.is_file())
        return {str(file.relative_to(root)): file.read_text() for file in files}


def history(path: Path, run_name: str, metric: str) -> list[tuple[int, float]]:
    client, runs = runs_of(path)
    points = client.get_metric_history(runs[run_name].info.run_id, metric)
    return [(p.step, p.value) for p in points]


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
    assert said.count("does not take what it is sent") == 1
    assert "did not take everything" in said

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
    assert history(tmp_path, "tiny " + tmp_path.name, f"train/loss {LABEL}") == wanted


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


def write_files(folder: Path, table: str) -> tuple[Path, Path]:
    (folder / "evaluate" / "plots").mkdir(parents=True, exist_ok=True)
    paths = folder / "evaluate" / "table.md", folder / "evaluate" / "plots" / "summary.png"
    paths[0].write_text(table)
    paths[1].write_text("picture")
    return paths


def test_files_go_to_the_stage_and_where_asked_to_the_parent(
    tmp_path: Path, make: Callable[..., Any]
):
    config, context = make()
    table, plot = write_files(tmp_path, "first")
    with track(config, context):
        context.artifact(table, on_parent=True)
        context.artifact(plot, folder="plots")
    assert artifacts_of(tmp_path, LABEL) == {"table.md": "first", "plots/summary.png": "picture"}
    parent = "tiny " + tmp_path.name
    assert artifacts_of(tmp_path, parent) == {f"{LABEL}/table.md": "first"}
    assert not (Path.cwd() / "mlruns").exists()

    table.write_text("second, after a change")
    with track(config, context):
        pass
    assert artifacts_of(tmp_path, LABEL)["table.md"] == "second, after a change"
    assert artifacts_of(tmp_path, parent)[f"{LABEL}/table.md"] == "second, after a change"


def test_files_that_a_dead_server_did_not_take_are_sent_later(
    tmp_path: Path, make: Callable[..., Any]
):
    config, context = make(f"tracking.uri=http://127.0.0.1:{closed_port()}", "tracking.timeout_s=1")
    table, plot = write_files(tmp_path, "kept")
    started = time.monotonic()
    with track(config, context):
        context.artifact(table, plot, on_parent=True)
    assert time.monotonic() - started < 15  # flush_s is 20: it is not waited for
    plot.unlink()  # what is taken away since does not hold up the rest
    config, context = make()
    with track(config, context, resume_only=True):
        pass
    assert artifacts_of(tmp_path, LABEL) == {"table.md": "kept"}
    assert artifacts_of(tmp_path, "tiny " + tmp_path.name) == {f"{LABEL}/table.md": "kept"}


def test_a_done_stage_that_is_done_again_without_a_server_is_pending(
    tmp_path: Path, make: Callable[..., Any], capsys: pytest.CaptureFixture[str]
):
    config, context = make()
    with track(config, context):
        context.log(1, {"a": 1.0})
    store = tmp_path / "mlflow.db"
    store.rename(tmp_path / "away")
    store.mkdir()  # a place where no database can be opened
    with track(config, context):
        context.log(2, {"a": 2.0})
    assert "did not take everything" in capsys.readouterr().err
    store.rmdir()
    (tmp_path / "away").rename(store)
    with track(config, context, resume_only=True):
        pass
    assert history(tmp_path, LABEL, "a") == [(1, 1.0), (2, 2.0)]


def test_files_that_the_store_refuses_do_not_hold_up_metrics(
    tmp_path: Path, make: Callable[..., Any], capsys: pytest.CaptureFixture[str]
):
    config, context = make()
    table, _ = write_files(tmp_path, "kept")
    (tmp_path / "mlartifacts").write_text("a file where a folder should be")
    started = time.monotonic()
    with track(config, context):
        context.artifact(table)
        context.log(1, {"a": 1.0})
    assert time.monotonic() - started < 15
    assert history(tmp_path, LABEL, "a") == [(1, 1.0)]
    assert "did not take everything" in capsys.readouterr().err
    (tmp_path / "mlartifacts").unlink()
    with track(config, context, resume_only=True):
        pass
    assert artifacts_of(tmp_path, LABEL) == {"table.md": "kept"}


def test_the_parent_gets_the_headlines_of_an_evaluation_and_the_tag_of_the_data(
    tmp_path: Path, make: Callable[..., Any]
):
    config, context = make()
    (tmp_path / "prepare").mkdir()
    (tmp_path / "prepare" / "manifest.json").write_bytes(b"{}")
    headlines = {
        "allmem/recall/exact_match_outside_window": 0.5,
        "swa/overall/loss_beyond_window": 2.0,
    }
    with track(config, context):
        context.log(0, {**headlines, "swa/text/loss": 1.0})
    parent = "tiny " + tmp_path.name
    shown = {
        f"eval/allmem exact_match_outside_window {LABEL}": 0.5,
        f"eval/swa loss_beyond_window {LABEL}": 2.0,
    }
    for name, value in shown.items():
        assert history(tmp_path, parent, name) == [(0, value)]
    assert not [name for name in runs_of(tmp_path)[1][parent].data.metrics if "text" in name]
    _, runs = runs_of(tmp_path)
    for run in runs.values():
        assert run.data.tags[MANIFEST_TAG] == hashlib.sha256(b"{}").hexdigest()
