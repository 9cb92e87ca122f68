"""Documents to shards: reads, tokenizes, packs and writes what a `PrepareConfig` describes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.config import PrepareConfig, to_dict
from data_prep.shards import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Manifest,
    ShardRecord,
    file_sha256,
    shard_name,
    write_atomic,
    write_shard,
)
from data_prep.sources import SPLITS, FillerCache, SampleSource, build_source, stream_seed
from data_prep.tokenize import TokenizerLike
from data_prep.tokenizer import tokenizer_hash

PLAN_NAME = "plan.json"
Progress = Callable[[str, int, int], None]
"""Called as progress("train shards", done, total)."""


@dataclass(frozen=True)
class _ShardPlan:
    """A shard before it is written: samples `first..first+count` of a source's order."""

    source: int
    first: int
    count: int


def prepare_shards(
    config: PrepareConfig,
    out_dir: str | Path,
    *,
    tokenizer: TokenizerLike,
    progress: Progress | None = None,
) -> Manifest:
    """Writes `out_dir/{train,eval}/shard-00000.tar …` and `manifest.json`, and gives the manifest.

    Can be killed at any moment and called again: finished shards are kept, and the bytes are those
    of an uninterrupted run. Where everything is there already, shards are only read to compare
    their SHA-256; missing and damaged ones are written again.

    Args:
        config: what to prepare.
        out_dir: folder of one configuration; made where it is missing.
        tokenizer: a fast tokenizer (`data_prep.tokenizer.load_tokenizer`).
        progress: told after each shard.

    Raises:
        ValueError: out_dir holds shards of another configuration, tokenizer or text; a source is
            missing, unreadable or has too few samples.
        OSError: the disk is full.
    """
    out_path = Path(out_dir)
    if not config.sources:
        raise ValueError("sources is empty; give at least one entry in data.sources")
    identity = _identity(config, tokenizer)
    if _what_is_missing(out_path, identity, verify=True) is None:
        return Manifest.load(out_path)
    fillers: FillerCache = {}
    shares = {split: share_samples(config, split) for split in SPLITS}
    sources = {
        split: [
            build_source(config, number, split, tokenizer, wanted=count, fillers=fillers)
            for number, count in enumerate(shares[split])
            if count != 0
        ]
        for split in SPLITS
    }
    counts = {
        split: [
            _count(source, count, split)
            for source, count in zip(built, (c for c in shares[split] if c != 0), strict=True)
        ]
        for split, built in sources.items()
    }
    fingerprints = {
        f"{split}/{source.name}": source.fingerprint
        for split, built in sources.items()
        for source in built
    }
    _claim_folder(out_path, {**identity, "text": fingerprints})
    splits: dict[str, tuple[ShardRecord, ...]] = {}
    for split, built in sources.items():
        splits[split] = _write_split(
            config, split, built, counts[split], out_path / split, progress
        )
    manifest = Manifest(
        tokenizer_hash=identity["tokenizer_hash"],
        vocab_size=len(tokenizer),
        seq_length=config.seq_length,
        config_hash=identity["config_hash"],
        config=to_dict(config),
        splits=splits,
        reports={
            f"{split}/{source.name}": {**source.report, "fingerprint": source.fingerprint}
            for split, built in sources.items()
            for source in built
        },
    )
    manifest.save(out_path)
    return manifest


def what_is_missing(
    config: PrepareConfig,
    out_dir: str | Path,
    *,
    tokenizer: TokenizerLike,
    verify: bool = False,
) -> str | None:
    """Why `prepare_shards` would have to write, in words; None where the folder is complete.

    Args:
        config: what was to be prepared.
        out_dir: folder of the shards.
        tokenizer: the fast tokenizer that they must be made by.
        verify: compare each shard's SHA-256 too, which reads it all; otherwise only its size.

    Raises:
        ValueError: out_dir holds shards of another configuration or tokenizer.
    """
    return _what_is_missing(Path(out_dir), _identity(config, tokenizer), verify=verify)


def _identity(config: PrepareConfig, tokenizer: TokenizerLike) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "config_hash": config.fingerprint(),
        "tokenizer_hash": tokenizer_hash(tokenizer),
    }


def _what_is_missing(out_path: Path, identity: dict[str, Any], *, verify: bool) -> str | None:
    if not (out_path / MANIFEST_NAME).is_file():
        return f"{MANIFEST_NAME} is missing"
    manifest = Manifest.load(out_path)
    if {name: getattr(manifest, name) for name in identity} != identity:
        raise _other_configuration(out_path)
    for record in (record for records in manifest.splits.values() for record in records):
        file = out_path / record.path
        if not file.is_file():
            return f"{record.path} is missing"
        if file.stat().st_size != record.num_bytes:
            return f"{record.path} has another size"
        if verify and file_sha256(file) != record.sha256:
            return f"{record.path} is damaged"
    return None


def _other_configuration(out_path: Path) -> ValueError:
    return ValueError(
        f"{out_path} holds shards of another configuration, tokenizer or text; "
        "name another run.dir or delete that folder"
    )


