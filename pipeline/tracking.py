"""The only place that imports MLflow: ships what a run's folder holds, and never stops a run.

A thread on rank 0 reads the stage's `metrics.jsonl` and sends its lines in batches. The file is the
queue: what a dead server did not take is sent later, by this process or by the next one. How far
the server is, is asked of the server (metric `logged_step`), and every point has the time
of its line, so that one that is sent twice, because a hung server took it after all, is one.

One parent run a run.dir, one child run a stage, one run under `evaluate` for each mixer. The
headline metrics also stand in the parent, because children are folded away in charts.

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
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.shards import MANIFEST_NAME
from pipeline.artifacts import Artifact, read_artifacts
from pipeline.config import flatten, to_plain
from pipeline.context import StageContext
from pipeline.metrics_log import read_lines
from pipeline.schema import TRAINING_STAGES, RunConfig
from pipeline.survival import StopRequested
from pipeline.tracking_evaluation import Point
from pipeline.tracking_names import (
    LOGGED_SAMPLE,
    LOGGED_STEP,
    child_values,
    metric_name,
    parent_name,
    parent_values,
)
from pipeline.tracking_notes import PARENT, Notes, Tracked, stamp_of
from pipeline.tracking_registry import export_files, profile, register
from pipeline.tracking_results import send_evaluation
from pipeline.tracking_system import SystemSampler
from pipeline.tracking_thread import Shipper

MANIFEST_TAG = "data.manifest_sha256"
"""Tag with the SHA-256 of the shards' manifest: runs with the same one saw the same data."""

ARTIFACTS_FOLDER = "mlartifacts"
"""Folder for artifacts, beside the sqlite file; a server has its own place."""

_BATCH = 1000
_MAX_PARAM = 6000


@contextlib.contextmanager
def track(config: RunConfig, context: StageContext, *, resume_only: bool = False) -> Iterator[None]:
    """Ship the stage's metrics and files to MLflow while the block runs.

    Args:
        config: gives `tracking` and the parameters to log.
        context: the stage.
        resume_only: only send what an earlier process could not.
    """
    tracked = Tracked(
        entry=context.entry,
        run_dir=context.run_dir,
        data_dir=context.data_dir,
        params=flatten(to_plain(config)),
        recipe=config.recipe,
        commit=context.commit,
        settings=config.tracking,
        notes=Notes(context.run_dir / "tracking.json"),
    )
    wanted = config.tracking.enabled and context.ranks.is_main
    if not wanted or (resume_only and tracked.is_complete):
        yield
        return
    tracked.notes.add(tracked.label, complete=False)
    sampler = None
    if config.tracking.system_every_s and not resume_only:
        sampler = SystemSampler(tracked.system_file, interval_s=config.tracking.system_every_s)
        sampler.start()
    shipper = Shipper(
        lambda: MlflowRecorder(tracked),
        config.tracking,
        uri=tracked.uri,
        say=context.say,
        place=str(context.run_dir),
    )
    shipper.start()
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except (KeyboardInterrupt, StopRequested):
        status = "KILLED"
        raise
    finally:
        if sampler is not None:
            sampler.stop()
            if sampler.error is not None:
                context.say(f"{context.entry}: no more system metrics: {sampler.error}")
        if not shipper.finish(status):
            context.say(
                f"{context.entry}: MLflow at {tracked.uri} did not take everything; "
                "the rest is sent when the same command is given again"
            )


