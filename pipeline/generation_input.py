"""What the command line of generation reads: texts and files, checked before anything is loaded."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def check_files(prompt_file: str | None, load_state: Path | None, save_state: Path | None) -> None:
    """Look at once whether files can be read and written: reading may take hours until they are.

    Raises:
        ValueError: a file that is not there, or a place where none can be made.
    """
    if prompt_file not in (None, "", "-") and not Path(str(prompt_file)).is_file():
        raise ValueError(f"prompt_file={prompt_file} is not there, or no file; name one, or -")
    if load_state is not None and not load_state.is_file():
        raise ValueError(f"load_state={load_state} is not there, or no file; save one first")
    if save_state is not None:
        folder = next(parent for parent in save_state.absolute().parents if parent.exists())
        if save_state.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(
                f"save_state={save_state} is no file that can be written; name one in a folder "
                "that is yours"
            )


def read_text(path: str) -> str:
    """The whole text of a file, or of standard input for -.

    Raises:
        ValueError: it is empty, or no UTF-8.
    """
    name = f"prompt_file={path}"
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error}); convert it") from error
    if not text:
        raise ValueError(f"{name} is empty; name another file, or give prompt=TEXT alone")
    check_text(name, text)
    return text


def check_text(name: str, text: str) -> None:
    """Refuse bytes that are no UTF-8: Python keeps those of the command line and stdin as marks.

    Raises:
        ValueError: there are some.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 text (at character {error.start}); convert it"
        ) from error