def _claim_folder(out_path: Path, plan: dict[str, Any]) -> None:
    """Notes what the folder is for before the first shard, so that no two plans mix in it."""
    out_path.mkdir(parents=True, exist_ok=True)
    file = out_path / PLAN_NAME
    data = json.dumps(plan, indent=1, sort_keys=True).encode() + b"\n"
    if not file.exists():
        write_atomic(file, data)
    elif file.read_bytes() != data:
        raise _other_configuration(out_path)


def _write_split(
    config: PrepareConfig,
    split: str,
    sources: list[SampleSource],
    counts: list[int],
    folder: Path,
    progress: Progress | None,
) -> tuple[ShardRecord, ...]:
    orders = [
        _order(source, count, config.seed, split)
        for source, count in zip(sources, counts, strict=True)
    ]
    plans = [
        _ShardPlan(number, first, min(config.samples_per_shard, count - first))
        for number, count in enumerate(counts)
        for first in range(0, count, config.samples_per_shard)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.partial"):
        stale.unlink()
    records: list[ShardRecord] = []
    key = 0
    for number, plan in enumerate(plans):
        source, order = sources[plan.source], orders[plan.source]
        path = folder / shard_name(number)
        record = _existing(path, source, plan.count)
        if record is None:
            chosen = order[plan.first : plan.first + plan.count]
            samples = (source.sample(int(i)) for i in chosen)
            _record_path(path).unlink(missing_ok=True)  # it speaks of other bytes
            record = write_shard(path, samples, first_key=key, source=source.name, kind=source.kind)
            _save_record(path, record)
        records.append(record)
        key += plan.count
        if progress is not None:
            progress(f"{split} shards", number + 1, len(plans))
    return tuple(records)


def _record_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".json")


def _existing(path: Path, source: SampleSource, count: int) -> ShardRecord | None:
    """The record of a shard that an earlier run finished; a damaged one is written again.

    The record is written after its shard: without one, or with other bytes than it says, nothing
    tells that the shard is what was to be written.
    """
    file = _record_path(path)
    if not path.is_file() or not file.is_file():
        return None
    try:
        record = ShardRecord(**json.loads(file.read_bytes()))
    except (ValueError, TypeError):
        return None
    planned = (source.name, source.kind, count)
    if (record.source, record.kind, record.num_samples) != planned:
        return None
    whole = path.stat().st_size == record.num_bytes and file_sha256(path) == record.sha256
    return record if whole else None


def _save_record(path: Path, record: ShardRecord) -> None:
    text = json.dumps(dataclasses.asdict(record), sort_keys=True) + "\n"
    write_atomic(_record_path(path), text.encode())


def _order(source: SampleSource, count: int, seed: int, split: str) -> NDArray[np.int64]:
    """Which samples are taken, in which order: generated ones by number, others shuffled."""
    if source.num_available is None:
        return np.arange(count, dtype=np.int64)
    rng = np.random.default_rng(stream_seed(seed, source.name, f"order/{split}"))
    return rng.permutation(source.num_available)[:count].astype(np.int64)


def share_samples(config: PrepareConfig, split: str) -> list[int | None]:
    """How many samples each source gives: by weight; None (all) where no number is asked.

    Raises:
        ValueError: a generated source without a number.
    """
    wanted = config.train_samples if split == "train" else config.eval_samples
    if wanted is None:
        for source in config.sources:
            if source.generated:
                raise ValueError(
                    f"source {source.name} is generated without end; set data.{split}_samples"
                )
        return [None] * len(config.sources)
    shares = [
        source.weight if split == "train" or source.eval_weight is None else source.eval_weight
        for source in config.sources
    ]
    if not any(shares):
        raise ValueError("eval_weight is 0 for every source; leave it out for one of them")
    weights = np.asarray(shares, dtype=np.float64)
    exact = wanted * weights / weights.sum()
    counts = np.floor(exact).astype(int)
    # Largest remainders first; ties by position.
    for i in np.argsort(counts - exact, kind="stable")[: wanted - int(counts.sum())]:
        counts[i] += 1
    return [int(count) for count in counts]


def _count(source: SampleSource, wanted: int | None, split: str) -> int:
    available = source.num_available
    if wanted is None:
        return available or 0
    if available is not None and available < wanted:
        raise ValueError(
            f"source {source.name} has {available} {split} samples, {wanted} are wanted; lower "
            f"data.{split}_samples or its weight, or give it more text"
        )
    return wanted


def summary(manifest: Manifest) -> list[dict[str, Any]]:
    """One row for each split and source: samples, tokens, loss tokens, shards."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for split, records in manifest.splits.items():
        for record in records:
            row = rows.setdefault(
                (split, record.source),
                {"split": split, "source": record.source, "kind": record.kind}
                | dict.fromkeys(("num_shards", "num_samples", "num_tokens", "num_loss_tokens"), 0),
            )
            row["num_shards"] += 1
            for name in ("num_samples", "num_tokens", "num_loss_tokens"):
                row[name] += dataclasses.asdict(record)[name]
    return list(rows.values())