def open_client(uri: str, timeout_s: int) -> Any:
    """MLflow's client, which gives up soon instead of after minutes."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(timeout_s))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    from mlflow.tracking import MlflowClient

    for name in ("alembic", "mlflow"):  # after the import, which sets them to INFO
        logging.getLogger(name).setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=uri)


class MlflowRecorder:
    """The runs of one stage on a server, and how far they are."""

    def __init__(self, tracked: Tracked) -> None:
        """Open or find the parent and the stage's run, and ask how far they are."""
        self.tracked, self.notes = tracked, tracked.notes
        self.client = open_client(tracked.uri, tracked.settings.timeout_s)
        self.experiment_id = self._experiment()
        parent = self.open_run(PARENT, tracked.title, {"kind": "recipe"})
        kind = "training" if tracked.stage in TRAINING_STAGES else tracked.stage
        tags = {"mlflow.parentRunId": parent, "stage": tracked.entry, "kind": kind}
        child = self.open_run(tracked.label, f"{tracked.label} ({tracked.title})", tags)
        self.runs = {"parent": parent, "child": child}
        self._shipped = {
            "child": self._last("child", LOGGED_STEP),
            "parent": self._last("parent", parent_name(LOGGED_STEP, tracked.label)),
            "system": self._last("child", LOGGED_SAMPLE),
        }
        self._offsets = {tracked.metrics_file: 0, tracked.system_file: 0}
        self._log_params()
        self._log_inputs()

    def _experiment(self) -> str:
        name = self.tracked.settings.experiment
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        tags = {"mlflow.experimentKind": "custom_model_development"}  # its pages, not GenAI's
        return str(self.client.create_experiment(name, self._artifact_location(), tags))

    def _artifact_location(self) -> str | None:
        """Beside an sqlite file (MLflow would take the working directory), or the server's own."""
        if not self.tracked.uri.startswith("sqlite:///"):
            return None
        file = Path(self.tracked.uri.removeprefix("sqlite:///")).resolve()
        return (file.parent / ARTIFACTS_FOLDER).as_uri()

    def open_run(self, place: str, name: str, tags: Mapping[str, str]) -> str:
        """The run noted for `place`, or a new one whose key is noted before it is made."""
        note = self.notes.read(place)
        if note.get("uri") != self.tracked.uri:
            note = {"uri": self.tracked.uri, "key": uuid.uuid4().hex}
            self.notes.write(place, note)
        if "run_id" not in note:
            # A kill may have come between making the run and noting its id, and a hung server
            # may make it after all: look for the key.
            found = self._with_key(note["key"])
            about = {
                **tags,
                "allmem.key": note["key"],
                "mlflow.source.git.commit": self.tracked.commit.rstrip("+"),
                "commit": self.tracked.commit,
                "recipe": self.tracked.recipe,
            }
            if found:
                note["run_id"] = found[0]
            else:
                run = self.client.create_run(
                    self.experiment_id, run_name=name, tags=about, start_time=self._begun()
                )
                note["run_id"] = run.info.run_id
            self.notes.write(place, note)
        run_id = str(note["run_id"])
        self.client.update_run(run_id, status="RUNNING")
        return run_id

    def _with_key(self, key: str) -> list[str]:
        found = self.client.search_runs([self.experiment_id], f"tags.`allmem.key` = '{key}'")
        return [run.info.run_id for run in found]

    def _begun(self) -> int | None:
        """When the stage's first line was written (ms); None for now."""
        for _, line in read_lines(self.tracked.metrics_file):
            return int(1000 * line["time"]) if "time" in line else None
        return None

    def _last(self, kind: str, key: str) -> int:
        history = self.client.get_metric_history(self.runs[kind], key)
        return max((point.step for point in history), default=-1)

    def _log_params(self) -> None:
        """Parameters that the runs do not have; MLflow refuses to change one.

        The recipe's run gets those of its first stage, and by the stage's name what differs later.
        """
        from mlflow.entities import Param

        values = {
            metric_name(key): json.dumps(value)[:_MAX_PARAM]
            for key, value in self.tracked.params.items()
        }
        for kind, run_id in self.runs.items():
            present = self.client.get_run(run_id).data.params
            new = {key: value for key, value in values.items() if key not in present}
            if kind == "parent":
                of_stage = {f"{self.tracked.label}: {key}": key for key in values}
                changed = {k: values[v] for k, v in of_stage.items() if values[v] != present.get(v)}
                new |= {k: v for k, v in changed.items() if present and k not in present}
                new = {k: v for k, v in new.items() if not k.partition(": ")[2].startswith("stage")}
            params = [Param(key, value) for key, value in new.items()]
            for start in range(0, len(params), 100):
                self.client.log_batch(run_id, params=params[start : start + 100])

    def _log_inputs(self) -> None:
        """Tell which shards the stage is made from, as a data set and as a tag."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        manifest = self.tracked.data_dir / MANIFEST_NAME
        if not manifest.is_file():
            return
        content = manifest.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        for run_id in self.runs.values():
            self.client.set_tag(run_id, MANIFEST_TAG, digest)
        if self.tracked.stage == "prepare":
            return  # what it makes is no input of it
        dataset = Dataset(
            name=f"{self.tracked.recipe} shards ({self.tracked.data_dir.name})",
            digest=digest[:36],
            source_type="local",
            source=json.dumps({"uri": str(self.tracked.data_dir.resolve())}),
            profile=json.dumps(profile(json.loads(content))),
        )
        use = "evaluation" if self.tracked.stage == "evaluate" else "training"
        given = DatasetInput(dataset, [InputTag("mlflow.data.context", use)])
        self.client.log_inputs(self.runs["child"], datasets=[given])

    def ship(self) -> None:
        """Send all new lines: the child's metrics, the machine's, and headlines to the parent."""
        label, of_evaluation = self.tracked.label, self.tracked.stage == "evaluate"
        lines = self._new_lines(self.tracked.metrics_file)
        child = [(line, child_values(line, of_evaluation=of_evaluation)) for line in lines]
        self._send("child", "child", child)
        self._send("parent", "parent", [(line, parent_values(line, label)) for line in lines])
        samples = self._new_lines(self.tracked.system_file)
        named = [(line, {LOGGED_SAMPLE: line["step"], **line}) for line in samples]
        self._send("system", "child", named)
        for path, found in (
            (self.tracked.metrics_file, lines),
            (self.tracked.system_file, samples),
        ):
            if found:
                self._offsets[path] = found[-1]["offset"]

    def _new_lines(self, path: Path) -> list[dict[str, Any]]:
        found = read_lines(path, self._offsets[path])
        return [{**line, "offset": offset} for offset, line in found]

    def _send(
        self, queue: str, kind: str, lines: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
    ) -> None:
        """Send lines with their values that are past what the server has."""
        from mlflow.entities import Metric

        batch: list[Any] = []
        last = self._shipped[queue]
        for line, values in lines:
            step = int(line["step"])
            if step <= last:
                continue
            when = self._when(line)
            metrics = [
                Metric(metric_name(key), float(value), when, step)
                for key, value in values.items()
                if key not in ("step", "time", "offset")
                and isinstance(value, int | float)
                and math.isfinite(value)
            ]
            if len(batch) + len(metrics) > _BATCH:
                self.client.log_batch(self.runs[kind], metrics=batch)
                self._shipped[queue] = last
                batch = []
            batch.extend(metrics)
            last = step
        if batch:
            self.client.log_batch(self.runs[kind], metrics=batch)
            self._shipped[queue] = last

    def _when(self, line: Mapping[str, Any]) -> int:
        """The line's time (ms), always the same; of old files without times that of the file."""
        if "time" in line:
            return int(1000 * line["time"])
        return int(1000 * self.tracked.metrics_file.stat().st_mtime)

    def ship_files(self) -> None:
        """Send files that the server lacks."""
        for artifact in read_artifacts(self.tracked.run_dir, self.tracked.label):
            self._send_file("child", artifact, artifact.folder)
            if artifact.on_parent:
                self._send_file("parent", artifact, f"{self.tracked.label}/{artifact.folder}")

    def _send_file(self, kind: str, artifact: Artifact, folder: str) -> None:
        folder = folder.rstrip("/")
        place = f"{kind}:{folder}/{artifact.path.name}"
        if not artifact.path.is_file():
            return  # taken away since
        stamp = stamp_of(artifact.path)
        sent = self.notes.read(self.tracked.label).get("artifacts", {})
        if sent.get(place) != stamp:
            self.client.log_artifact(self.runs[kind], str(artifact.path), folder or None)
            self.notes.add(self.tracked.label, artifacts={**sent, place: stamp})

    def close(self, status: str) -> None:
        """Send what a finished stage has, and end the runs."""
        self._log_inputs()
        if status == "FINISHED" and self.tracked.stage == "evaluate":
            send_evaluation(self)
        if status == "FINISHED" and self.tracked.stage == "export":
            self._register()
        for run_id in self.runs.values():
            self.client.set_terminated(run_id, status, self._ended())
        for place in (PARENT, self.tracked.label):
            note = self.notes.read(place)
            for stray in set(self._with_key(note["key"])) - {note["run_id"]}:
                self.client.delete_run(stray)  # made by a request that was thought lost
        self.notes.add(self.tracked.label, complete=True)

    def _ended(self) -> int | None:
        last = None
        for _, line in read_lines(self.tracked.metrics_file):
            last = line
        return None if last is None or "time" not in last else int(1000 * last["time"])

    def send_points(self, run_id: str, points: Sequence[Point], when: int) -> None:
        """Log points to a run, all at one time (ms), so that sending them again adds none."""
        from mlflow.entities import Metric

        metrics = [
            Metric(point.name, point.value, when, point.step)
            for point in points
            if math.isfinite(point.value)
        ]
        for start in range(0, len(metrics), _BATCH):
            self.client.log_batch(run_id, metrics=metrics[start : start + _BATCH])

    def _register(self) -> None:
        """Make the exported folder a version of the recipe's model in the registry."""
        settings = self.tracked.settings
        files = export_files(self.tracked.dir, limit_gb=settings.upload_gb)
        for path in files.uploaded:
            folder = f"model/{path.parent.relative_to(self.tracked.dir)}".removesuffix("/.")
            self._send_file("child", Artifact(path=path), folder)
        register(
            self.client,
            self.runs["child"],
            settings.model_name or f"allmem-{metric_name(self.tracked.recipe)}",
            files,
            tags={"recipe": self.tracked.recipe, "commit": self.tracked.commit},
        )
