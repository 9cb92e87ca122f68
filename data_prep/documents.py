"""Readers: every source of text as a stream of `Document`, in an order that never changes.

What cannot be read (invalid UTF-8, broken JSON, a missing field) is counted in a `ReadReport` with
file and line; `ReadReport.check` stops the job where it is more than a given share.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from data_prep.config import SourceConfig

_JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst")
_MAX_EXAMPLES = 20


@dataclass(frozen=True)
class Document:
    """One document as read; `messages` only for kind `chat`, whose text is empty."""

    text: str
    id: str
    source: str
    kind: str = "text"
    messages: tuple[dict[str, str], ...] = ()


@dataclass
class ReadReport:
    """What was read and what was not, with examples of the latter."""

    num_documents: int = 0
    num_characters: int = 0
    num_bad: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def bad(self, reason: str, where: str) -> None:
        """Counts a record that could not be read."""
        self.num_bad += 1
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if len(self.examples) < _MAX_EXAMPLES:
            self.examples.append(f"{where}: {reason}")

    def check(self, source: str, max_bad_fraction: float) -> None:
        """Raises ValueError when more than the allowed share of the records is bad."""
        total = self.num_documents + self.num_bad
        if total and self.num_bad > max_bad_fraction * total:
            raise ValueError(
                f"source {source}: {self.num_bad} of {total} records are unreadable, more than "
                f"max_bad_fraction={max_bad_fraction} (first: {self.examples[0]}); mend the "
                "files or raise data.max_bad_fraction"
            )


def read_documents(
    config: SourceConfig,
    *,
    evaluation: bool = False,
    keep: Callable[[str], bool] | None = None,
    report: ReadReport | None = None,
) -> Iterator[Document]:
    """Documents of a source's own text (for generated sources: of their filler), in a fixed order.

    Args:
        config: the source.
        evaluation: read `eval_path` or `eval_packages` instead of `path` and `packages`.
        keep: which documents (by id) or packages (by name) to read; all where None.
        report: filled while reading.

    Raises:
        ValueError: path or package not there.
    """
    report = ReadReport() if report is None else report
    kind = config.filler if config.generated else config.kind
    if kind == "python_packages":
        names = config.eval_packages if evaluation else config.packages
        if keep is not None:
            names, keep = tuple(name for name in names if keep(name)), None
        stream = _read_packages(names, config, report)
    else:
        path = config.eval_path if evaluation else config.path
        if path is None:
            return
        if kind == "text":
            stream = _read_text_files(path, config, report)
        else:
            stream = _read_jsonl_files(path, config, report, chat=kind == "chat_jsonl")
    for document in stream:
        if keep is not None and not keep(document.id):
            continue
        if config.max_documents is not None and report.num_documents >= config.max_documents:
            return
        limit = config.max_characters
        if limit is not None and report.num_characters >= limit:
            return
        report.num_documents += 1
        report.num_characters += len(document.text)
        yield document


def find_files(path: str, pattern: str = "*") -> list[Path]:
    """Files of a path (a file, a folder searched recursively, or a glob), sorted by name.

    Raises:
        ValueError: nothing there.
    """
    base = Path(path)
    if base.is_file():
        return [base]
    if base.is_dir():
        found = [p for p in base.rglob(pattern) if p.is_file()]
    else:
        found = [Path(p) for p in glob.glob(path, recursive=True) if Path(p).is_file()]
    if not found:
        raise ValueError(f"path={path} names no file (pattern {pattern!r}); correct it")
    return sorted(found)


def package_files(name: str) -> list[tuple[str, Path]]:
    """(id, file) of an installed package's .py files, sorted by id; a module is one file.

    Raises:
        ValueError: not installed, or without source files.
    """
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None:
        raise ValueError(
            f"package {name!r} is not installed here; install it or take it out of packages"
        )
    files: list[tuple[str, Path]] = []
    roots = list(spec.submodule_search_locations or [])
    for root in roots:
        for file in Path(root).rglob("*.py"):
            files.append((f"{name}/{file.relative_to(root).as_posix()}", file))
    if not roots and spec.origin and spec.origin.endswith(".py"):
        files.append((f"{name}.py", Path(spec.origin)))
    if not files:
        raise ValueError(f"package {name!r} has no .py files; take it out of packages")
    return sorted(files)


def _read_packages(
    names: tuple[str, ...], config: SourceConfig, report: ReadReport
) -> Iterator[Document]:
    files = [pair for name in names for pair in package_files(name)]
    yield from _read_files(files, config, report)


def _read_text_files(path: str, config: SourceConfig, report: ReadReport) -> Iterator[Document]:
    base = Path(path)
    files = [
        (file.relative_to(base).as_posix() if base.is_dir() else file.name, file)
        for file in find_files(path, config.pattern)
    ]
    yield from _read_files(files, config, report)


def _read_files(
    files: list[tuple[str, Path]], config: SourceConfig, report: ReadReport
) -> Iterator[Document]:
    """A document a file, in the configured order."""
    if config.file_order == "hashed":
        files = sorted(files, key=lambda pair: hashlib.sha256(pair[0].encode()).digest())
    for identity, file in files:
        text = _read_utf8(file, identity, report)
        if text is not None:
            yield Document(text, identity, config.name)


def _read_utf8(file: Path, identity: str, report: ReadReport) -> str | None:
    """The file's text, or None, counted, where it is not UTF-8 or empty."""
    data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        report.bad(f"invalid UTF-8 (byte {error.start})", identity)
        return None
    return text or None  # an empty file is no document: nothing is lost with it


