"""A real MLflow server, a real tiny run that was tracked by it, and a browser."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from pipeline.dashboard import free_port, serving

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = ROOT / "runs" / "screenshots"


@dataclass(frozen=True, kw_only=True)
class Server:
    uri: str
    process: subprocess.Popen[bytes]
    store: Path

    def freeze(self) -> None:
        """The server and its workers hang: connections are taken and never answered."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def runs(self, experiment: str = "allmem") -> tuple[MlflowClient, dict[str, Any]]:
        """The client, and the runs of an experiment by name; stages without the run's name."""
        client = MlflowClient(tracking_uri=self.uri)
        found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
        names = [
            run.info.run_name
            if run.data.tags["kind"] == "mixer"
            else run.info.run_name.partition(" (")[0]
            for run in found
        ]
        assert len(set(names)) == len(found)
        return client, dict(zip(names, found, strict=True))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    store = tmp_path_factory.mktemp("store")
    with serving(store, free_port(0)) as (process, uri):
        yield Server(uri=uri, process=process, store=store)


@pytest.fixture(scope="session")
def tiny_run(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, training, evaluation and export of `recipe=tiny`, tracked by the server."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    words = ["stage=all", "recipe=tiny", f"run.dir={folder}", "parallel.num_threads=1"]
    words += ["stages=[prepare,pretrain,convert,evaluate,export]", "eval.controls=[memory_off]"]
    words += [f"tracking.uri={server.uri}", "tracking.timeout_s=20", "tracking.flush_s=120"]
    subprocess.run(
        [sys.executable, "-m", "pipeline.run", *words, "tracking.system_every_s=0.2"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        check=True,
        timeout=400,
        stdout=subprocess.DEVNULL,
    )
    return folder


@pytest.fixture(scope="session")
def page() -> Iterator[Any]:
    """A page of headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[dev]'")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=path,
            args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"],
        )
        page = browser.new_page(viewport={"width": 1400, "height": 1300})
        page.set_default_timeout(90_000)
        # MLflow's assistant would open over a third of the page
        page.add_init_script("localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false')")
        page.add_init_script(
            "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')"
        )
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        yield page
        browser.close()
