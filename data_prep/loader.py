"""Shards to batches: which sample comes when is a pure function of (manifest, seed, number).

Samples have a global number 0, 1, 2, … over all ranks; a step of `dp_size` ranks takes the next
`batch_size * dp_size` numbers, rank r the r-th part of them. So the whole state is one count, and a
run goes on exactly, with another number of ranks too. Numbers map to pools (one for each source, or
kind where weights are given) by blocks in which every pool has its exact share, shuffled; and
within a pool to a shuffled pass over its shards, epoch after epoch: none is lost or doubled.

Shape letters: `B` samples of a batch, `T` tokens of a sample.
"""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.sample import Sample
from data_prep.shards import Manifest, ShardRecord, file_sha256, index_shard, read_sample

_BLOCK = 1000
"""Samples over which weights hold exactly (so to a tenth of a per cent)."""
_GROUP = 16
"""Shards whose samples are shuffled together; as many may be open at a time."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one rank trains on in one step."""

    tokens: torch.Tensor
    """[B, T] int64."""
    loss_mask: torch.Tensor
    """[B, T] bool; True where the token at this index is a loss target."""
    cu_seqlens: torch.Tensor | None
    """None where every row is one document; else int32 borders over the rows laid one after the
    other, 0 … B·T (use `tokens.reshape(1, -1)` with them)."""
    meta: list[dict[str, Any]]
    """`meta.json` of each row."""

    @property
    def num_loss_tokens(self) -> int:
        """Loss targets in the batch."""
        return int(self.loss_mask.sum())

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        borders = self.cu_seqlens
        return Batch(
            tokens=self.tokens.to(device, non_blocking=True),
            loss_mask=self.loss_mask.to(device, non_blocking=True),
            cu_seqlens=None if borders is None else borders.to(device, non_blocking=True),
            meta=self.meta,
        )


