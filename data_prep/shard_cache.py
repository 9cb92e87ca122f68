"""Samples of shards by number: open files, or ranges of remote ones, and where each sample lies.

A shard's own record says where its samples are, so that opening it reads one small file. Without
it (or with one of another shard) the tar file's headers are read instead.
"""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from data_prep.sample import Sample
from data_prep.shards import (
    ShardRecord,
    cut_sample,
    index_shard,
    load_record,
    members_at,
    read_sample,
    record_name,
    sample_span,
)
from data_prep.storage import LocalStorage, Storage

_Members = list[dict[str, tuple[int, int]]]


@dataclass(frozen=True)
class _Open:
    """A shard that can be read from."""

    stream: io.BufferedReader | None
    """None: a remote shard of which ranges are read."""
    members: _Members


class ShardCache:
    """Samples of shards, a bounded number of them open at a time.

    Args:
        storage: where the shards are.
        verify: which shards to compare with their SHA-256 when they are first opened.
        max_open: shards that stay open.
    """

    def __init__(
        self, storage: Storage, *, verify: Callable[[ShardRecord], bool], max_open: int
    ) -> None:
        self._storage = storage
        self._verify = verify
        self._max_open = max_open
        self._verified: set[str] = set()
        self._open: OrderedDict[str, _Open] = OrderedDict()

    def read(self, record: ShardRecord, index: int) -> Sample:
        """Sample `index` of a shard.

        Raises:
            ValueError: the shard is missing, broken or not as the manifest says.
        """
        shard = self._open.get(record.path)
        if shard is None:
            shard = self._open_shard(record)
            self._open[record.path] = shard
            if len(self._open) > self._max_open:
                _, oldest = self._open.popitem(last=False)
                if oldest.stream is not None:
                    oldest.stream.close()
        else:
            self._open.move_to_end(record.path)
        parts, where = shard.members[index], f"{record.path}, sample {index}"
        if shard.stream is not None:
            return read_sample(shard.stream, parts, where)
        start, stop = sample_span(parts)
        return cut_sample(self._storage.read_range(record.path, start, stop), start, parts, where)

    def close(self) -> None:
        """Close all shards."""
        for shard in self._open.values():
            if shard.stream is not None:
                shard.stream.close()
        self._open.clear()

    def _open_shard(self, record: ShardRecord) -> _Open:
        """Opens a shard and compares it with its record in the manifest."""
        file = f"{self._storage.url}/{record.path}"
        size = self._storage.size(record.path)
        if size is None:
            raise ValueError(f"shard {file} is missing; run stage=prepare again to write it")
        if size != record.num_bytes:
            raise ValueError(
                f"shard {file} has {size} bytes, the manifest says {record.num_bytes}; "
                "delete it and run stage=prepare again"
            )
        members = self._noted_members(record)
        must_verify = self._verify(record) and record.path not in self._verified
        if members is not None and not isinstance(self._storage, LocalStorage):
            if must_verify:
                self._compare(self._storage.sha256(record.path), record, file)
            return _Open(None, members)
        stream = self._storage.open(record.path)
        try:
            if must_verify:
                self._compare(hashlib.file_digest(stream, "sha256").hexdigest(), record, file)
            members = members or index_shard(stream, record.path)
            if len(members) != record.num_samples:
                raise ValueError(
                    f"shard {file} holds {len(members)} samples, the manifest says "
                    f"{record.num_samples}; delete it and run stage=prepare again"
                )
        except BaseException:
            stream.close()
            raise
        return _Open(stream, members)

    def _noted_members(self, record: ShardRecord) -> _Members | None:
        """Where the samples are by the shard's own record, if that is of this very shard."""
        try:
            own, places = load_record(self._storage.read(record_name(record.path)))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        if own != record or places is None or len(places) != record.num_samples:
            return None
        try:
            members = members_at(places)
        except (ValueError, TypeError):
            return None
        inside = all(a >= 0 and b <= record.num_bytes for a, b in map(sample_span, members))
        return members if inside else None

    def _compare(self, found: str, record: ShardRecord, file: str) -> None:
        if found != record.sha256:
            raise ValueError(
                f"shard {file} does not match the manifest's sha256; delete it and run "
                "stage=prepare again"
            )
        self._verified.add(record.path)
