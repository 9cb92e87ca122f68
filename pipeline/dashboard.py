"""`python -m pipeline.dashboard [RUN_DIR …]`: the runs on this disk in MLflow, on loopback.

The runs are read from their own files into a store of the dashboard's, so it does not matter
whether they were tracked, by what server, or how long ago. Ctrl-C stops the server.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from pipeline.config import PROJECT_ROOT

START_S = 180.0
"""Seconds that the server may take to answer."""

STOP_S = 10.0
"""Seconds that it gets to end before it is killed."""

RUNS = "/#/experiments/{experiment}/runs?workflowType=machine_learning&orderByAsc="
FLAT = f"true&orderByKey={quote('attributes.run_name')}&searchFilter="
"""Sorted by another column than the date, MLflow does not fold children away under parents."""

PAGES = {
    "all runs": RUNS + "false&orderByKey=attributes.start_time&searchFilter=&compareRunsMode=",
    "headlines of each run": RUNS + FLAT + "tags.kind+%3D+'recipe'&compareRunsMode=CHART",
    "training curves": RUNS + FLAT + "tags.kind+%3D+'training'&compareRunsMode=CHART",
    "mixers side by side": RUNS + FLAT + "tags.kind+%3D+'mixer'&compareRunsMode=CHART",
}
"""What a person looks for, and where it is. All say how to sort and what to search for, because
MLflow otherwise does as on the page before."""

SERVER_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 after Ctrl-C, 2 after a user's error."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.dashboard", description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs; default: all in ROOT")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="default: runs")
    parser.add_argument("--store", type=Path, help="the dashboard's folder; ROOT/dashboard")
    parser.add_argument("--port", type=int, default=5000, help="default: 5000; 0: a free one")
    options = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        _run(options.runs, options.root, options.store or options.root / "dashboard", options.port)
    except KeyboardInterrupt:
        _say("stopped")
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(runs: list[Path], root: Path, store: Path, port: int) -> None:
    from pipeline.tracking_replay import is_run, replay

    port = free_port(port)
    if not runs:
        runs = sorted(path for path in root.glob("*") if is_run(path)) or [demo_run(root)]
    experiment = ""
    for run_dir in runs:
        experiment = replay(run_dir, store, say=lambda line: _say(f"read {line}"))
    with serving(store, port) as (process, uri):
        for title, place in PAGES.items():
            _say(f"{title + ':':24}{uri}{place.format(experiment=experiment)}")
        _say("Ctrl-C stops it")
        code = process.wait()
        raise OSError(f"the MLflow server ended by itself with code {code}; see {store}/server.log")


def demo_run(root: Path) -> Path:
    """A run of `recipe=tiny`, made now because there is nothing to show.

    Raises:
        OSError: it failed; its own lines say why.
    """
    folder = root / "tiny"
    _say(f"no run in {root}: a short one of recipe=tiny is made in {folder} (about a minute); its")
    _say("model has learnt nothing. `make demo` makes a run that is worth looking at")
    words = ["stage=all", "recipe=tiny", f"run.dir={folder.resolve()}"]
    words += ["tracking.system_every_s=2"]
    done = subprocess.run([sys.executable, "-m", "pipeline.run", *words], cwd=PROJECT_ROOT)
    if done.returncode:
        raise OSError(f"the demo run failed with code {done.returncode}; its lines above say why")
    return folder


def free_port(wanted: int) -> int:
    """The port, or a free one for 0.

    Raises:
        ValueError: something else listens there.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise ValueError(
                f"--port {wanted} cannot be had ({error.strerror}); give another one, or 0 for a "
                "free one"
            ) from None
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def serving(store: Path, port: int) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """An MLflow server of `store/mlflow.db` on loopback, stopped at the end.

    Args:
        store: folder of the database, the artifacts and the server's log.
        port: a free one.

    Yields:
        the process and the server's address, once it answers.

    Raises:
        OSError: it ended or did not answer in time.
    """
    uri = f"http://127.0.0.1:{port}"
    with (store / "server.log").open("wb") as log:
        process = subprocess.Popen(
            server_command(store, port),
            env={**os.environ, **SERVER_ENVIRONMENT},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours; its workers end with it
        )
    try:
        wait_for(uri, lambda: process.poll() is None, log=store / "server.log")
        yield process, uri
    finally:
        stop(process)


def server_command(store: Path, port: int) -> list[str]:
    """The command of a server with one worker over `store`."""
    store = store.resolve()
    return [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--workers", "1", "--backend-store-uri", f"sqlite:///{store}/mlflow.db"),
        *("--artifacts-destination", str(store / "mlartifacts")),
    ]


def wait_for(uri: str, alive: Callable[[], bool], *, log: Path) -> None:
    """Wait until the server answers.

    Raises:
        OSError: it ended, or it took more than `START_S`.
    """
    deadline = time.monotonic() + START_S
    while alive() and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise OSError(f"the MLflow server at {uri} did not start; its own lines are in {log}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and its workers: asked first, killed after `STOP_S`."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):  # it has ended before
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):  # it is killed then
            process.wait(STOP_S)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
