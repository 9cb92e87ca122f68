"""The exported model in MLflow's registry, and the shards' counts for its data sets."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_OWN = ("metrics.jsonl", "DONE.json")
_WEIGHTS = (".safetensors", ".gguf", ".bin")
_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class ExportFiles:
    """An exported folder: what is uploaded, and what identifies the weights."""

    folder: Path
    uploaded: Sequence[Path]
    """All files, or all but the weights where they are too large."""
    has_weights: bool
    """Whether the weights are among them."""
    digest: str
    """SHA-256 over names and contents of the files of weights."""


def export_files(folder: Path, *, limit_gb: float) -> ExportFiles:
    """Choose what of an exported folder goes to the server.

    Args:
        folder: the Hugging Face folder.
        limit_gb: size up to which the weights are uploaded.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in _OWN)
    weights = [path for path in files if path.suffix in _WEIGHTS]
    digest = hashlib.sha256()
    for path in weights:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    fits = sum(path.stat().st_size for path in files) <= limit_gb * _GB
    return ExportFiles(
        folder=folder,
        uploaded=files if fits else [path for path in files if path not in weights],
        has_weights=fits,
        digest=digest.hexdigest(),
    )


def register(
    client: Any, run_id: str, name: str, files: ExportFiles, *, tags: Mapping[str, str]
) -> None:
    """Make a version of `name` of a run's artifacts `model/`; the same weights make no second one.

    Args:
        client: MLflow's.
        run_id: the export's run.
        name: of the registered model; it is made if it is not there.
        files: what was uploaded.
        tags: of the version.
    """
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(
            name, description="Exported by AllMem; loads with trust_remote_code=True."
        )
    versions = client.search_model_versions(f"run_id = '{run_id}'")
    if any(v.name == name and v.tags.get("weights_sha256") == files.digest for v in versions):
        return
    where = str(files.folder.resolve())
    client.create_model_version(
        name,
        f"{client.get_run(run_id).info.artifact_uri}/model",
        run_id,
        tags={
            **tags,
            "weights_sha256": files.digest,
            "folder": where,
            "weights": "uploaded" if files.has_weights else f"too large to upload; see {where}",
        },
    )


def profile(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Samples and tokens of each split of a shards' manifest."""
    counts: dict[str, int] = {}
    for split, shards in manifest.get("splits", {}).items():
        for kind in ("samples", "tokens"):
            counts[f"{split}_{kind}"] = sum(shard[f"num_{kind}"] for shard in shards)
    return counts
