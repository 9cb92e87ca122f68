"""Records of a suite's data: JSON lines in a folder, in a zip, or from the hub.

A place that exists on this machine is a folder (or a zip); anything else is the name of a data
set on the hub, whose files are fetched once and kept in the hub's cache. With `HF_HUB_OFFLINE=1`
only that cache is used.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Fields = Mapping[str, type | tuple[type, ...]]


def read_records(
    place: str,
    paths: Sequence[str],
    *,
    suite: str,
    required: Fields,
    archives: Sequence[str] = (),
) -> Iterator[tuple[str, Record]]:
    """The records of one data set, each with where it stands (`FILE:LINE`), checked.

    Args:
        place: folder, zip file, or name on the hub.
        paths: names under which the file may stand in the folder or zip, tried in turn.
        suite: for messages.
        required: fields that each record must have, with their types.
        archives: names of zips that may hold one of `paths`, for folders and the hub.

    Raises:
        ValueError: there is no such file, or a line is no record of this suite.
    """
    lines, name = _open(place, paths, archives, suite)
    seen = False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        seen = True
        where = f"{name}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{where} is not JSON ({error}); {suite} data are one JSON object a line"
            ) from error
        _check(record, required, where, suite)
        yield where, record
    if not seen:
        raise ValueError(f"{name} has no record; give {suite}'s data file, one JSON object a line")


def _check(record: Any, required: Fields, where: str, suite: str) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a {type(record).__name__}, not an object of {suite}")
    missing = [field for field in required if field not in record]
    if missing:
        raise ValueError(
            f"{where} lacks {', '.join(missing)} and has {', '.join(sorted(record)) or 'nothing'}: "
            f"not a record of {suite}; give the folder of {suite}'s own files"
        )
    for field, kind in required.items():
        if not isinstance(record[field], kind):
            raise ValueError(
                f"{where}: {field} is {type(record[field]).__name__} "
                f"({str(record[field])[:40]!r}), not as {suite} has it; give {suite}'s own files"
            )


def _open(
    place: str, paths: Sequence[str], archives: Sequence[str], suite: str
) -> tuple[Iterable[str], str]:
    root = Path(place).expanduser()
    if root.is_file() and zipfile.is_zipfile(root):
        found = _in_zip(root, paths)
        if found is not None:
            return found
        raise ValueError(f"{root} holds none of {', '.join(paths)}; give {suite}'s zip or folder")
    if root.is_dir():
        for path in paths:
            if (root / path).is_file():
                return _lines(root / path), str(root / path)
        for archive in archives:
            if (root / archive).is_file() and (found := _in_zip(root / archive, paths)):
                return found
        wanted = ", ".join([*paths, *archives])
        raise ValueError(f"{root} has none of {wanted}; give the folder of {suite}'s files")
    if place.startswith((".", "/", "~")) or place.count("/") != 1:
        raise ValueError(
            f"{place!r} is neither a folder nor a zip here nor an OWNER/NAME on the hub; "
            f"give where {suite}'s data are"
        )
    return _from_hub(place, paths, archives, suite)


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield from file


def _in_zip(path: Path, names: Sequence[str]) -> tuple[Iterator[str], str] | None:
    """Lines of the first member whose path is, or ends in, one of the names."""
    with zipfile.ZipFile(path) as archive:
        members = archive.namelist()
    for name in names:
        for member in members:
            if member == name or member.endswith("/" + name):
                return _zip_lines(path, member), f"{path}:{member}"
    return None


def _zip_lines(path: Path, member: str) -> Iterator[str]:
    with zipfile.ZipFile(path) as archive, archive.open(member) as file:
        yield from io.TextIOWrapper(file, encoding="utf-8")


def _from_hub(
    name: str, paths: Sequence[str], archives: Sequence[str], suite: str
) -> tuple[Iterable[str], str]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    why = "it has none of them"
    for file in [*archives, *paths]:
        try:
            path = Path(hf_hub_download(name, file, repo_type="dataset"))
        except LocalEntryNotFoundError as error:
            why = f"the hub does not answer and the cache lacks it ({str(error).splitlines()[0]})"
            break
        except EntryNotFoundError:
            continue
        except (OSError, ValueError) as error:
            why = str(error).splitlines()[0]
            break
        if not zipfile.is_zipfile(path):
            return _lines(path), f"{name}:{file}"
        if found := _in_zip(path, paths):
            return found
    raise ValueError(
        f"{suite} data {name!r}: cannot get {', '.join([*archives, *paths])}: {why}; "
        f"copy {suite}'s files to a folder and name it instead"
    )


def texts(record: Record, field: str, where: str) -> tuple[str, ...]:
    """A field's list of texts (one text counts as a list of one).

    Raises:
        ValueError: it is empty, or holds something else than texts.
    """
    value = record[field]
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(x, str) for x in values):
        raise ValueError(f"{where}: {field} is not a list of texts; mend the data file")
    if not values:
        raise ValueError(
            f"{where}: {field} is an empty list, so nothing can be scored; "
            "mend or remove the record"
        )
    return tuple(values)
