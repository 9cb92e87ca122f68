"""Shards: webdataset tar files of samples, the same bytes whenever they are written.

A sample is four members, `KEY.tokens.npy`, `KEY.loss_mask.npy`, `KEY.cu_seqlens.npy` and
`KEY.meta.json` (no pickle). A tar file is written under a temporary name, flushed to disk and
renamed, so that a name without `.partial` is always whole. Headers carry no time and no user.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_prep.atomic import atomic_file, write_atomic
from data_prep.codec import MEMBERS, decode_sample, encode_sample
from data_prep.sample import Sample

SCHEMA_VERSION = 2
"""Version 1 had no `root`; it is read as well."""
_READABLE = (1, 2)
MANIFEST_NAME = "manifest.json"
_MEMBER_NAME = re.compile(
    r"(?P<key>[0-9]{9})\.(?P<part>tokens\.npy|loss_mask\.npy|cu_seqlens\.npy|meta\.json)"
)


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """A shard as the manifest lists it; all its samples come from one source."""

    path: str
    """Relative to the manifest's folder."""
    source: str
    kind: str
    num_samples: int
    num_tokens: int
    """Without padding."""
    num_loss_tokens: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of shards holds."""

    tokenizer_hash: str
    vocab_size: int
    seq_length: int
    config_hash: str
    config: dict[str, Any]
    splits: dict[str, tuple[ShardRecord, ...]]
    reports: dict[str, dict[str, Any]]
    """By `SPLIT/SOURCE`: what was read, dropped and unreadable, and the text's fingerprint."""
    schema_version: int = SCHEMA_VERSION
    root: str = ""
    """URL of the shards where they are not beside the manifest (`data.dir`)."""

    def num_samples(self, split: str) -> int:
        """Samples of a split."""
        return sum(shard.num_samples for shard in self.splits.get(split, ()))

    def num_tokens(self, split: str) -> int:
        """Tokens of a split, without padding."""
        return sum(shard.num_tokens for shard in self.splits.get(split, ()))

    def to_bytes(self) -> bytes:
        """The text of `manifest.json`."""
        return (json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n").encode()

    def save(self, folder: Path, *, owner: str = "") -> None:
        """Writes `manifest.json`, whole or not at all."""
        write_atomic(folder / MANIFEST_NAME, self.to_bytes(), owner=owner)

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Reads a manifest, or the one in a folder; a URL (`s3://…`) is read by fsspec.

        Raises:
            ValueError: missing, broken, or of another schema version.
        """
        if "://" in str(path):
            import fsspec

            file = str(path).removesuffix(MANIFEST_NAME).rstrip("/") + f"/{MANIFEST_NAME}"
            try:
                with fsspec.open(file, "rb") as stream:
                    data: bytes = stream.read()  # type: ignore[union-attr]
            except FileNotFoundError:
                raise ValueError(f"{file} is missing; run stage=prepare first") from None
            return cls.from_bytes(data, file)
        local = Path(path)
        local = local / MANIFEST_NAME if local.is_dir() else local
        try:
            return cls.from_bytes(local.read_bytes(), str(local))
        except FileNotFoundError:
            raise ValueError(f"{local} is missing; run stage=prepare first") from None

    @classmethod
    def from_bytes(cls, data: bytes, file: str) -> Manifest:
        """A manifest from the text of `file`, which messages name.

        Raises:
            ValueError: broken, or of another schema version.
        """
        try:
            plain = json.loads(data)
            version = plain["schema_version"]
            if version not in _READABLE:
                raise ValueError(
                    f"{file} has schema_version={version}, this program reads "
                    f"{' and '.join(map(str, _READABLE))}; run stage=prepare again"
                )
            splits = {
                name: tuple(ShardRecord(**record) for record in records)
                for name, records in plain.pop("splits").items()
            }
            return cls(splits=splits, **plain)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is no manifest ({error}); delete its folder and run stage=prepare again"
            ) from error


def shard_name(number: int) -> str:
    """File name of a split's shard."""
    return f"shard-{number:05d}.tar"


def record_name(shard: str) -> str:
    """The file that tells of a shard: its record and where in it each sample is."""
    return f"{shard}.json"


def write_shard(
    path: Path, samples: Iterable[Sample], *, first_key: int, source: str, kind: str
) -> ShardRecord:
    """Writes one shard and gives its record; keys count on from `first_key`."""
    with atomic_file(path) as stream:
        return write_samples(
            stream,
            samples,
            first_key=first_key,
            name=f"{path.parent.name}/{path.name}",
            source=source,
            kind=kind,
        )


def write_samples(
    stream: Any,
    samples: Iterable[Sample],
    *,
    first_key: int,
    name: str,
    source: str,
    kind: str,
    places: list[list[int]] | None = None,
) -> ShardRecord:
    """Writes samples as a tar file into a stream that takes bytes, and gives the record.

    Args:
        stream: has `write`.
        samples: in order.
        first_key: number of the first one; keys count on from it.
        name: of the shard, relative to the manifest.
        source: of all samples.
        kind: of all samples.
        places: filled with the offset of each sample's first member and the sizes of all four.
    """
    counts = _Counts()
    digest = _HashingWriter(stream)
    # USTAR: plain fixed headers, no extension records that would depend on the writer.
    with tarfile.open(fileobj=digest, mode="w|", format=tarfile.USTAR_FORMAT) as archive:
        for offset, sample in enumerate(samples):
            members = encode_sample(sample)
            if places is not None:
                places.append([archive.offset, *map(len, members.values())])
            for part, data in members.items():
                info = tarfile.TarInfo(f"{first_key + offset:09d}.{part}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            counts.add(sample.loss_mask, sample.meta)
    return counts.record(name, source, kind, digest.sha256.hexdigest(), digest.num_bytes)


def index_shard(data: BinaryIO, name: str) -> list[dict[str, tuple[int, int]]]:
    """Where each sample's members lie in an open tar file: part -> (offset, size).

    Raises:
        ValueError: truncated, or with anything but plain members of known names (links, paths).
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    _check_end(data, name)
    try:
        with tarfile.open(fileobj=data, mode="r:") as archive:
            for info in archive:
                match = _MEMBER_NAME.fullmatch(info.name)
                if not info.isreg() or match is None:
                    raise ValueError(
                        f"{name} holds {info.name!r}, which is no member of a sample; "
                        "delete it and run stage=prepare again"
                    )
                parts = samples.setdefault(match["key"], {})
                parts[match["part"]] = (info.offset_data, info.size)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(
            f"{name} is no whole tar file ({error}); delete it and run stage=prepare again"
        ) from error
    for key, parts in samples.items():
        if len(parts) != len(MEMBERS):
            raise ValueError(
                f"{name}: sample {key} lacks {sorted(set(MEMBERS) - set(parts))}; "
                "delete it and run stage=prepare again"
            )
    return list(samples.values())


def members_at(places: list[list[int]]) -> list[dict[str, tuple[int, int]]]:
    """What `index_shard` gives, from the places that `write_samples` noted."""
    samples = []
    for offset, *sizes in places:
        parts = {}
        for part, size in zip(MEMBERS, sizes, strict=True):
            parts[part] = (offset + tarfile.BLOCKSIZE, size)
            offset += tarfile.BLOCKSIZE * (1 - (-size // tarfile.BLOCKSIZE))
        samples.append(parts)
    return samples


def load_record(data: bytes) -> tuple[ShardRecord, list[list[int]] | None]:
    """A shard's own record (`shard-00000.tar.json`) and the places of its samples, if it has them.

    Raises:
        ValueError, TypeError: it is none.
    """
    plain = json.loads(data)
    places = plain.pop("samples", None)
    return ShardRecord(**plain), places


def _check_end(data: BinaryIO, name: str) -> None:
    """A whole archive is made of records and ends with two empty blocks."""
    size = data.seek(0, os.SEEK_END)
    if size and size % tarfile.RECORDSIZE == 0:
        data.seek(size - 2 * tarfile.BLOCKSIZE)
        whole = not any(data.read())
    else:
        whole = False
    data.seek(0)
    if not whole:
        raise ValueError(
            f"{name} is no whole tar file ({size} bytes without its end); "
            "delete it and run stage=prepare again"
        )


def read_shard(path: Path) -> Iterator[Sample]:
    """All samples of a shard, in order."""
    with open(path, "rb") as stream:
        yield from read_samples(stream, path.name)


def read_samples(stream: BinaryIO, name: str) -> Iterator[Sample]:
    """All samples of an open shard, in order."""
    for number, parts in enumerate(index_shard(stream, name)):
        yield read_sample(stream, parts, f"{name}, sample {number}")


def sample_span(parts: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """The first byte of a sample's members and the one behind the last."""
    return min(at for at, _ in parts.values()), max(at + size for at, size in parts.values())


def cut_sample(data: bytes, start: int, parts: dict[str, tuple[int, int]], where: str) -> Sample:
    """One sample from the bytes of a shard from `start` on."""
    members = {part: data[at - start : at - start + n] for part, (at, n) in parts.items()}
    return decode_sample(members, where)


def read_sample(stream: BinaryIO, parts: dict[str, tuple[int, int]], where: str) -> Sample:
    """One sample of an open shard by its index entry."""
    descriptor = stream.fileno()
    members = {part: os.pread(descriptor, size, at) for part, (at, size) in parts.items()}
    return decode_sample(members, where)


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class _HashingWriter(io.RawIOBase):
    """Passes bytes on and hashes them."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.num_bytes += len(data)
        self._stream.write(data)
        return len(data)


class _Counts:
    """Adds up a shard's samples."""

    def __init__(self) -> None:
        self.samples = self.tokens = self.loss_tokens = 0

    def add(self, loss_mask: NDArray[np.uint8], meta: dict[str, Any]) -> None:
        self.samples += 1
        self.tokens += len(loss_mask) - int(meta.get("num_padding", 0))
        self.loss_tokens += int(loss_mask.sum())

    def record(self, name: str, source: str, kind: str, sha256: str, size: int) -> ShardRecord:
        return ShardRecord(
            path=name,
            source=source,
            kind=kind,
            num_samples=self.samples,
            num_tokens=self.tokens,
            num_loss_tokens=self.loss_tokens,
            num_bytes=size,
            sha256=sha256,
        )
