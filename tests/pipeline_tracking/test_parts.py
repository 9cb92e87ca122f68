"""Names, points, pages, system metrics and replays, without a server."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient

from pipeline.dashboard import free_port, main
from pipeline.metrics_log import MetricsLog, read_lines
from pipeline.peak import gpu_named, peak_flops
from pipeline.planning.hardware import GPUS
from pipeline.tracking_evaluation import lower_bound, markdown_to_html, points_of
from pipeline.tracking_names import child_values, parent_values, shown_name
from pipeline.tracking_registry import export_files, register
from pipeline.tracking_replay import replay, stages_of
from pipeline.tracking_system import SystemSampler


def test_every_metric_of_training_has_a_section():
    assert shown_name("train/loss") == "train/loss"
    assert shown_name("mfu") == "throughput/mfu"
    assert shown_name("memory/eta/mean") == "train: memory/eta mean"
    assert shown_name("memory/eta/layer_03") == "train: memory by layer/eta layer_03"
    assert shown_name("memory/mu/std") == "train: memory spread/mu std"
    assert shown_name("allmem/overall/loss_beyond_window") == "eval/allmem loss_beyond_window"


def test_the_parent_gets_headlines_alone_and_an_evaluation_no_details():
    line = {"step": 3, "time": 1.0, "train/loss": 2.0, "loss_tokens": 4, "swa/text/loss": 1.0}
    assert parent_values(line, "convert") == {
        "train: progress/logged_step convert": 3,
        "train/loss convert": 2.0,
    }
    assert "swa/text/loss" not in child_values(line, of_evaluation=True)
    assert "time" not in child_values(line, of_evaluation=False)


def test_bins_become_steps_and_scores_a_section():
    tasks = {
        "longbench/qasper": {"f1": 40.0, "n": 200},
        "longbench/qasper_by_length": {"0-3999": 50.0, "4k": 30.0, "8000+": 20.0},
        "loss_by_position": {"0-63": 4.0, "64-127": 3.0},
        "alpha_by_layer": {"0": 0.1, "1": 0.2},
        "weights_norm_layer_1_by_position": {"8": 1.0},
        "recall/single_by_length_and_depth": {"512@0.10": 1.0},
    }
    points = {
        (point.name, point.step): point.value
        for point in points_of(tasks, {"longbench/qasper": {"metric": "f1"}})
    }
    assert points == {
        ("eval scores/longbench qasper", 0): 40.0,
        ("eval: longbench qasper/f1", 0): 40.0,
        ("eval: longbench qasper/n", 0): 200.0,
        ("eval by length/longbench qasper", 0): 50.0,
        ("eval by length/longbench qasper", 4000): 30.0,
        ("eval by length/longbench qasper", 8000): 20.0,
        ("eval by position/loss", 0): 4.0,
        ("eval by position/loss", 64): 3.0,
        ("memory by layer/alpha", 0): 0.1,
        ("memory by layer/alpha", 1): 0.2,
        ("memory by position/weights_norm layer 01", 8): 1.0,
    }
    assert lower_bound("1.5k-2k") == 1500
    assert lower_bound("all") is None


def test_the_table_becomes_html_with_every_cell():
    page = markdown_to_html("## Scores\n\n| a | b |\n|---|--:|\n| swa | 1 < 2 |\n\nA note.")
    assert "<h3>Scores</h3>" in page
    assert "<tr><td>swa</td><td>1 &lt; 2</td></tr>" in page
    assert "---" not in page
    assert "<p>A note.</p>" in page


def test_peaks_are_those_of_the_data_sheets():
    for name, wanted in (
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40S", "l40s"),
    ):
        assert gpu_named(name) is GPUS[wanted]
    assert gpu_named("NVIDIA T4") is None
    one = peak_flops(torch.device("cpu"), torch.float32, world_size=1)
    assert one == GPUS["cpu"].flops * torch.get_num_threads()
    assert peak_flops(torch.device("cpu"), torch.float32, world_size=3) == pytest.approx(3 * one)


def test_system_metrics_are_written_while_the_stage_runs_and_go_on_after_a_restart(tmp_path: Path):
    path = tmp_path / "system" / "convert.jsonl"
    for _ in range(2):
        sampler = SystemSampler(path, interval_s=0.02)
        sampler.start()
        time.sleep(0.15)
        sampler.stop()
        assert sampler.error is None
    lines = [line for _, line in read_lines(path)]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    assert len(lines) >= 4
    for line in lines:
        assert 0.01 < line["system/process_memory_gb"] < line["system/memory_used_gb"] + 100
        assert line["system/cpu_utilization_percentage"] >= 0


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of two stages whose second is not finished, without MLflow."""
    folder = tmp_path / "runs" / "mine"
    config = {"recipe": "demo", "stages": ["prepare", "convert@mamba2"], "seed": 1}
    for label in ("prepare", "convert_mamba2"):
        log = MetricsLog(folder / label / "metrics.jsonl")
        for step in range(1, 4):
            log.write(step, {"train/loss": 1.0 / step})
        log.close()
        (folder / "configs").mkdir(exist_ok=True)
        (folder / "configs" / f"{label}.json").write_text(json.dumps(config))
    (folder / "prepare" / "DONE.json").write_text('{"commit": "abc"}')
    return folder


