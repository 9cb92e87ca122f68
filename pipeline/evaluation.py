"""What is evaluated: mixers and controls, the weights they run with, and their results so far.

A subject is one row of the table: a mixer or a control, on the model of one branch. Finished
subjects are kept in `evaluate/partial/NAME.json` under a key made of everything that decides their
numbers, so that a killed evaluation goes on with the next one, and a changed setting, checkpoint,
commit, dtype or device measures anew. Rows are kept only under a commit that names the whole
program: with changed files (`+` behind it) or outside a repository (`unknown`) all are measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from allmem_megatron.config import BaseModelConfig, MixerSettings
from data_prep.shards import file_sha256
from evals.config import EvalConfig
from evals.records import DocumentRecord
from pipeline.atomic import write_json
from pipeline.checkpoint import model_files
from pipeline.config import resolve_path, split_entry
from pipeline.context import StageContext, is_finished
from pipeline.costs import MixerShape, cache_bytes, flops_ratio
from pipeline.lineage import lineage
from pipeline.retention import chosen_checkpoint
from pipeline.schema import RunConfig

CONTROL_SETTINGS: dict[str, dict[str, Any]] = {
    "memory_off": {"memory_off": True},
    "write_off": {"write_off": True},
    "state_shuffled": {"shuffle_state": True},
}
BRANCH_OF = {"full": "none", "swa": "none", "mamba2": "mamba2", "allmem": "allmem"}
"""The branch whose weights a mixer needs."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Where a branch's weights come from, or why there are none."""

    branch: str
    """`none` (the base model alone), `allmem` or `mamba2`."""
    before: str | None
    """The first entry of the recipe that is left out; None where all of them count."""
    entries: tuple[str, ...] = ()
    """Training entries whose checkpoints are laid over the base, in order."""
    checkpoints: tuple[str, ...] = ()
    """Their folders, relative to run.dir."""
    missing: str | None = None
    """Why the branch has no trained weights; None where it has."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One row of the table."""

    name: str
    """A mixer's or a control's name."""
    mixer: str
    """`full`, `swa`, `mamba2` or `allmem`."""
    settings: MixerSettings
    """What every layer computes."""
    is_control: bool = False


@dataclass(kw_only=True)
class Measured:
    """What is known of a subject."""

    records: list[DocumentRecord]
    memory: dict[str, float] = field(default_factory=dict)
    """`memory_statistics` of the model, after its last document."""


def find_weights(config: RunConfig, run_dir: Path, branch: str) -> Weights:
    """The newest weights of a branch that a finished stage of the run left.

    Only `convert` and `sft` make a mixer worth a row; a branch that has just been aligned counts
    as not trained, and so does every branch of a base whose `pretrain` is not finished.
    """
    entries = lineage(config, branch=branch)
    reached: list[tuple[str, Path]] = []
    before = None
    for entry in entries:
        path = chosen_checkpoint(config, run_dir, entry)
        if path is None or not is_finished(run_dir, entry):
            before = entry
            break
        reached.append((entry, path))
    started = before is not None and path is not None
    trained = [entry for entry, _ in reached if split_entry(entry)[0] in ("convert", "sft")]
    missing = None
    own = [entry for entry in entries if split_entry(entry)[0] in ("convert", "sft")]
    if branch != "none" and not own:
        missing = f"the recipe {config.recipe} has no stage that trains {branch}"
    elif before == "pretrain" or (branch != "none" and not trained):
        missing = f"stage {before or own[0]} " + (
            f"is not finished ({path.name if path else ''})"
            if started
            else "has no checkpoint in the run's folder"
        )
    return Weights(
        branch=branch,
        before=before,
        entries=tuple(entry for entry, _ in reached),
        checkpoints=tuple(str(path.relative_to(run_dir)) for _, path in reached),
        missing=missing,
    )


def subjects_of(settings: EvalConfig) -> list[Subject]:
    """The mixers, then the controls if `allmem` is among them."""
    found = []
    for mixer in settings.mixers:
        mode = MixerSettings(
            mode=mixer,
            window_size=settings.window_size,
            num_sinks=settings.num_sinks,
            chunk_size=settings.chunk_size,
        )
        found.append(Subject(name=mixer, mixer=mixer, settings=mode))
    for subject in found:
        if subject.mixer == "allmem":
            return found + [
                Subject(
                    name=name,
                    mixer="allmem",
                    settings=replace(subject.settings, **CONTROL_SETTINGS[name]),
                    is_control=True,
                )
                for name in settings.controls
            ]
    return found


