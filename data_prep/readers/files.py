"""Files by path, folder, glob or fsspec URL, and their bytes, decompressed in bounded memory."""

from __future__ import annotations

import fnmatch
import glob
import gzip
import io
import lzma
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

COMPRESSED_SUFFIXES = (".gz", ".xz", ".zst")
_ZSTD_FEED = 1 << 10
"""Compressed bytes a step: a frame of zeros grows 32,768-fold, so a step gives at most 32 MiB."""


@dataclass(frozen=True)
class FileEntry:
    """A file that was found."""

    path: str
    label: str
    """Its path below the folder (or the fixed part of the glob) that was searched."""
    size: int
    """In bytes."""


def is_url(path: str) -> bool:
    """Whether a path names another file system, as fsspec writes it (`s3://…`)."""
    return "://" in path


def list_files(path: str, pattern: str = "*") -> list[FileEntry]:
    """Files of a path, sorted by name.

    Args:
        path: a file, a folder searched recursively, or a glob, local or an fsspec URL.
        pattern: names to take in a folder.

    Raises:
        ValueError: nothing there.
    """
    found = _list_remote(path, pattern) if is_url(path) else _list_local(path, pattern)
    if not found:
        raise ValueError(f"path={path} names no file (pattern {pattern!r}); correct it")
    return sorted(found, key=lambda entry: entry.label)


def find_files(path: str, pattern: str = "*") -> list[Path]:
    """Local files of a path (a file, a folder searched recursively, or a glob), sorted by name.

    Raises:
        ValueError: nothing there.
    """
    return sorted(Path(entry.path) for entry in list_files(path, pattern))


def _list_local(path: str, pattern: str) -> list[FileEntry]:
    base = Path(path)
    if base.is_file():
        return [FileEntry(str(base), base.name, base.stat().st_size)]
    if base.is_dir():
        root, files = base, [file for file in base.rglob(pattern) if file.is_file()]
    else:
        root = Path(_fixed_part(path))
        files = [Path(name) for name in glob.glob(path, recursive=True) if Path(name).is_file()]
    return [
        FileEntry(str(file), file.relative_to(root).as_posix(), file.stat().st_size)
        for file in files
    ]


def _fixed_part(path: str) -> str:
    """The folder before the first part of a glob with a wildcard."""
    parts = Path(path).parts
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return str(Path(*parts[:fixed])) if fixed else "."


def _list_remote(path: str, pattern: str) -> list[FileEntry]:
    from fsspec.core import url_to_fs

    system, root = url_to_fs(path)
    if system.isfile(root):
        entries = {root: system.info(root)}
        base = root.rpartition("/")[0]
    elif system.isdir(root):
        entries = {
            name: info
            for name, info in system.find(root, detail=True).items()
            if fnmatch.fnmatch(name.rpartition("/")[2], pattern)
        }
        base = root
    else:
        entries = system.glob(root, detail=True)
        base = _fixed_part(root)
    return [
        FileEntry(
            system.unstrip_protocol(name),
            name.removeprefix(base).lstrip("/"),
            int(info.get("size") or 0),
        )
        for name, info in entries.items()
        if info["type"] == "file"
    ]


def open_raw(path: str) -> IO[bytes]:
    """The bytes of a file as they are; local or an fsspec URL."""
    if is_url(path):
        import fsspec

        return cast(IO[bytes], fsspec.open(path, "rb").open())
    return open(path, "rb")


def open_bytes(path: str) -> IO[bytes]:
    """The bytes of a file, decompressed where its name ends in .gz, .xz or .zst.

    Reading raises what `is_archive_error` knows where the file is truncated or corrupt.
    """
    if path.endswith(".gz"):
        return cast(IO[bytes], gzip.open(open_raw(path), "rb"))
    if path.endswith(".xz"):
        return cast(IO[bytes], lzma.open(open_raw(path), "rb"))
    if path.endswith(".zst"):
        import zstandard

        reader = _ZstdReader(open_raw(path), zstandard.ZstdDecompressor())
        return cast(IO[bytes], io.BufferedReader(reader, 1 << 20))
    return open_raw(path)


class _ZstdReader(io.RawIOBase):
    """A zstd file, frame after frame; unlike zstandard's reader it tells a truncated one."""

    def __init__(self, stream: IO[bytes], decompressor: Any) -> None:
        self._stream = stream
        self._decompressor = decompressor
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """As `io.RawIOBase` says."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As `io.RawIOBase` says; raises EOFError where the last frame is not whole."""
        while not self._ready:
            rest = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            data = rest or self._stream.read(_ZSTD_FEED)
            if not data:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("zstd frame ended early")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(data))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        """As `io.RawIOBase` says."""
        self._stream.close()
        super().close()


def is_archive_error(error: Exception) -> bool:
    """Whether reading failed because a compressed file is truncated or corrupt."""
    known = (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error)
    return isinstance(error, known) or type(error).__module__.startswith("zstandard")