def test_a_run_is_read_from_its_files_once_however_often(run_dir: Path, tmp_path: Path):
    store, said = tmp_path / "store", []
    assert [entry for entry, _ in stages_of(run_dir)] == ["prepare", "convert@mamba2"]
    experiment = replay(run_dir, store, say=said.append)
    log = MetricsLog(run_dir / "convert_mamba2" / "metrics.jsonl")
    log.write(4, {"train/loss": 0.25})
    assert replay(run_dir, store, say=said.append) == experiment
    client = MlflowClient(tracking_uri=f"sqlite:///{store}/mlflow.db")
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert set(runs) == {"demo mine", "prepare (demo mine)", "convert_mamba2 (demo mine)"}
    child = runs["convert_mamba2 (demo mine)"]
    assert child.info.status == "KILLED"
    assert child.data.tags["stage"] == "convert@mamba2"
    points = client.get_metric_history(child.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in points] == [(s, 1 / s) for s in range(1, 5)]
    times = [line["time"] for _, line in read_lines(log.path)]
    assert [point.timestamp for point in points] == [int(1000 * when) for when in times]
    assert "convert@mamba2 (not finished)" in said[-1]


def test_the_same_weights_are_registered_once_and_large_ones_by_their_place(
    run_dir: Path, tmp_path: Path
):
    experiment = replay(run_dir, tmp_path / "store", say=lambda line: None)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/store/mlflow.db")
    run_id = client.search_runs([experiment])[0].info.run_id
    export = tmp_path / "export"
    export.mkdir()
    (export / "config.json").write_text("{}")
    (export / "model.safetensors").write_bytes(b"x" * 100)
    small, large = export_files(export, limit_gb=1.0), export_files(export, limit_gb=1e-8)
    assert {path.name for path in small.uploaded} == {"config.json", "model.safetensors"}
    assert [path.name for path in large.uploaded] == ["config.json"]
    for _ in range(2):
        register(client, run_id, "mine", large, tags={"commit": "abc"})
    (export / "model.safetensors").write_bytes(b"y" * 100)
    register(client, run_id, "mine", export_files(export, limit_gb=1.0), tags={})
    versions = client.search_model_versions("name = 'mine'")
    assert sorted(version.tags["weights"] for version in versions) == [
        f"too large to upload; see {export}",
        "uploaded",
    ]


def test_the_dashboard_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path), "--store", str(tmp_path / "store"), "--port", "0"]) == 2
    assert "is no run" in capsys.readouterr().err
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    with pytest.raises(ValueError, match="give another one, or 0"):
        free_port(taken.getsockname()[1])
    taken.close()
