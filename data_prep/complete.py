"""Whether a place holds all shards of a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.config import PrepareConfig
from data_prep.shards import MANIFEST_NAME, Manifest
from data_prep.storage import is_remote, shards_of
from data_prep.tokenize import TokenizerLike
from data_prep.tokenizer import tokenizer_hash


def what_is_missing(
    config: PrepareConfig,
    out_dir: str | Path,
    *,
    tokenizer: TokenizerLike,
    verify: bool = False,
) -> str | None:
    """Why `prepare_shards` would have to write, in words; None where all is complete.

    Args:
        config: what was to be prepared.
        out_dir: folder of the manifest.
        tokenizer: the fast tokenizer that the shards must be made by.
        verify: compare each shard's SHA-256 too, which reads it all; otherwise only its size.

    Raises:
        ValueError: out_dir holds shards of another configuration or tokenizer.
    """
    return find_missing(config, Path(out_dir), identity_of(config, tokenizer), verify=verify)


def identity_of(config: PrepareConfig, tokenizer: TokenizerLike) -> dict[str, Any]:
    """What must be the same for shards to be the same, but for the text."""
    return {
        "config_hash": config.fingerprint(),
        "tokenizer_hash": tokenizer_hash(tokenizer),
    }


def find_missing(
    config: PrepareConfig, out_path: Path, identity: dict[str, Any], *, verify: bool
) -> str | None:
    """As `what_is_missing`, with the identity at hand."""
    if not (out_path / MANIFEST_NAME).is_file():
        return f"{MANIFEST_NAME} is missing"
    manifest = Manifest.load(out_path)
    if {name: getattr(manifest, name) for name in identity} != identity:
        raise other_configuration(str(out_path))
    if manifest.root != root_of(config):
        return f"the shards are in {manifest.root or out_path}, not in data.dir={config.dir}"
    storage = shards_of(manifest, out_path)
    for record in (record for records in manifest.splits.values() for record in records):
        size = storage.size(record.path)
        if size is None:
            return f"{record.path} is missing"
        if size != record.num_bytes:
            return f"{record.path} has another size"
        if verify and storage.sha256(record.path) != record.sha256:
            return f"{record.path} is damaged"
    return None


def root_of(config: PrepareConfig) -> str:
    """What the manifest says of where the shards are."""
    if not config.dir:
        return ""
    return config.dir if is_remote(config.dir) else str(Path(_plain(config.dir)).absolute())


def _plain(place: str) -> str:
    return place.removeprefix("file://")


def other_configuration(place: str) -> ValueError:
    """The error of a place that is taken."""
    return ValueError(
        f"{place} holds shards of another configuration, tokenizer or text; "
        "name another run.dir or delete that folder"
    )