def _open(file: Path) -> IO[bytes]:
    if file.suffix == ".gz":
        return cast(IO[bytes], gzip.open(file, "rb"))
    if file.suffix == ".xz":
        return cast(IO[bytes], lzma.open(file, "rb"))
    if file.suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise ValueError(
                f"{file.name} needs the package zstandard: pip install zstandard"
            ) from error
        decompressor = zstandard.ZstdDecompressor()
        return cast(IO[bytes], io.BufferedReader(_ZstdReader(file, decompressor), 1 << 20))
    return open(file, "rb")


class _ZstdReader(io.RawIOBase):
    """A zstd file, frame after frame; unlike zstandard's reader it tells a truncated one."""

    def __init__(self, file: Path, decompressor: Any) -> None:
        self._stream = open(file, "rb")  # noqa: SIM115 - closed with this reader
        self._decompressor = decompressor
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        """As `io.RawIOBase` says."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As `io.RawIOBase` says; raises EOFError where the last frame is not whole."""
        while not self._ready:
            rest = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            data = rest or self._stream.read(1 << 16)
            if not data:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("zstd frame ended early")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._decompressor.decompressobj()
            self._ready = self._frame.decompress(data)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        """As `io.RawIOBase` says."""
        self._stream.close()
        super().close()


def _read_jsonl_files(
    path: str, config: SourceConfig, report: ReadReport, *, chat: bool
) -> Iterator[Document]:
    files = find_files(path, config.pattern)
    if Path(path).is_dir():
        files = [f for f in files if f.name.endswith(_JSONL_SUFFIXES)]
    for file in files:
        with _open(file) as stream:
            for number, line in enumerate(_lines(stream, file, report), start=1):
                if not line.strip():
                    continue
                where = f"{file.name}:{number}"
                document = _parse_record(line, where, config, report, chat=chat)
                if document is not None:
                    yield document


def _lines(stream: IO[bytes], file: Path, report: ReadReport) -> Iterator[bytes]:
    """Lines of a stream; a truncated or corrupt archive ends it, counted."""
    lines = iter(stream)
    while True:
        try:
            line = next(lines, None)
        except Exception as error:
            if not _is_archive_error(error):
                raise
            report.bad(f"truncated or corrupt archive ({error})", file.name)
            return
        if line is None:
            return
        yield line


def _is_archive_error(error: Exception) -> bool:
    """zstandard's error class is named by module, as the package is optional."""
    return isinstance(error, (EOFError, lzma.LZMAError, gzip.BadGzipFile)) or (
        type(error).__module__.startswith(("zstandard", "zlib"))
    )


def _parse_record(
    line: bytes, where: str, config: SourceConfig, report: ReadReport, *, chat: bool
) -> Document | None:
    try:
        record: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        report.bad(f"invalid UTF-8 (byte {error.start})", where)
        return None
    except (json.JSONDecodeError, RecursionError):
        report.bad("invalid JSON", where)
        return None
    if not isinstance(record, dict):
        report.bad("record is no JSON object", where)
        return None
    identity = str(record.get(config.id_field, where))
    if chat:
        messages: Any = record.get("messages")
        reason = _bad_messages(messages)
        if reason:
            report.bad(reason, where)
            return None
        turns = tuple({"role": m["role"], "content": m["content"]} for m in messages)
        return Document("", identity, config.name, "chat", turns)
    text = record.get(config.text_field)
    if not isinstance(text, str) or not _encodable(text):
        report.bad(f"field {config.text_field!r} is no text", where)
        return None
    return Document(text, identity, config.name) if text else None


def _bad_messages(messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages:
        return "messages missing or empty"
    for message in messages:
        if not isinstance(message, dict):
            return "a message is no object"
        if message.get("role") not in ("system", "user", "assistant"):
            return f"role {message.get('role')!r} is not system, user or assistant"
        if not isinstance(message.get("content"), str) or not _encodable(message["content"]):
            return "a message's content is no text"
    if not any(m["role"] == "assistant" for m in messages):
        return "no assistant message"
    return None


def _encodable(text: str) -> bool:
    """JSON may spell lone surrogates, which are no Unicode text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
