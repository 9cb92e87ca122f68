"""Open shards with their index, least recently used out first."""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Callable

from data_prep.sample import Sample
from data_prep.shards import ShardRecord, index_shard, read_sample
from data_prep.storage import Storage

_Members = list[dict[str, tuple[int, int]]]


class ShardCache:
    """Samples of shards, a bounded number of them open at a time.

    Args:
        storage: where the shards are; from other than a folder they are copied to a temporary file.
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
        self._open: OrderedDict[str, tuple[io.BufferedReader, _Members]] = OrderedDict()

    def read(self, record: ShardRecord, index: int) -> Sample:
        """Sample `index` of a shard.

        Raises:
            ValueError: the shard is missing, broken or not as the manifest says.
        """
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

    def close(self) -> None:
        """Close all shards."""
        for stream, _ in self._open.values():
            stream.close()
        self._open.clear()

    def _open_shard(self, record: ShardRecord) -> tuple[io.BufferedReader, _Members]:
        file = f"{self._storage.url}/{record.path}"
        try:
            stream = self._storage.open(record.path)
        except FileNotFoundError:
            raise ValueError(
                f"shard {file} is missing; run stage=prepare again to write it"
            ) from None
        try:
            return stream, self._index(stream, record, file)
        except BaseException:
            stream.close()
            raise

    def _index(self, stream: io.BufferedReader, record: ShardRecord, file: str) -> _Members:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        if size != record.num_bytes:
            raise ValueError(
                f"shard {file} has {size} bytes, the manifest says {record.num_bytes}; "
                "delete it and run stage=prepare again"
            )
        if self._verify(record) and record.path not in self._verified:
            if hashlib.file_digest(stream, "sha256").hexdigest() != record.sha256:
                raise ValueError(
                    f"shard {file} does not match the manifest's sha256; delete it and run "
                    "stage=prepare again"
                )
            self._verified.add(record.path)
        members = index_shard(stream, record.path)
        if len(members) != record.num_samples:
            raise ValueError(
                f"shard {file} holds {len(members)} samples, the manifest says "
                f"{record.num_samples}; delete it and run stage=prepare again"
            )
        return members
