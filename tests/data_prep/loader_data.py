"""Small shards for the tests of the loader, and what a loader gives of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.loader import Batch, ShardLoader
from data_prep.sample import Sample
from data_prep.shards import Manifest, ShardRecord, write_shard

LENGTH = 6
SIZES = {"code": (5, 5, 3), "recall": (4, 4), "talk": (2,)}
KINDS = {"code": "text", "recall": "recall", "talk": "chat"}
TOTAL = sum(map(sum, SIZES.values()))


def make_sample(number: int, source: str, borders: tuple[int, ...] = (0, LENGTH)) -> Sample:
    return Sample(
        tokens=np.full(LENGTH, number, dtype=np.int32),
        loss_mask=np.asarray([0] + [1] * (LENGTH - 1), dtype=np.uint8),
        cu_seqlens=np.asarray(borders, dtype=np.int32),
        meta={"kind": KINDS[source], "source": source, "ids": [str(number)]},
    )


def write_data(folder: Path) -> Path:
    (folder / "train").mkdir(parents=True)
    records: list[ShardRecord] = []
    number = 0
    for source, sizes in SIZES.items():
        for size in sizes:
            path = folder / "train" / f"shard-{len(records):05d}.tar"
            samples = [make_sample(number + i, source) for i in range(size)]
            records.append(
                write_shard(path, samples, first_key=number, source=source, kind=KINDS[source])
            )
            number += size
    Manifest(
        tokenizer_hash="t",
        vocab_size=100,
        seq_length=LENGTH,
        config_hash="c",
        config={},
        splits={"train": tuple(records), "eval": ()},
        reports={},
    ).save(folder)
    return folder


def numbers(batches: Iterator[Batch]) -> list[int]:
    return [int(row[0]) for batch in batches for row in batch.tokens]


def take(loader: ShardLoader, steps: int) -> list[list[int]]:
    return [numbers(iter([next(loader)])) for _ in range(steps)]
