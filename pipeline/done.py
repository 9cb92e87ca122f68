"""`DONE.json`: a stage is complete while its configuration and what it was made from are the same.

A stage is made from the base model's files, from checkpoints of stages before it and, for
`evaluate`, from the shards and the local data of tasks. Their SHA-256 stands in the mark. Where a
file has changed since, `evaluate` and `export` are done again; a training stage and `collect` are
refused, because weights and responses are not thrown away without being asked. Files of the same
size and date are not read again.

`prepare` is complete only while its shards are there, made by the tokenizer of today; asked for by
name (`stage=prepare`), every shard is read and compared, and a damaged one is written again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.prepare import what_is_missing
from data_prep.shards import MANIFEST_NAME, file_sha256
from pipeline.atomic import remove, write_json
from pipeline.checkpoint import latest_checkpoint, model_files, refuse_other_config
from pipeline.collecting.responses import has_responses, shards_of_responses
from pipeline.config import flatten, resolve_path
from pipeline.context import DONE_FILE, StageContext, is_finished
from pipeline.evaluating.data_files import data_files
from pipeline.evaluation import find_weights
from pipeline.fingerprint import digest
from pipeline.held_out import documents_dir
from pipeline.lineage import data_entry, lineage
from pipeline.retention import chosen_checkpoint
from pipeline.schema import TRAINING_STAGES, RunConfig
from pipeline.tokenizer import check_tokenizer, open_tokenizer

KEPT = (*TRAINING_STAGES, "collect")
"""Stages whose results are not thrown away where they no longer fit."""

INPUTS_FILE = "inputs.json"
"""What an unfinished training stage or `collect` is made from, in its folder."""

Inputs = dict[str, dict[str, Any]]
"""`size`, `mtime_ns` and `sha256` of each file, by its name in run.dir or under `model.path`."""


def is_done(config: RunConfig, context: StageContext) -> bool:
    """Whether the stage is complete with this configuration and with what is there to start from.

    A mark of `prepare`, `evaluate` or `export` that no longer holds is deleted.

    Raises:
        ValueError: a training stage is complete with another configuration, or was trained from
            weights that have changed; the shards were made by another tokenizer.
    """
    done = context.dir / DONE_FILE
    if not done.is_file():
        return False
    mark = json.loads(done.read_text(encoding="utf-8"))
    if mark.get("hash") != digest(dict(context.fingerprint)):
        if context.name in KEPT:
            refuse_other_config(context.dir, mark["config"], context.fingerprint)
        done.unlink()
        return False
    missing = _missing_shard(config, context) if context.name in ("prepare", "collect") else None
    changed = None
    if context.name != "prepare":
        changed = _difference(mark.get("inputs"), inputs_of(config, context), context)
    if changed is not None and context.name in KEPT:
        raise _stale(context, changed)
    changed = changed or missing
    if changed is None:
        return True
    context.say(f"{context.entry}: again, because {changed}")
    done.unlink()
    return False


def _missing_shard(config: RunConfig, context: StageContext) -> str | None:
    own = context.name == "prepare"
    return what_is_missing(
        config.data if own else shards_of_responses(config, context.dir),
        context.dir,
        tokenizer=open_tokenizer(config),
        verify=config.stage.name == context.entry,
    )


def start(config: RunConfig, context: StageContext) -> Inputs:
    """What the stage is about to be made from; a training stage goes on only from the same.

    Raises:
        ValueError: the stage has checkpoints that were trained from other weights, or the shards
            were made by another tokenizer than the run's, or with other settings of `data`.
    """
    if context.name in (*KEPT, "export"):
        check_tokenizer(config, _shards(config, context))
    if context.name in (*TRAINING_STAGES, "evaluate"):
        _check_data(config, context)
    inputs = inputs_of(config, context)
    if context.name not in ("prepare", "evaluate"):
        for entry in lineage(config, branch=context.branch, before=context.entry):
            if not is_finished(context.run_dir, entry):
                context.say(f"{context.entry}: starts from {entry}, which is not finished")
    if context.name not in KEPT:
        return inputs
    path = context.dir / INPUTS_FILE
    if path.is_file() and _has_begun(context):
        changed = _difference(json.loads(path.read_text(encoding="utf-8")), inputs, context)
        if changed is not None:
            raise _stale(context, changed)
    write_json(path, inputs)
    return inputs


def _check_data(config: RunConfig, context: StageContext) -> None:
    """Refuse the run's own shards where `prepare` made them with other settings of `data`.

    Shards without a mark, such as a program beside this one makes, are taken as they are.
    """
    mark = context.run_dir / "prepare" / DONE_FILE
    if not mark.is_file() or _shards(config, context) != mark.parent:
        return
    made = json.loads(mark.read_text(encoding="utf-8"))["config"]
    current = flatten({"data": config.data.contents()})
    stored = {key: value for key, value in made.items() if key.startswith("data.")}
    refuse_other_config(mark.parent, stored, current)


def _has_begun(context: StageContext) -> bool:
    """Whether there is work of the stage on the disk."""
    if context.name == "collect":
        return has_responses(context.dir)
    return latest_checkpoint(context.dir / "checkpoints") is not None


def mark_done(context: StageContext, inputs: Inputs, *, seconds: float) -> None:
    """Write `DONE.json`."""
    mark = {
        "stage": context.entry,
        "hash": digest(dict(context.fingerprint)),
        "config": dict(context.fingerprint),
        "inputs": inputs,
        "commit": context.commit,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(seconds, 1),
    }
    write_json(context.dir / DONE_FILE, mark)
    remove(context.dir / INPUTS_FILE)  # the mark holds it now


def inputs_of(config: RunConfig, context: StageContext) -> Inputs:
    """Size, date and SHA-256 of all files that the stage would be made from now."""
    known = _known(context.run_dir)
    inputs: Inputs = {}
    for name, path in _files(config, context).items():
        status = path.stat()
        found = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
        digests = [k["sha256"] for k in known.get(name, []) if found.items() <= k.items()]
        inputs[name] = {**found, "sha256": digests[0] if digests else file_sha256(path)}
    return inputs


def _shards(config: RunConfig, context: StageContext) -> Path:
    if context.name == "evaluate" and config.eval.kinds:
        return documents_dir(config.eval, context.data_dir)
    return context.data_dir


def _files(config: RunConfig, context: StageContext) -> dict[str, Path]:
    if context.name == "prepare":
        return {}
    run_dir = context.run_dir
    if context.name == "evaluate":
        branches = [find_weights(config, run_dir, b) for b in ("none", "allmem", "mamba2")]
        names = [name for weights in branches for name in weights.checkpoints]
    else:
        entries = lineage(config, branch=context.branch, before=context.entry)
        found = [chosen_checkpoint(config, run_dir, entry) for entry in entries]
        names = [str(path.relative_to(run_dir)) for path in found if path is not None]
    weights = [file for name in names for file in model_files(run_dir / name)]
    files = {str(file.relative_to(run_dir)): file for file in weights}
    if context.name == "evaluate":
        files[f"prepare/{MANIFEST_NAME}"] = _shards(config, context) / MANIFEST_NAME
        files.update(data_files(config.eval))
    if data_entry(context.entry) != "prepare":
        files[f"{context.data_dir.name}/{MANIFEST_NAME}"] = context.data_dir / MANIFEST_NAME
    if config.model.path is not None:
        path = resolve_path(config.model.path)
        base = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        files.update({f"model.path/{file.name}": file for file in base})
    return {name: file for name, file in files.items() if file.is_file()}


def _known(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """What other stages of the run have noted of each file."""
    known: dict[str, list[dict[str, Any]]] = {}
    for path in [*run_dir.glob(f"*/{DONE_FILE}"), *run_dir.glob(f"*/{INPUTS_FILE}")]:
        noted = json.loads(path.read_text(encoding="utf-8"))
        for name, values in noted.get("inputs", {} if path.name == DONE_FILE else noted).items():
            known.setdefault(name, []).append(values)
    return known


def _difference(before: Mapping[str, Any] | None, now: Inputs, context: StageContext) -> str | None:
    """The first file that differs, in words; None where all are the same."""
    if before is None:  # a mark of a program that noted nothing
        return None if context.name not in ("evaluate", "export") else "its inputs were not noted"
    for name in sorted({*before, *now}):
        if name not in before:
            return f"{name} was not there"
        if name not in now:
            return f"{name} is gone"
        if before[name]["sha256"] != now[name]["sha256"]:
            return f"{name} has changed"
    return None


def _stale(context: StageContext, changed: str) -> ValueError:
    past, again = ("made", "make") if context.name == "collect" else ("trained", "train")
    return ValueError(
        f"{context.dir} was {past} from other weights ({changed} since); delete that folder to "
        f"{again} it again, or take another run.dir"
    )
