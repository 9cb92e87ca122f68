"""Which sample has which number: a pure function of the manifest, the seed and the number.

Numbers map to pools (one for each source, or kind where weights are given) by blocks in which every
pool has its exact share, shuffled; and within a pool to a shuffled pass over its shards, epoch
after epoch: none is lost or doubled. What is held in memory is bounded by a block and a group of
shards, not by the corpus.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data_prep.shards import ShardRecord

WEIGHT_BLOCK = 1000
"""Samples over which weights hold exactly (so to a tenth of a per cent)."""
EPOCH_BLOCK = 1 << 20
"""Without weights an epoch of more samples is divided into blocks of about so many."""
GROUP = 16
"""Shards whose samples are shuffled together; as many may be open at a time."""


class SampleIndex:
    """Global number -> shard and place.

    Args:
        records: the shards to take samples from.
        weights: share of each pool; None: all samples, each once per epoch.
        weights_key: what messages call `weights`.
        seed: order of the samples.
        shuffle: False gives the shards' order.

    Raises:
        ValueError: a weight of no source or kind, or not above 0.
    """

    def __init__(
        self,
        records: Sequence[ShardRecord],
        weights: Mapping[str, float] | None,
        weights_key: str,
        *,
        seed: int,
        shuffle: bool,
    ) -> None:
        self._pools = _make_pools(records, weights, weights_key, seed=seed, shuffle=shuffle)
        self._shuffle, self._seed = shuffle, seed
        sizes = np.asarray([pool.num_samples for pool in self._pools], dtype=np.int64)
        self.num_samples = int(sizes.sum())
        """Samples of one epoch."""
        if weights is not None:
            self._borders = np.stack([np.zeros_like(sizes), _weighted_counts(weights)])
        else:
            num_blocks = max(1, round(self.num_samples / EPOCH_BLOCK)) if shuffle else 1
            steps = np.arange(num_blocks + 1)[:, None]
            self._borders = sizes[None] * steps // num_blocks
        # [blocks + 1, pools] samples of each pool before each block of a round of blocks.
        self._ends = self._borders.sum(axis=1)

    def locate(self, number: int) -> tuple[ShardRecord, int]:
        """The shard of a global number, and the place in it."""
        round_, within = divmod(number, int(self._ends[-1]))
        block = int(np.searchsorted(self._ends, within, side="right")) - 1
        within -= int(self._ends[block])
        before, counts = self._borders[block], self._borders[block + 1] - self._borders[block]
        turn = round_ * (len(self._ends) - 1) + block
        if not self._shuffle:
            pool = int(np.searchsorted(np.cumsum(counts), within, side="right"))
            rank = within - int(counts[:pool].sum())
        else:
            labels, ranks = _block_order(self._seed, turn, tuple(counts.tolist()))
            pool, rank = int(labels[within]), int(ranks[within])
        passed = round_ * int(self._borders[-1][pool]) + int(before[pool])
        return self._pools[pool].locate(passed + rank)

    def identity(self, split: str) -> str:
        """A short hash of everything beside the seed that decides which sample has which number."""
        if len(self._ends) == 2:
            counts: object = (self._borders[1] - self._borders[0]).tolist()
        else:
            counts = self._borders.tolist()
        digest = hashlib.sha256(repr((split, counts, self._shuffle)).encode())
        for pool in self._pools:
            for record in pool.records:
                digest.update(f"{record.path} {record.sha256}\n".encode())
            digest.update(b"\n")
        return digest.hexdigest()[:16]


class _Pool:
    """Shards that are drawn from together: number within the pool -> (shard, place)."""

    def __init__(
        self, records: list[ShardRecord], *, seed: int, number: int, shuffle: bool
    ) -> None:
        self.records = records
        self.num_samples = sum(record.num_samples for record in records)
        self._key = (seed, number)
        self._shuffle = shuffle
        self._epoch: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None
        self._group: tuple[tuple[int, int], NDArray[np.int64]] | None = None

    def locate(self, cursor: int) -> tuple[ShardRecord, int]:
        epoch, within = divmod(cursor, self.num_samples)
        order, ends = self._shard_order(epoch)
        # Groups of consecutive shards in this epoch's order are shuffled as one.
        place = int(np.searchsorted(ends, within, side="right"))
        group = place // GROUP
        first = group * GROUP
        base = int(ends[first - 1]) if first else 0
        if self._shuffle:
            within = base + int(self._group_order(epoch, group, base, ends)[within - base])
            place = int(np.searchsorted(ends, within, side="right"))
        start = int(ends[place - 1]) if place else 0
        return self.records[int(order[place])], within - start

    def _shard_order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if self._epoch is None or self._epoch[0] != epoch:
            order = np.arange(len(self.records))
            if self._shuffle:
                order = np.random.default_rng([*self._key, epoch]).permutation(order)
            ends = np.cumsum([self.records[int(i)].num_samples for i in order])
            self._epoch = (epoch, order, ends)
        return self._epoch[1], self._epoch[2]

    def _group_order(
        self, epoch: int, group: int, base: int, ends: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        if self._group is None or self._group[0] != (epoch, group):
            last = min((group + 1) * GROUP, len(ends)) - 1
            rng = np.random.default_rng([*self._key, epoch, 1 + group])
            self._group = ((epoch, group), rng.permutation(int(ends[last]) - base))
        return self._group[1]


def _make_pools(
    records: Sequence[ShardRecord],
    weights: Mapping[str, float] | None,
    weights_key: str,
    *,
    seed: int,
    shuffle: bool,
) -> list[_Pool]:
    """One pool for each source, or for each weighted name."""
    groups: dict[str, list[ShardRecord]] = {}
    if weights is None:
        for record in records:
            groups.setdefault(record.source, []).append(record)
    else:
        sources = {record.source for record in records}
        for name, weight in weights.items():
            if not weight > 0:
                raise ValueError(
                    f"{weights_key}.{name}={weight} must be above 0; leave it out for none"
                )
            groups[name] = [r for r in records if name == (r.source if name in sources else r.kind)]
            if not groups[name]:
                known = sorted(sources | {record.kind for record in records})
                raise ValueError(
                    f"{weights_key}.{name}={weight} is the share of {name!r}, which is none of"
                    f" {', '.join(known)}; name one of these, or add the source to data.sources"
                    " and prepare again"
                )
    return [
        _Pool(group, seed=seed, number=number, shuffle=shuffle)
        for number, group in enumerate(groups.values())
    ]


def _weighted_counts(weights: Mapping[str, float]) -> NDArray[np.int64]:
    """Samples of each pool in a block of `WEIGHT_BLOCK`."""
    share = np.asarray(list(weights.values()), dtype=np.float64)
    exact = WEIGHT_BLOCK * share / share.sum()
    counts = np.maximum(np.floor(exact), 1).astype(np.int64)
    missing = WEIGHT_BLOCK - int(counts.sum())
    for i in np.argsort(counts - exact, kind="stable")[: max(missing, 0)]:
        counts[i] += 1
    return counts


@lru_cache(maxsize=4)
def _block_order(
    seed: int, block: int, counts: tuple[int, ...]
) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Pool of each place in a block, and how many of that pool came before it in the block."""
    labels = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
    labels = np.random.default_rng([seed, block, 7]).permutation(labels)
    ranks = np.empty(len(labels), dtype=np.int64)
    for pool, count in enumerate(counts):
        ranks[labels == pool] = np.arange(count)
    return labels, ranks
