"""Records of JSON files: lines of a byte range, or the items of one array; memory is bounded."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

_CHUNK = 1 << 20
_BOM = codecs.BOM_UTF8
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Line:
    """A line of a file; `data` is only its begin where it is longer than allowed."""

    number: int
    """From 1, counted from the begin of the range."""
    offset: int
    """Of its first byte in the (decompressed) file."""
    data: bytes
    too_long: bool = False


def read_lines(
    stream: IO[bytes], limit: int, *, start: int = 0, stop: int | None = None
) -> Iterator[Line]:
    """Lines whose first byte lies in `start:stop`; no more than `limit` bytes of one are held.

    A BOM at the begin of the file is left out. Where start > 0 the stream must be seekable.
    """
    offset = start
    if start:
        stream.seek(start - 1)  # a line that begins at `start` has its line end before it
        offset = start - 1 + _skip_line(stream, None if stop is None else stop - start + 1)
    number = 0
    while stop is None or offset < stop:
        data = stream.readline(limit + 1)
        if not data:
            return
        number += 1
        begin, offset = offset, offset + len(data)
        too_long = len(data) > limit and not data.endswith(b"\n")
        if too_long:
            offset += _skip_line(stream, None if stop is None else stop - offset)
            data = data[:1024]
        if begin == 0 and data.startswith(_BOM):
            data = data[len(_BOM) :]
        yield Line(number, begin, data, too_long)


def _skip_line(stream: IO[bytes], most: int | None) -> int:
    """Reads to the end of the line or, where no line of the range can begin, past `most` bytes."""
    skipped = 0
    while most is None or skipped < most:
        data = stream.readline(_CHUNK)
        skipped += len(data)
        if not data or data.endswith(b"\n"):
            break
    return skipped


class BrokenArrayError(ValueError):
    """A JSON array that cannot be read further."""


def read_array(stream: IO[bytes], limit: int) -> Iterator[tuple[int, Any]]:
    """(number from 1, item) of a file that holds one JSON array.

    Args:
        stream: the file's bytes, UTF-8.
        limit: largest item in characters.

    Raises:
        BrokenArrayError: no array, an item that is no JSON or too long, or an early end; items
            before it have been given.
    """
    buffer = _Buffer(stream)
    if buffer.peek() != "[":
        raise BrokenArrayError("the file is no JSON array")
    buffer.at += 1
    if buffer.peek() == "]":
        return
    for number in range(1, 2**62):
        yield number, buffer.item(number, limit)
        following = buffer.peek()
        buffer.at += 1
        if following == "]":
            return
        if following != ",":
            raise BrokenArrayError(f"no comma after item {number}")


class _Buffer:
    """The text of a stream, as far as it is needed, with a place in it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text = ""
        self._ended = False
        self.at = 0

    def _more(self, size: int = _CHUNK) -> None:
        data = self._stream.read(size)
        self._ended = not data
        try:
            text = self._decode.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            raise BrokenArrayError("invalid UTF-8") from error
        self._text = self._text[self.at :] + text
        self.at = 0

    def peek(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            match = _SPACE.match(self._text, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self._text) or self._ended:
                return self._text[self.at : self.at + 1]
            self._more()

    def item(self, number: int, limit: int) -> Any:
        """The JSON value at this place; the buffer grows to twice as much until it is whole."""
        self.peek()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self.at)
                if end < len(self._text) or self._ended:  # a number may go on in the next chunk
                    if end - self.at > limit:
                        raise BrokenArrayError(f"item {number} is longer than {limit} characters")
                    self.at = end
                    return value
            except RecursionError as error:
                raise BrokenArrayError(f"item {number} is nested too deep") from error
            except BrokenArrayError:
                raise
            except ValueError as error:
                if self._ended:
                    raise BrokenArrayError(f"item {number} is no JSON or not whole") from error
            held = len(self._text) - self.at
            if held > limit:
                raise BrokenArrayError(
                    f"item {number} is no JSON or longer than {limit} characters"
                )
            self._more(max(_CHUNK, held))
