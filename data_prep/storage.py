"""Where shards are kept: a folder, or a place that fsspec reaches (s3://…, gs://…, memory://…).

In a folder a file appears under its name only when it is whole. Other stores have no such renaming,
so there a shard counts only with its record, which is written after it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from data_prep.atomic import PARTIAL, atomic_file
from data_prep.shards import Manifest, file_sha256

_CHUNK = 1 << 20


class Writable(Protocol):
    """What a file is written through."""

    def write(self, data: Any, /) -> Any:
        """Appends bytes."""
        ...


class Storage(Protocol):
    """A place with named files; names have `/` between folders."""

    @property
    def url(self) -> str:
        """The place, for messages and for other programs."""
        ...

    def names(self, folder: str) -> set[str]:
        """Names of the files in a folder (`train` → `train/shard-00000.tar`, …)."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where it is not there."""
        ...

    def read(self, name: str) -> bytes:
        """A small file.

        Raises:
            FileNotFoundError: it is not there.
        """
        ...

    def sha256(self, name: str) -> str:
        """SHA-256 (hex) of a file."""
        ...

    def create(self, name: str) -> contextlib.AbstractContextManager[Writable]:
        """A new file that is whole when the block ends well.

        Raises:
            OSError: the disk is full; nothing is left of it.
        """
        ...

    def delete(self, name: str) -> None:
        """Deletes a file that may be there."""
        ...

    def delete_partials(self, folder: str) -> None:
        """Deletes what killed processes of this owner left half written."""
        ...

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes `start:stop` of a file.

        Raises:
            FileNotFoundError: it is not there.
        """
        ...

    def open(self, name: str) -> io.BufferedReader:
        """A file that is open for reading and has a descriptor (`fileno`).

        Raises:
            FileNotFoundError: it is not there.
        """
        ...


class LocalStorage:
    """A folder.

    Args:
        folder: made where it is missing, once something is written.
        owner: part of temporary names, where several workers write.
    """

    def __init__(self, folder: Path, *, owner: str = "") -> None:
        self.folder, self._owner = folder, owner

    @property
    def url(self) -> str:
        """The folder."""
        return str(self.folder)

    def names(self, folder: str) -> set[str]:
        """As `Storage` says."""
        place = self.folder / folder
        return {f"{folder}/{name}" for name in os.listdir(place)} if place.is_dir() else set()

    def size(self, name: str) -> int | None:
        """As `Storage` says."""
        try:
            return (self.folder / name).stat().st_size
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        """As `Storage` says."""
        return (self.folder / name).read_bytes()

    def sha256(self, name: str) -> str:
        """As `Storage` says."""
        return file_sha256(self.folder / name)

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[Writable]:
        """As `Storage` says."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, owner=self._owner) as file:
            yield file

    def delete(self, name: str) -> None:
        """As `Storage` says."""
        (self.folder / name).unlink(missing_ok=True)

    def delete_partials(self, folder: str) -> None:
        """As `Storage` says."""
        for path in (self.folder / folder).glob(f"*{self._owner}{PARTIAL}"):
            path.unlink(missing_ok=True)

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """As `Storage` says."""
        with open(self.folder / name, "rb") as stream:
            stream.seek(start)
            return stream.read(stop - start)

    def open(self, name: str) -> io.BufferedReader:
        """As `Storage` says."""
        return open(self.folder / name, "rb")


class RemoteStorage:
    """A place that fsspec reaches.

    Args:
        url: such as `s3://bucket/corpus`.

    Raises:
        ValueError: a protocol that fsspec does not know, or whose package is missing.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self._url = url.rstrip("/")
        try:
            self._fs, self._root = fsspec.url_to_fs(self._url)
        except (ValueError, ImportError) as error:
            raise ValueError(
                f"data.dir={url} cannot be opened: {error}; correct it or install what it names"
            ) from error

    @property
    def url(self) -> str:
        """The URL."""
        return self._url

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def names(self, folder: str) -> set[str]:
        """As `Storage` says."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return set()
        return {f"{folder}/{path.rstrip('/').rpartition('/')[2]}" for path in found}

    def size(self, name: str) -> int | None:
        """As `Storage` says."""
        self._fs.invalidate_cache()
        try:
            return int(self._fs.info(self._path(name))["size"])
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        """As `Storage` says."""
        return bytes(self._fs.cat_file(self._path(name)))

    def sha256(self, name: str) -> str:
        """As `Storage` says."""
        digest = hashlib.sha256()
        with self._fs.open(self._path(name), "rb") as stream:
            while data := stream.read(_CHUNK):
                digest.update(data)
        return digest.hexdigest()

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[Writable]:
        """As `Storage` says; written to a local temporary file first, then sent as a whole."""
        path = self._path(name)
        with tempfile.NamedTemporaryFile(prefix="allmem-") as local:
            yield local
            local.flush()
            try:
                self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
                self._fs.put_file(local.name, path)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"could not write {self._url}/{name} ({error}); see to the store and run the "
                    "same command again, finished shards are kept",
                ) from error

    def delete(self, name: str) -> None:
        """As `Storage` says."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def delete_partials(self, folder: str) -> None:
        """Nothing to do: a file without its record does not count and is written again."""
        del folder

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """As `Storage` says."""
        return bytes(self._fs.cat_file(self._path(name), start=start, end=stop))

    def open(self, name: str) -> io.BufferedReader:
        """As `Storage` says: a local copy, gone when it is closed (or the process ends)."""
        local = tempfile.TemporaryFile(prefix="allmem-")  # noqa: SIM115 - the caller closes it
        try:
            with self._fs.open(self._path(name), "rb") as stream:
                while data := stream.read(_CHUNK):
                    local.write(data)
            local.seek(0)
        except BaseException:
            local.close()
            raise
        return io.BufferedReader(io.FileIO(os.dup(local.fileno()), closefd=True))


def open_storage(place: str | Path, *, owner: str = "") -> Storage:
    """The storage of a folder, a `file://` URL or another fsspec URL."""
    text = str(place)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    return RemoteStorage(text) if "://" in text else LocalStorage(Path(text), owner=owner)


def is_remote(place: str | Path) -> bool:
    """Whether a place is reached by fsspec rather than as a folder."""
    return "://" in str(place) and not str(place).startswith("file://")


def shards_of(manifest: Manifest, place: str | Path) -> Storage:
    """Where a manifest's shards are: its `root`, else beside it.

    Args:
        manifest: loaded from `place`.
        place: manifest.json, or its folder (or URL).
    """
    if manifest.root:
        return open_storage(manifest.root)
    text = str(place)
    return open_storage(text.removesuffix("manifest.json").rstrip("/") or ".")
