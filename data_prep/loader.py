"""Shards to batches: which sample comes when is a pure function of (manifest, seed, number).

Samples have a global number 0, 1, 2, … over all ranks; a step of `dp_size` ranks takes the next
`batch_size * dp_size` numbers, rank r the r-th part of them. So the whole state is one count, and a
run goes on exactly, with another number of ranks too; which number is which sample says
`loader_order`. A thread reads ahead, which changes nothing of this: what it has read and nobody has
taken does not count.

Shape letters: `B` samples of a batch, `T` tokens of a sample.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.loader_order import GROUP, SampleIndex
from data_prep.sample import Sample
from data_prep.shard_cache import ShardCache
from data_prep.shards import Manifest
from data_prep.storage import shards_of


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
        path: manifest.json, or its folder (or URL).
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
        verify: check each shard's SHA-256 when it is first opened; each of several ranks does so
            for its share of the shards.
        prefetch: batches that a thread reads ahead; 0: none, and no thread.

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
        prefetch: int = 2,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank={dp_rank} must lie in 0..{dp_size - 1} (dp_size={dp_size})")
        if epochs is not None and weights is not None:
            raise ValueError("epochs has no meaning with weights; give one of them")
        if prefetch < 0:
            raise ValueError(f"prefetch={prefetch} must be at least 0")
        self.manifest = Manifest.load(path)
        storage = shards_of(self.manifest, path)
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
                f"no {split} samples of kinds {list(kinds) if kinds else 'any'} in {storage.url}; "
                f"it holds {sorted({r.kind for r in self.manifest.splits.get(split, ())})}"
            )
        self._index = SampleIndex(records, weights, weights_key, seed=seed, shuffle=shuffle)
        own = {r.path for n, r in enumerate(records) if verify and n % dp_size == dp_rank}
        self._shards = ShardCache(
            storage, verify=lambda record: record.path in own, max_open=4 * GROUP
        )
        self._consumed = 0
        self._prefetch = prefetch
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: deque[tuple[int, Future[Batch | None]]] = deque()
        self._lock = threading.Lock()

    @property
    def num_samples(self) -> int:
        """Samples of one epoch, over all ranks."""
        return self._index.num_samples

    @property
    def consumed(self) -> int:
        """Samples given so far, over all ranks."""
        return self._consumed

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands; the same on every rank after the same number of steps.

        Batches that were read ahead and not handed out do not count.
        """
        return {"consumed": self._consumed, "seed": self.seed, "identity": self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken, with any number of ranks.

        Raises:
            ValueError: the state belongs to other shards, another split, seed or mixture.
        """
        for name, own in (("seed", self.seed), ("identity", self._identity)):
            if state.get(name) != own:
                raise ValueError(
                    f"loader state has {name}={state.get(name)!r}, this loader {own!r}: it belongs "
                    "to other shards or another mixture; resume with the data it was made with"
                )
        self._consumed = int(state["consumed"])

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        first = self._consumed
        batch = self._from_thread(first) if self._prefetch else self._batch(first)
        if batch is None:
            raise StopIteration
        self._consumed = self._end(first)
        return batch

    def sample(self, number: int) -> Sample:
        """The sample of a global number."""
        with self._lock:
            record, index = self._index.locate(number)
            return self._shards.read(record, index)

    def close(self) -> None:
        """End the thread and close the shards; the loader can go on afterwards."""
        self._ahead.clear()
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None
        with self._lock:
            self._shards.close()

    @property
    def _identity(self) -> str:
        return self._index.identity(self.split)

    def _end(self, first: int) -> int:
        """The number behind the step that begins with sample `first`."""
        last = first + self.batch_size * self.dp_size
        return last if self.epochs is None else min(last, self.epochs * self.num_samples)

    def _batch(self, first: int) -> Batch | None:
        """This rank's part of the step that begins with sample `first`; None: nothing is left."""
        last = self._end(first)
        mine = range(
            min(first + self.dp_rank * self.batch_size, last),
            min(first + (self.dp_rank + 1) * self.batch_size, last),
        )
        return collate([self.sample(number) for number in mine]) if mine else None

    def _from_thread(self, first: int) -> Batch | None:
        """The same, read by the thread, which then goes on reading ahead."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="shards")
        if self._ahead and self._ahead[0][0] != first:  # the state was set anew
            self._ahead.clear()
        after = self._end(self._ahead[-1][0]) if self._ahead else first
        while len(self._ahead) <= self._prefetch:
            self._ahead.append((after, self._thread.submit(self._batch, after)))
            if self._end(after) == after:
                break
            after = self._end(after)
        _, batch = self._ahead.popleft()
        return batch.result()


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
