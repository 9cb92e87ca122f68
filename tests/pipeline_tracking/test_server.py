"""A real MLflow server: what a run puts there, that it is drawn, and a server that hangs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from evals.config import COLOURS
from pipeline.config import compose
from pipeline.console import Reporter
from pipeline.context import StageContext
from pipeline.dashboard import PAGES
from pipeline.distributed import Ranks
from pipeline.metrics_log import MetricsLog
from pipeline.tracking import MANIFEST_TAG, track
from tests.pipeline_tracking.conftest import SCREENSHOTS, Server

PARENT = "tiny"
MIXERS = {"full (tiny)", "swa (tiny)", "allmem (tiny)", "memory_off (tiny)"}


def test_a_run_has_a_parent_a_child_per_stage_and_a_run_per_mixer(server: Server, tiny_run: Path):
    client, runs = server.runs()
    stages = {"prepare", "pretrain", "convert", "evaluate", "export"}
    assert set(runs) == {PARENT} | stages | MIXERS
    parents = {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()}
    assert {parents[name] for name in stages} == {runs[PARENT].info.run_id}
    assert {parents[name] for name in MIXERS} == {runs["evaluate"].info.run_id}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    digest = hashlib.sha256((tiny_run / "prepare" / "manifest.json").read_bytes()).hexdigest()
    for name in ("pretrain", "convert", "evaluate"):
        (given,) = runs[name].inputs.dataset_inputs
        assert given.dataset.digest == digest[:36]
        assert runs[name].data.tags[MANIFEST_TAG] == digest
        assert runs[name].data.tags["commit"]
        assert runs[name].data.params["convert.steps"] == "8"
    assert runs[PARENT].data.params["convert.steps"] == "8"
    colours = {name: runs[name].data.tags["mlflow.runColor"] for name in MIXERS}
    assert colours == {name: COLOURS[name.removesuffix(" (tiny)")] for name in MIXERS}
    (version,) = client.search_model_versions("name = 'allmem-tiny'")
    assert version.run_id == runs["export"].info.run_id


def test_metrics_stand_in_their_sections_and_headlines_on_the_parent(
    server: Server, tiny_run: Path
):
    client, runs = server.runs()
    found = runs["convert"].data.metrics
    for name in (
        *("train/loss", "train/kl", "train/grad_norm", "train/lr"),
        *("train: memory/alpha_abs mean", "train: memory/eta mean", "train: memory/mu mean"),
        *("train: memory by layer/alpha_abs layer_01", "train: memory spread/eta std"),
        *("throughput/tokens_per_s", "throughput/flops_per_s", "throughput/mfu"),
        *("system/process_memory_gb", "system/cpu_utilization_percentage"),
    ):
        assert name in found, sorted(found)
    headlines = runs[PARENT].data.metrics
    assert headlines["train/loss convert"] == found["train/loss"]
    assert (
        headlines["train: memory/alpha_abs mean convert"] == found["train: memory/alpha_abs mean"]
    )
    assert "eval/allmem loss_beyond_window" in headlines
    run_id = runs["convert"].info.run_id
    steps = [point.step for point in client.get_metric_history(run_id, "train/loss")]
    assert steps == list(range(1, 9))
    bins = client.get_metric_history(runs["swa (tiny)"].info.run_id, "eval by position/loss")
    assert len(bins) > 3
    assert [point.step for point in bins] == sorted(point.step for point in bins)


def test_the_registered_model_loads(server: Server, tiny_run: Path, tmp_path: Path):
    client, runs = server.runs()
    folder = client.download_artifacts(runs["export"].info.run_id, "model", str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert model(torch.zeros(1, 4, dtype=torch.long)).logits.isfinite().all()


def show(page: Any, server: Server, place: str, what: str, name: str, least: int = 1) -> None:
    """Open a page, wait until `least` of something are on it, and keep a picture."""
    page.goto("about:blank")  # a change behind # alone would not load the page
    page.goto(server.uri + place)
    page.wait_for_function(
        "([what, least]) => document.querySelectorAll(what).length >= least", arg=[what, least]
    )
    page.wait_for_timeout(1500)  # lines are drawn one after the other
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def charts_of(page: Any, server: Server, link: str, name: str, least: int) -> str:
    """Open one of the dashboard's links; the text of the page."""
    client, _ = server.runs()
    experiment = client.get_experiment_by_name("allmem").experiment_id
    show(page, server, PAGES[link].format(experiment=experiment), "path.js-line", name, least)
    return str(page.inner_text("body"))


def test_training_curves_are_drawn(server: Server, tiny_run: Path, page: Any):
    text = charts_of(page, server, "training curves", "training", 4)
    for wanted in ("pretrain", "convert", "train/loss", "throughput/mfu"):
        assert wanted in text
    assert "evaluate" not in text


