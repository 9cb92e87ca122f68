"""The only place that imports MLflow: ships what `metrics.jsonl` holds, and never stops a run.

A thread on rank 0 reads the stage's `metrics.jsonl` and sends its lines in batches. The file is the
queue: what a dead server did not take is sent later, by this process or by the next one. How far
the server is, is asked of the server (metric `logged_step`), so that no step is logged twice, even
after a kill between a shipment and its receipt. One parent run a run.dir, one child run a stage;
the headline metrics also stand in the parent, because children are folded away in charts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.checkpoint import write_json
from pipeline.config import flatten, to_plain
from pipeline.context import StageContext, folder_name
from pipeline.metrics_log import read_lines
from pipeline.schema import RunConfig, TrackingSettings

LOGGED_STEP = "logged_step"
"""Metric that says up to which step a run is shipped."""

HEADLINES = ("train/loss", "train/grad_norm", "train/lr", "tokens_per_s")
"""Metrics that the parent run gets too, under the stage's name."""

_PARENT = "(recipe)"
_BATCH = 1000
_MAX_PARAM = 6000


def metric_name(name: str) -> str:
    """A name that MLflow takes: letters, digits and `_-. :/`; `@` becomes `_`."""
    return re.sub(r"[^\w\-. :/]", "_", name)


@contextlib.contextmanager
def track(config: RunConfig, context: StageContext, *, resume_only: bool = False) -> Iterator[None]:
    """Ship the stage's metrics to MLflow while the block runs.

    Args:
        config: gives `tracking` and the parameters to log.
        context: the stage.
        resume_only: only send what an earlier process could not.
    """
    pending = not _Notes(context.run_dir).read(folder_name(context.entry)).get("complete")
    if not (config.tracking.enabled and context.ranks.is_main) or (resume_only and not pending):
        yield
        return
    shipper = Shipper(config, context)
    shipper.start()
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        shipper.finish(status)


