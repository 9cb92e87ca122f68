"""How many samples each source gives, and how many a manifest holds."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from data_prep.config import PrepareConfig
from data_prep.shards import Manifest


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
