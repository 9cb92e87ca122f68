"""The only place that imports MLflow: ships what `metrics.jsonl` holds, and never stops a run.

A thread on rank 0 reads the stage's `metrics.jsonl` and sends its lines in batches. The file is the
queue: what a dead server did not take is sent later, by this process or by the next one. How far
the server is, is asked of the server (metric `logged_step`), so that no step is logged twice, even
after a kill between a shipment and its receipt. One parent run a run.dir, one child run a stage;
the headline metrics also stand in the parent, because children are folded away in charts.

Files that stages give (`artifacts.json`) go the same way, after the metrics. What the server has of
them is noted in `tracking.json` by size and date, and what it lacks is sent again.
"""

from __future__ import annotations

import contextlib
import hashlib
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

from data_prep.shards import MANIFEST_NAME
from pipeline.artifacts import Artifact, read_artifacts
from pipeline.atomic import write_json
from pipeline.config import flatten, to_plain
from pipeline.context import StageContext, folder_name
from pipeline.metrics_log import read_lines
from pipeline.schema import RunConfig, TrackingSettings
from pipeline.survival import StopRequested

LOGGED_STEP = "logged_step"
"""Metric that says up to which step a run is shipped."""

HEADLINES = ("train/loss", "train/grad_norm", "train/lr", "tokens_per_s")
"""Metrics of training that the parent run gets too, under the stage's name."""

EVALUATION_HEADLINES = (
    "/overall/loss_beyond_window",
    "/recall/exact_match_outside_window",
)
"""Ends of the names of an evaluation's metrics, `MIXER/TASK/METRIC`, that the parent gets too."""

MANIFEST_TAG = "data.manifest_sha256"
"""Tag with the SHA-256 of the shards' manifest: runs with the same one saw the same data."""

ARTIFACTS_FOLDER = "mlartifacts"
"""Folder for artifacts, beside the sqlite file; a server has its own place."""

_PARENT = "(recipe)"
_BATCH = 1000
_MAX_PARAM = 6000
_LAST_TRIES = 3
_warned: set[str] = set()  # servers that this process has told the user of


def metric_name(name: str) -> str:
    """A name that MLflow takes: letters, digits and `_-. :/`; `@` becomes `_`."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def is_headline(name: str) -> bool:
    """Whether the parent run gets a metric, too."""
    return name in HEADLINES or name.endswith(EVALUATION_HEADLINES)


@contextlib.contextmanager
def track(config: RunConfig, context: StageContext, *, resume_only: bool = False) -> Iterator[None]:
    """Ship the stage's metrics and files to MLflow while the block runs.

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
    except (KeyboardInterrupt, StopRequested):
        status = "KILLED"
        raise
    finally:
        shipper.finish(status)


class Shipper:
    """A thread that reads `metrics.jsonl` and `artifacts.json` and writes to MLflow."""

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
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._client: Any = None
        self._runs: dict[str, str] = {}
        self._shipped: dict[str, int] = {}
        self._answered = False
        self._artifacts_failed = False

    def start(self) -> None:
        """Begin shipping."""
        self._note_complete(False)
        self._thread.start()

    def finish(self, status: str) -> None:
        """Send the rest and close the run, for at most `tracking.flush_s` seconds.

        A server that has not answered while the stage ran is asked once more, not longer.
        """
        self._status = status
        self._wake.set()
        self._thread.join(self._settings.flush_s)
        if self._thread.is_alive() or not self._is_complete():
            self._context.say(
                f"{self._context.entry}: MLflow at {self._uri} did not take everything; "
                "the rest is sent when the same command is given again"
            )

    def _is_complete(self) -> bool:
        return bool(self._notes.read(self._label).get("complete"))

    def _work(self) -> None:
        deadline, tries = math.inf, 0
        while True:
            ending = self._status is not None
            if ending:
                deadline = min(deadline, time.monotonic() + self._settings.flush_s)
            try:
                if self._client is None:
                    self._connect()
                self._answered = True
                self._ship()
                self._ship_artifacts(ending)
                if ending:
                    self._close()
                    return
            except Exception as error:  # noqa: BLE001 - tracking must never stop a run
                self._warn(error)
                self._client = None  # the next try asks the server anew how far it is
            tries += ending
            enough = _LAST_TRIES if self._answered else 1
            if time.monotonic() >= deadline or tries >= enough:
                return
            if ending:
                time.sleep(min(1.0, self._settings.interval_s))
            else:
                self._wake.wait(self._settings.interval_s)

    def _warn(self, error: Exception) -> None:
        if self._uri not in _warned:
            _warned.add(self._uri)
            line = " ".join(str(error).split())
            self._context.say(
                f"MLflow at {self._uri} does not take what it is sent "
                f"({line[:120]}{'…' if len(line) > 120 else ''}); it stays in "
                f"{self._context.run_dir} and is sent later"
            )

    def _connect(self) -> None:
        """Open or find the parent and the stage's run, and ask how far they are."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(self._settings.timeout_s))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
        from mlflow.tracking import MlflowClient

        for name in ("alembic", "mlflow"):  # after the import, which sets them to INFO
            logging.getLogger(name).setLevel(logging.ERROR)
        client = MlflowClient(tracking_uri=self._uri)
        experiment = client.get_experiment_by_name(self._settings.experiment)
        experiment_id = (
            experiment.experiment_id
            if experiment is not None
            else client.create_experiment(self._settings.experiment, self._artifact_location())
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
        self._client = client

    def _artifact_location(self) -> str | None:
        """Beside an sqlite file (MLflow would take the working directory), or the server's own."""
        if not self._uri.startswith("sqlite:///"):
            return None
        file = Path(self._uri.removeprefix("sqlite:///")).resolve()
        return (file.parent / ARTIFACTS_FOLDER).as_uri()

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
            headlines = {key: value for key, value in line.items() if is_headline(key)}
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

    def _ship_artifacts(self, ending: bool) -> None:
        """Send files that the server lacks; after a failure not before the stage's end."""
        if self._artifacts_failed and not ending:
            return
        self._artifacts_failed = True
        for artifact in read_artifacts(self._context.run_dir, self._label):
            self._send_artifact("child", artifact, artifact.folder)
            if artifact.on_parent:
                self._send_artifact("parent", artifact, f"{self._label}/{artifact.folder}")
        self._artifacts_failed = False

    def _send_artifact(self, kind: str, artifact: Artifact, folder: str) -> None:
        folder = folder.rstrip("/")
        place = f"{kind}:{folder}/{artifact.path.name}"
        if not artifact.path.is_file():
            return  # taken away since
        status = artifact.path.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        note = self._notes.read(self._label)
        sent = note.get("artifacts", {})
        if sent.get(place) != stamp:
            self._client.log_artifact(self._runs[kind], str(artifact.path), folder or None)
            self._notes.write(self._label, {**note, "artifacts": {**sent, place: stamp}})

    def _tag_data(self) -> None:
        """Tell which shards the stage has seen."""
        manifest = self._context.data_dir / MANIFEST_NAME
        if manifest.is_file():
            digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
            for run_id in self._runs.values():
                self._client.set_tag(run_id, MANIFEST_TAG, digest)

    def _close(self) -> None:
        self._tag_data()
        status = self._status or "FINISHED"
        for run_id in self._runs.values():
            self._client.set_terminated(run_id, status)
        self._note_complete(True)

    def _note_complete(self, complete: bool) -> None:
        """Note beside the run id whether the server has every line and file."""
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