class Shipper:
    """A thread that reads `metrics.jsonl` and writes to MLflow."""

    def __init__(self, config: RunConfig, context: StageContext) -> None:
        self._settings: TrackingSettings = config.tracking
        self._context = context
        self._params = flatten(to_plain(config))
        self._recipe = config.recipe
        self._uri = config.tracking.uri or f"sqlite:///{context.run_dir.resolve()}/mlflow.db"
        self._label = folder_name(context.entry)
        self._notes = _Notes(context.run_dir)
        self._offset = 0
        self._status: str | None = None
        self._warned = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._client: Any = None
        self._runs: dict[str, str] = {}
        self._shipped: dict[str, int] = {}

    def start(self) -> None:
        """Begin shipping."""
        self._thread.start()

    def finish(self, status: str) -> None:
        """Send the rest and close the run, for at most `tracking.flush_s` seconds."""
        self._status = status
        self._wake.set()
        self._thread.join(self._settings.flush_s)
        if self._thread.is_alive() or not self._is_complete():
            self._context.say(
                f"{self._context.entry}: MLflow at {self._uri} did not take all metrics in "
                f"{self._settings.flush_s:.0f} s; they are in {self._context.metrics.path} and are "
                "sent when the same command is given again"
            )

    def _is_complete(self) -> bool:
        return bool(self._notes.read(self._label).get("complete"))

    def _work(self) -> None:
        deadline = math.inf
        while True:
            ending = self._status is not None
            if ending:
                deadline = min(deadline, time.monotonic() + self._settings.flush_s)
            try:
                if self._client is None:
                    self._connect()
                self._ship()
                if ending:
                    self._close()
                    return
            except Exception as error:  # noqa: BLE001 - tracking must never stop a run
                self._warn(error)
                self._client = None  # the next try asks the server anew how far it is
            if time.monotonic() >= deadline:
                return
            if ending:
                time.sleep(min(1.0, self._settings.interval_s))
            else:
                self._wake.wait(self._settings.interval_s)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            line = " ".join(str(error).split())[:200]
            self._context.say(
                f"MLflow at {self._uri} is not reachable ({line}); metrics stay in "
                f"{self._context.metrics.path} and are sent later"
            )

    def _connect(self) -> None:
        """Open or find the parent and the stage's run, and ask how far they are."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(self._settings.timeout_s))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel(logging.ERROR)
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=self._uri)
        experiment = client.get_experiment_by_name(self._settings.experiment)
        experiment_id = (
            experiment.experiment_id
            if experiment is not None
            else client.create_experiment(self._settings.experiment)
        )
        name = self._settings.run_name or f"{self._recipe} {self._context.run_dir.resolve().name}"
        parent = self._open_run(client, experiment_id, _PARENT, name, {})
        child_tags = {"mlflow.parentRunId": parent, "stage": self._context.entry}
        child = self._open_run(client, experiment_id, self._label, self._label, child_tags)
        self._runs = {"parent": parent, "child": child}
        for kind, key in (("child", LOGGED_STEP), ("parent", f"{self._label}/{LOGGED_STEP}")):
            history = client.get_metric_history(self._runs[kind], key)
            self._shipped[kind] = max((point.step for point in history), default=-1)
        self._offset = 0
        self._log_params(client, child)
        self._note_complete(False)
        self._client = client

    def _open_run(
        self, client: Any, experiment_id: str, place: str, name: str, tags: Mapping[str, str]
    ) -> str:
        """The run noted for `place`, or a new one whose key is noted before it is made."""
        note = self._notes.read(place)
        if note.get("uri") != self._uri:
            note = {"uri": self._uri, "key": uuid.uuid4().hex}
            self._notes.write(place, note)
        if "run_id" not in note:
            # A kill may have come between making the run and noting its id: look for the key.
            found = client.search_runs([experiment_id], f"tags.`allmem.key` = '{note['key']}'")
            about = {
                **tags,
                "allmem.key": note["key"],
                "mlflow.source.git.commit": self._context.commit.rstrip("+"),
                "commit": self._context.commit,
                "recipe": self._recipe,
            }
            run = found[0] if found else client.create_run(experiment_id, run_name=name, tags=about)
            note["run_id"] = run.info.run_id
            self._notes.write(place, note)
        run_id = str(note["run_id"])
        client.update_run(run_id, status="RUNNING")
        return run_id

    def _log_params(self, client: Any, run_id: str) -> None:
        """Parameters that the run does not have; MLflow refuses to change one."""
        from mlflow.entities import Param

        present = client.get_run(run_id).data.params
        new = [
            Param(metric_name(key), json.dumps(value)[:_MAX_PARAM])
            for key, value in self._params.items()
            if metric_name(key) not in present
        ]
        for start in range(0, len(new), 100):
            client.log_batch(run_id, params=new[start : start + 100])

    def _ship(self) -> None:
        """Send all new lines: the child's metrics, and the headlines to the parent."""
        lines = list(read_lines(self._context.metrics.path, self._offset))
        if not lines:
            return
        child, parent = [], []
        for _, line in lines:
            child.append((int(line["step"]), {LOGGED_STEP: line["step"], **line}))
            headlines = {key: line[key] for key in HEADLINES if key in line}
            headlines[LOGGED_STEP] = line["step"]
            named = {f"{self._label}/{key}": value for key, value in headlines.items()}
            parent.append((int(line["step"]), named))
        self._send("child", child)
        self._send("parent", parent)
        self._offset = lines[-1][0]

    def _send(self, kind: str, lines: list[tuple[int, dict[str, Any]]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch: list[Any] = []
        last = self._shipped[kind]
        for step, values in lines:
            if step <= last:
                continue
            metrics = [
                Metric(metric_name(key), float(value), now, step)
                for key, value in values.items()
                if key != "step" and isinstance(value, int | float) and math.isfinite(value)
            ]
            if len(batch) + len(metrics) > _BATCH:
                self._client.log_batch(self._runs[kind], metrics=batch)
                self._shipped[kind] = last
                batch = []
            batch.extend(metrics)
            last = step
        if batch:
            self._client.log_batch(self._runs[kind], metrics=batch)
            self._shipped[kind] = last

    def _close(self) -> None:
        status = self._status or "FINISHED"
        for run_id in self._runs.values():
            self._client.set_terminated(run_id, status)
        self._note_complete(True)

    def _note_complete(self, complete: bool) -> None:
        """Note beside the run id whether the server has every line."""
        self._notes.write(self._label, {**self._notes.read(self._label), "complete": complete})


class _Notes:
    """`tracking.json` in run.dir: server, run id and key of the parent and of each stage."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "tracking.json"

    def read(self, place: str) -> dict[str, Any]:
        """What is noted for a stage's label or for the parent."""
        return dict(self._all().get(place, {}))

    def write(self, place: str, note: Mapping[str, Any]) -> None:
        """Note it, atomically."""
        write_json(self._path, {**self._all(), place: dict(note)})

    def _all(self) -> dict[str, Any]:
        if not self._path.is_file():
            return {}
        notes: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
        return notes