def mixer_shape(config: RunConfig, base: BaseModelConfig) -> MixerShape:
    """Sizes for the cost formulas."""
    memory = config.mixer.memory
    return MixerShape.of(
        base,
        memory_size=memory.memory_size,
        memory_heads=memory.num_heads,
        expansion=memory.expansion,
        conv_kernel=memory.conv_kernel,
        state_size=memory.state_size,
        window_size=config.eval.window_size,
        num_sinks=config.eval.num_sinks,
        chunk_size=config.eval.chunk_size,
    )


def cost_metrics(
    mixer: str, shape: MixerShape, settings: EvalConfig, length: int
) -> dict[str, Any]:
    """The tasks `cache` (bytes of one sequence) and `flops` (token mixers against full attention).

    Args:
        mixer: the mixer that is counted.
        shape: sizes of the layers.
        settings: the long length and the bytes of a cached element.
        length: tokens of the evaluated documents.
    """
    size = settings.cache_element_bytes
    long = settings.long_context
    return {
        "cache": {
            "bytes_at_length": cache_bytes(mixer, shape, length, element_bytes=size),
            "bytes_at_long_context": cache_bytes(mixer, shape, long, element_bytes=size),
        },
        "flops": {
            "mixer_ratio_to_full_at_length": flops_ratio(mixer, shape, length),
            "mixer_ratio_to_full_at_long_context": flops_ratio(mixer, shape, long),
        },
    }


def memory_metrics(statistics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """`memory_statistics` as the tasks `alpha_by_layer` (mean |alpha|) and `memory` (the means)."""
    prefix = "alpha_abs/layer_"
    if not statistics:
        return {}
    return {
        "alpha_by_layer": {
            str(int(name.removeprefix(prefix))): value
            for name, value in sorted(statistics.items())
            if name.startswith(prefix)
        },
        "memory": {
            name.replace("/", "_"): value
            for name, value in statistics.items()
            if "/layer_" not in name
        },
    }


class PartialResults:
    """Finished subjects on disk, each under the key of what decides its numbers."""

    def __init__(self, folder: Path) -> None:
        """Args: folder: `evaluate/partial`."""
        self.folder = folder

    def load(self, name: str, key: str) -> dict[str, Any] | None:
        """A finished subject's value, or None if there is none under this key.

        Raises:
            ValueError: the file is not one that this class writes.
        """
        path = self.folder / f"{name}.json"
        if not path.is_file():
            return None
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            return stored["value"] if stored["key"] == key else None
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read ({error}); delete it") from error

    def save(self, name: str, key: str, value: Any) -> None:
        """Keep a finished subject; replaces one of another key."""
        write_json(self.folder / f"{name}.json", {"key": key, "value": value})


def to_partial(measured: Measured) -> dict[str, Any]:
    """Plain values of a finished subject."""
    return {
        "records": [record.to_json() for record in measured.records],
        "memory": measured.memory,
    }


def from_partial(value: Mapping[str, Any]) -> Measured:
    """The inverse of `to_partial`."""
    return Measured(
        records=[DocumentRecord.from_json(record) for record in value["records"]],
        memory=dict(value["memory"]),
    )


def key_of(*parts: Any) -> str:
    """SHA-256 of plain values."""
    text = json.dumps(parts, sort_keys=True, default=asdict)
    return hashlib.sha256(text.encode()).hexdigest()


def weights_identity(config: RunConfig, context: StageContext, weights: Weights) -> list[Any]:
    """What tells one set of weights from another: contents of checkpoints, dates of base files."""
    checkpoints = [
        (name, file_sha256(file))
        for name in weights.checkpoints
        for file in model_files(context.run_dir / name)
    ]
    base: list[Any] = []
    if config.model.path is not None:
        path = resolve_path(config.model.path)
        files: Sequence[Path] = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        for file in files:
            status = file.stat()
            base.append((file.name, status.st_size, status.st_mtime_ns))
    return [weights.branch, checkpoints, base]