def test_long_context_charts_have_a_line_for_each_mixer(server: Server, tiny_run: Path, page: Any):
    text = charts_of(page, server, "mixers side by side", "mixers", len(MIXERS))
    for wanted in (*MIXERS, "eval by position"):
        assert wanted in text
    lines = page.locator("path.js-line").evaluate_all("x => x.map(p => p.getAttribute('d'))")
    assert sum(line.count("L") > 2 for line in lines) >= len(MIXERS)  # not points alone


def test_the_result_table_and_the_figures_are_shown(server: Server, tiny_run: Path, page: Any):
    client, runs = server.runs()
    experiment = client.get_experiment_by_name("allmem").experiment_id
    place = f"/#/experiments/{experiment}/runs/{runs['evaluate'].info.run_id}"
    show(page, server, f"{place}/artifacts/report.html", "iframe", "report")
    frame = page.frame_locator("iframe").first
    frame.locator("td", has_text="swa").first.wait_for()
    widths = frame.locator("img").evaluate_all("x => x.map(i => i.naturalWidth)")
    assert len(widths) >= 4
    assert min(widths) > 300
    show(page, server, f"{place}/artifacts/plots/summary.png", "img[src^='blob']", "figure")
    show(page, server, place, "table", "overview")
    assert "loss beyond window" in page.inner_text("body")


def test_system_metrics_are_drawn_on_their_page(server: Server, tiny_run: Path, page: Any):
    client, runs = server.runs()
    experiment = client.get_experiment_by_name("allmem").experiment_id
    place = f"/#/experiments/{experiment}/runs/{runs['convert'].info.run_id}/system-metrics"
    show(page, server, place, "path.js-line", "system", 3)
    assert "process_memory_gb" in page.inner_text("body")


@pytest.fixture
def stage(tmp_path: Path, server: Server) -> Callable[[str], tuple[Any, StageContext]]:
    def make(experiment: str) -> tuple[Any, StageContext]:
        words = ["recipe=tiny", f"run.dir={tmp_path}", f"tracking.uri={server.uri}"]
        words += [f"tracking.experiment={experiment}", "tracking.interval_s=0.1"]
        words += ["tracking.flush_s=6", "tracking.timeout_s=2"]
        return compose([*words, "tracking.system_every_s=0"]), StageContext(
            entry="convert",
            branch="allmem",
            run_dir=tmp_path,
            ranks=Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu")),
            reporter=Reporter(),
            metrics=MetricsLog(tmp_path / "convert" / "metrics.jsonl"),
            fingerprint={},
            commit="abc",
        )

    return make


def points(server: Server, experiment: str, run: str, name: str) -> list[tuple[int, float]]:
    client, runs = server.runs(experiment)
    found = client.get_metric_history(runs[run].info.run_id, name)
    return [(point.step, point.value) for point in found]


def wait_for_point(server: Server, experiment: str, step: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if server.runs(experiment)[0].get_experiment_by_name(experiment) and any(
            found == step for found, _ in points(server, experiment, "convert", "train/loss")
        ):
            return
        time.sleep(0.2)
    raise AssertionError(f"step {step} did not arrive")


@pytest.mark.parametrize("comes_back", [True, False], ids=["in_time", "after_the_run"])
def test_a_server_that_hangs_costs_seconds_and_no_point(
    server: Server,
    stage: Callable[[str], tuple[Any, StageContext]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    comes_back: bool,
):
    experiment = f"hangs_{comes_back}"
    config, context = stage(experiment)
    try:
        with track(config, context):
            context.log(1, {"train/loss": 1.0})
            deadline = time.monotonic() + 60
            while (tmp_path / "tracking.json").read_text().count("run_id") != 2:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            wait_for_point(server, experiment, 1)
            server.freeze()
            started = time.monotonic()
            for step in range(2, 302):
                context.log(step, {"train/loss": 1.0 / step})
                time.sleep(0.01)
            assert time.monotonic() - started < 300 * 0.01 + 3.0
            if comes_back:
                server.thaw()
                wait_for_point(server, experiment, 301)
            ended = time.monotonic()
        assert time.monotonic() - ended < 6 + 3  # flush_s and a little
    finally:
        server.thaw()
    assert ("did not take everything" in capsys.readouterr().err) is not comes_back
    config, context = stage(experiment)
    with track(config, context, resume_only=True):
        pass
    wanted = [(step, 1.0 / step) for step in range(1, 302)]
    assert points(server, experiment, "convert", "train/loss") == wanted
    parent = f"tiny {tmp_path.name}"
    assert points(server, experiment, parent, "train/loss convert") == wanted
    _, runs = server.runs(experiment)
    assert set(runs) == {"convert", parent}
