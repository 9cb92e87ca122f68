"""Shards by the path that a person names: one file, a folder of them, or a manifest's split."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.sample import Sample
from data_prep.shards import MANIFEST_NAME, Manifest, ShardRecord, index_shard, read_sample
from data_prep.storage import Storage, is_remote, open_storage, shards_of


@dataclass(frozen=True)
class ShardFile:
    """A shard to look into."""

    storage: Storage
    name: str
    record: ShardRecord | None
    """As the manifest lists it; None without one."""

    @contextlib.contextmanager
    def samples(self) -> Iterator[ShardSamples]:
        """Opens the shard; nothing is unpacked.

        Raises:
            ValueError: it is missing, or no whole shard.
        """
        try:
            stream = self.storage.open(self.name)
        except FileNotFoundError:
            raise ValueError(
                f"{self.storage.url}/{self.name} is missing; run stage=prepare again to write it"
            ) from None
        with stream:
            yield ShardSamples(stream, self.name)


class ShardSamples:
    """The samples of an open shard by number."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name = stream, name
        self._members = index_shard(stream, name)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, number: int) -> Sample:
        where = f"{self._name}, sample {number}"
        return read_sample(self._stream, self._members[number], where)


@dataclass(frozen=True)
class FoundShards:
    """What PATH leads to."""

    manifest: Manifest | None
    shards: list[ShardFile]
    split: str
    """Empty where shards are not known by splits."""


def find_shards(path: str, split: str | None) -> FoundShards:
    """The shards that a path leads to.

    Raises:
        ValueError: nothing is there, it is no shard, or the split has none.
    """
    if is_remote(path):
        if not path.endswith(".tar"):
            whole = Manifest.load(path)
            return _of_manifest(whole, shards_of(whole, path), split)
        folder, _, name = path.rpartition("/")
        return FoundShards(None, [ShardFile(open_storage(folder), name, None)], "")
    place = Path(path.removeprefix("file://"))
    if place.name == MANIFEST_NAME:
        place = place.parent
    if place.is_file():
        return _single(place)
    if not place.is_dir():
        raise ValueError(
            f"{place} is not there; name a shard (.tar) or the folder of stage=prepare"
        )
    if (place / MANIFEST_NAME).is_file():
        whole = Manifest.load(place)
        return _of_manifest(whole, shards_of(whole, place), split)
    names = sorted(file.name for file in place.glob("*.tar"))
    if not names:
        raise ValueError(
            f"{place} holds neither {MANIFEST_NAME} nor .tar files; name a shard or the folder "
            "that stage=prepare has finished"
        )
    manifest, records = _manifest_above(place)
    storage = open_storage(place)
    return FoundShards(
        manifest, [ShardFile(storage, name, records.get(name)) for name in names], ""
    )


def _single(file: Path) -> FoundShards:
    manifest, records = _manifest_above(file.parent)
    return FoundShards(
        manifest, [ShardFile(open_storage(file.parent), file.name, records.get(file.name))], ""
    )


def _manifest_above(folder: Path) -> tuple[Manifest | None, dict[str, ShardRecord]]:
    """The manifest of the folder that a split's folder lies in, and its records by file name."""
    if not (folder.parent / MANIFEST_NAME).is_file():
        return None, {}
    manifest = Manifest.load(folder.parent)
    records = manifest.splits.get(folder.name, ())
    return (manifest, {Path(r.path).name: r for r in records}) if records else (None, {})


def _of_manifest(manifest: Manifest, storage: Storage, split: str | None) -> FoundShards:
    name = split or "train"
    if not manifest.splits.get(name):
        held = [known for known, records in manifest.splits.items() if records]
        raise ValueError(
            f"--split {name}: the manifest has no shards of it, but of {', '.join(held) or 'none'}"
        )
    shards = [ShardFile(storage, record.path, record) for record in manifest.splits[name]]
    return FoundShards(manifest, shards, name)
