"""Phase 3: samples to shards, each by whatever process is free."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.config import PrepareConfig
from data_prep.engine.documents import PortableTokenizer
from data_prep.engine.plan import load_plan
from data_prep.engine.streams import Stream
from data_prep.filler import FillerBank
from data_prep.shards import (
    ShardRecord,
    load_record,
    record_name,
    shard_name,
    write_samples,
)
from data_prep.sources import (
    PackedSource,
    SampleOrder,
    SampleSource,
    filler_name,
    load_filler,
    make_generator,
    stream_seed,
)
from data_prep.storage import Storage, open_storage


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """A shard before it is written: samples `first..first+count` of a source's order."""

    split: str
    number: int
    """In its split."""
    source: int
    first: int
    count: int
    num_available: int | None
    """Samples that the source has; None: generated."""
    first_key: int

    @property
    def name(self) -> str:
        """File name relative to the manifest."""
        return f"{self.split}/{shard_name(self.number)}"


def list_shards(
    split: str,
    counts: Sequence[int],
    available: Sequence[int | None],
    *,
    samples_per_shard: int,
) -> list[ShardTask]:
    """The shards of a split: source after source, each in shards of its own.

    Args:
        split: `train` or `eval`.
        counts: samples to take of each source.
        available: samples that each source has.
        samples_per_shard: most samples of a shard.
    """
    tasks: list[ShardTask] = []
    key = 0
    for source, count in enumerate(counts):
        for first in range(0, count, samples_per_shard):
            size = min(samples_per_shard, count - first)
            tasks.append(
                ShardTask(
                    split=split,
                    number=len(tasks),
                    source=source,
                    first=first,
                    count=size,
                    num_available=available[source],
                    first_key=key,
                )
            )
            key += size
    return tasks


def setup(
    config: PrepareConfig,
    tokenizer: PortableTokenizer,
    streams: Sequence[Stream],
    work: Path,
    place: str,
    owner: str,
) -> ShardWriter:
    """What a process of the pool calls first."""
    return ShardWriter(config, tokenizer, streams, work, open_storage(place, owner=owner))


class ShardWriter:
    """Writes shards, or finds them whole.

    Args:
        config: the configuration.
        tokenizer: of the run.
        streams: all streams, their plans made.
        work: folder of the work files.
        storage: where shards go.
    """

    def __init__(
        self,
        config: PrepareConfig,
        tokenizer: PortableTokenizer,
        streams: Sequence[Stream],
        work: Path,
        storage: Storage,
    ) -> None:
        self._config, self._tokenizer, self._work = config, tokenizer, work
        self._streams = {(stream.split, stream.source_number): stream for stream in streams}
        self._storage = storage
        self._source = functools.cache(self._open_source)
        self._fillers: dict[str, FillerBank] = {}
        self._order = functools.cache(SampleOrder)

    def __call__(self, task: ShardTask) -> ShardRecord:
        """The record of a shard that is now there.

        Raises:
            OSError: the disk is full.
        """
        source = self._config.sources[task.source]
        planned = (source.name, source.sample_kind, task.count)
        record = existing(self._storage, task.name, planned, verify=True)
        if record is not None:
            return record
        seed = stream_seed(self._config.seed, source.name, f"order/{task.split}")
        order = self._order(task.num_available, seed)
        samples = self._source(task.split, task.source)
        self._storage.delete(record_name(task.name))  # it speaks of other bytes
        places: list[list[int]] = []
        with self._storage.create(task.name) as stream:
            record = write_samples(
                stream,
                (samples.sample(i) for i in order.take(task.first, task.count).tolist()),
                first_key=task.first_key,
                name=task.name,
                source=source.name,
                kind=source.sample_kind,
                places=places,
            )
        plain = {**dataclasses.asdict(record), "samples": places}
        text = json.dumps(plain, sort_keys=True, separators=(",", ":")) + "\n"
        with self._storage.create(record_name(task.name)) as stream:
            stream.write(text.encode())
        return record

    def _open_source(self, split: str, number: int) -> SampleSource:
        source = self._config.sources[number]
        if source.generated:
            name = filler_name(source, split)
            if name not in self._fillers:
                self._fillers[name] = load_filler(self._work, source, split)[0]
            filler = self._fillers[name]
            return make_generator(self._config, number, split, self._tokenizer.full, filler)
        stream = self._streams[split, number]
        plan = load_plan(self._work, stream)
        assert plan is not None  # phase 2 is over
        return PackedSource(self._config, stream, plan, self._work, pad_id=self._tokenizer.pad_id)


def existing(
    storage: Storage, name: str, planned: tuple[str, str, int], *, verify: bool
) -> ShardRecord | None:
    """The record of a shard that was finished before; None for a damaged one.

    The record is written after its shard: without one, or with other bytes than it says, nothing
    tells that the shard is what was to be written.

    Args:
        storage: where it is.
        name: of the shard.
        planned: source, kind and number of samples that it must have.
        verify: compare its SHA-256 too.
    """
    try:
        record, _ = load_record(storage.read(record_name(name)))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    if (record.source, record.kind, record.num_samples) != planned:
        return None
    whole = storage.size(name) == record.num_bytes
    return record if whole and (not verify or storage.sha256(name) == record.sha256) else None
