"""What decides a stage's result, as a flat dictionary and its hash.

A stage that is done is skipped while its fingerprint is the same, and a checkpoint of another
fingerprint is refused. What changes nothing but speed, place or logs is left out, so that a run may
go on with another number of ranks, other micro-batches or another tracking server.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from pipeline.collecting.settings import FREE_KEYS
from pipeline.config import flatten, split_entry, to_plain
from pipeline.lineage import branch_of, data_entry, lineage
from pipeline.schema import TRAINING_STAGES, RunConfig, section_of

_FREE = frozenset(
    (
        "micro_batch_size",
        "checkpoint_every",
        "keep_last",
        "keep_best",
        "eval_every",
        "eval_batches",
        "log_every",
        "logits_elements",
        "save_to",
    )
)
"""Keys of a training section that do not decide its result."""


def fingerprint(
    config: RunConfig, entry: str, *, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Flat `{key: value}` of all that decides the result of a stage entry.

    Args:
        config: the run's configuration.
        entry: the stage, `convert` or `convert@mamba2`.
        dtype: what `parallel.dtype` comes to (`pipeline.models.choose_dtype`), because `auto` is
            not the same everywhere.
        device: where the stage computes; counts for `evaluate` alone, which measures speed.
    """
    name, _ = split_entry(entry)
    branch = branch_of(config, entry)
    plain = to_plain(config)
    chosen: dict[str, Any] = {"data": config.data.contents(), "model": plain["model"]}
    if name == "prepare":
        return flatten(chosen)
    chosen["run"] = {"seed": config.run.seed}
    chosen["parallel"] = {"dtype": str(dtype).removeprefix("torch.")}
    if name != "pretrain":
        chosen["mixer"] = {**plain["mixer"], "branch": branch}
    if name in TRAINING_STAGES and name != "pretrain":
        chosen["mixer"] = {key: chosen["mixer"][key] for key in ("branch", "memory")}
    chosen["optim"] = plain["optim"]
    if name in (*TRAINING_STAGES, "collect"):
        entries = [*lineage(config, branch=branch, before=entry), entry]
        if name == "pretrain":
            entries = [entry]
    else:
        entries = [e for e in config.stages if split_entry(e)[0] in TRAINING_STAGES]
        chosen["stages"] = list(config.stages)
        if name == "evaluate":
            chosen["eval"] = plain["eval"]
            chosen["parallel"]["device"] = device.type
    for section in {section_of(other) for other in entries}:
        values = plain[section]
        chosen[section] = {key: value for key, value in values.items() if key not in _FREE}
    if name == "collect" or any(data_entry(other) != "prepare" for other in entries):
        values = plain["collect"]
        chosen["collect"] = {key: value for key, value in values.items() if key not in FREE_KEYS}
    return flatten(chosen)


def digest(flat: dict[str, Any]) -> str:
    """SHA-256 of a fingerprint."""
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()