class ShardLoader:
    """Batches of a split, without end or for a number of epochs.

    Args:
        path: manifest.json, or its folder.
        batch_size: samples of this rank per step.
        split: `train` or `eval`.
        seed: order of the samples.
        dp_rank: this rank's place among `dp_size` data-parallel ranks; ranks that share a sample
            (tensor or context parallel) pass the same number.
        dp_size: number of data-parallel ranks.
        kinds: take only these kinds (`text`, `recall`, `chat`); all where None.
        weights_key: what messages call `weights`, such as the setting that it comes from.
        weights: share of the samples by source name, or by kind where no source has the name;
            sources without a weight are left out. None: all samples, each once per epoch.
        epochs: stop after so many passes (not together with weights); the last step may be smaller,
            and ranks that find nothing left stop. None: without end.
        shuffle: False gives the shards' order, for evaluation.
        verify: check each shard's SHA-256 when it is first opened.

    Raises:
        ValueError: manifest or shard missing or corrupt, unknown names, nothing to load.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        batch_size: int,
        split: str = "train",
        seed: int = 0,
        dp_rank: int = 0,
        dp_size: int = 1,
        kinds: Sequence[str] | None = None,
        weights: Mapping[str, float] | None = None,
        weights_key: str = "weights",
        epochs: int | None = None,
        shuffle: bool = True,
        verify: bool = True,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank={dp_rank} must lie in 0..{dp_size - 1} (dp_size={dp_size})")
        if epochs is not None and weights is not None:
            raise ValueError("epochs has no meaning with weights; give one of them")
        path = Path(path)
        self.manifest = Manifest.load(path)
        self.folder = path if path.is_dir() else path.parent
        self.split = split
        self.batch_size, self.dp_rank, self.dp_size = batch_size, dp_rank, dp_size
        self.seed, self.epochs = seed, epochs
        records = [
            record
            for record in self.manifest.splits.get(split, ())
            if (kinds is None or record.kind in kinds) and record.num_samples
        ]
        if not records:
            raise ValueError(
                f"no {split} samples of kinds {list(kinds) if kinds else 'any'} in {self.folder}; "
                f"it holds {sorted({r.kind for r in self.manifest.splits.get(split, ())})}"
            )
        self._pools = _make_pools(records, weights, weights_key, seed=seed, shuffle=shuffle)
        self._shuffle = shuffle
        self._shards = _ShardCache(self.folder, verify=verify, max_open=4 * _GROUP)
        self._block = _block_counts(self._pools, weights)
        self._consumed = 0

    @property
    def num_samples(self) -> int:
        """Samples of one epoch, over all ranks."""
        return sum(pool.num_samples for pool in self._pools)

    @property
    def consumed(self) -> int:
        """Samples given so far, over all ranks."""
        return self._consumed

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands; the same on every rank after the same number of steps."""
        return {"consumed": self._consumed, "seed": self.seed, "identity": self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken, with any number of ranks.

        Raises:
            ValueError: the state belongs to other shards, another split, seed or mixture.
        """
        for name, own in (("seed", self.seed), ("identity", self._identity())):
            if state.get(name) != own:
                raise ValueError(
                    f"loader state has {name}={state.get(name)!r}, this loader {own!r}: it belongs "
                    "to other shards or another mixture; resume with the data it was made with"
                )
        self._consumed = int(state["consumed"])

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        stride = self.batch_size * self.dp_size
        first = self._consumed
        last = first + stride
        if self.epochs is not None:
            last = min(last, self.epochs * self.num_samples)
        if first >= last:
            raise StopIteration
        mine = range(
            min(first + self.dp_rank * self.batch_size, last),
            min(first + (self.dp_rank + 1) * self.batch_size, last),
        )
        if not mine:
            raise StopIteration
        samples = [self.sample(number) for number in mine]
        self._consumed = last
        return collate(samples)

    def sample(self, number: int) -> Sample:
        """The sample of a global number."""
        pool_number, cursor = self._locate(number)
        record, index = self._pools[pool_number].locate(cursor)
        return self._shards.read(record, index)

    def _locate(self, number: int) -> tuple[int, int]:
        """Global number -> (pool, number within the pool)."""
        counts, size = self._block, int(self._block.sum())
        block, within = divmod(number, size)
        labels, ranks = _block_order(self.seed, block, tuple(counts.tolist()), self._shuffle)
        pool = int(labels[within])
        return pool, block * int(counts[pool]) + int(ranks[within])

    def _identity(self) -> str:
        """A short hash of everything beside the seed that decides which sample has which number."""
        digest = hashlib.sha256(repr((self.split, self._block.tolist(), self._shuffle)).encode())
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
        group = place // _GROUP
        first = group * _GROUP
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
            last = min((group + 1) * _GROUP, len(ends)) - 1
            rng = np.random.default_rng([*self._key, epoch, 1 + group])
            self._group = ((epoch, group), rng.permutation(int(ends[last]) - base))
        return self._group[1]


def _make_pools(
    records: list[ShardRecord],
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


def _block_counts(pools: list[_Pool], weights: Mapping[str, float] | None) -> NDArray[np.int64]:
    """Samples of each pool in a block: an epoch without weights, else `_BLOCK` by weight."""
    if weights is None:
        return np.asarray([pool.num_samples for pool in pools], dtype=np.int64)
    share = np.asarray(list(weights.values()), dtype=np.float64)
    exact = _BLOCK * share / share.sum()
    counts = np.maximum(np.floor(exact), 1).astype(np.int64)
    missing = _BLOCK - int(counts.sum())
    for i in np.argsort(counts - exact, kind="stable")[: max(missing, 0)]:
        counts[i] += 1
    return counts


@lru_cache(maxsize=4)
def _block_order(
    seed: int, block: int, counts: tuple[int, ...], shuffle: bool
) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Pool of each place in a block, and how many of that pool came before it in the block."""
    labels = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
    if shuffle:
        labels = np.random.default_rng([seed, block, 7]).permutation(labels)
    ranks = np.empty(len(labels), dtype=np.int64)
    for pool, count in enumerate(counts):
        ranks[labels == pool] = np.arange(count)
    return labels, ranks


class _ShardCache:
    """Open shards with their index, least recently used out first."""

    def __init__(self, folder: Path, *, verify: bool, max_open: int) -> None:
        self._folder = folder
        self._verify = verify
        self._max_open = max_open
        self._verified: set[str] = set()
        self._open: OrderedDict[str, tuple[io.BufferedReader, list[dict[str, tuple[int, int]]]]] = (
            OrderedDict()
        )

    def read(self, record: ShardRecord, index: int) -> Sample:
        entry = self._open.get(record.path)
        if entry is None:
            entry = self._open_shard(record)
            self._open[record.path] = entry
            if len(self._open) > self._max_open:
                _, (stream, _) = self._open.popitem(last=False)
                stream.close()
        else:
            self._open.move_to_end(record.path)
        stream, members = entry
        return read_sample(stream, members[index], f"{record.path}, sample {index}")

    def _open_shard(
        self, record: ShardRecord
    ) -> tuple[io.BufferedReader, list[dict[str, tuple[int, int]]]]:
        file = self._folder / record.path
        if not file.is_file():
            raise ValueError(f"shard {file} is missing; run stage=prepare again to write it")
        size = file.stat().st_size
        if size != record.num_bytes:
            raise ValueError(
                f"shard {file} has {size} bytes, the manifest says {record.num_bytes}; "
                "delete it and run stage=prepare again"
            )
        if self._verify and record.path not in self._verified:
            if file_sha256(file) != record.sha256:
                raise ValueError(
                    f"shard {file} does not match the manifest's sha256; delete it and run "
                    "stage=prepare again"
                )
            self._verified.add(record.path)
        stream = open(file, "rb")  # noqa: SIM115 - stays open in the cache
        members = index_shard(stream, record.path)
        if len(members) != record.num_samples:
            stream.close()
            raise ValueError(
                f"shard {file} holds {len(members)} samples, the manifest says "
                f"{record.num_samples}; delete it and run stage=prepare again"
            )
        return stream, members


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of the same length as one batch."""
    tokens = torch.from_numpy(np.stack([s.tokens for s in samples]).astype(np.int64))
    mask = torch.from_numpy(np.stack([s.loss_mask for s in samples]) != 0)
    borders = None
    if any(len(s.cu_seqlens) > 2 for s in samples):
        length = tokens.shape[1]
        parts = [s.cu_seqlens[1:] + row * length for row, s in enumerate(samples)]
        borders = torch.from_numpy(np.concatenate([[0], *parts]).astype(np.int32))
    return Batch(
        tokens=tokens, loss_mask=mask, cu_seqlens=borders, meta=[dict(s.meta) for s in samples]
    )
