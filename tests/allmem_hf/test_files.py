"""Folders that are replaced whole, also when a process is killed in the worst moment."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from allmem_hf.files import replace_folder, restore_folder


def folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


def killed_between_renames(act: Callable[[], object]) -> None:
    """Run `act` in a child that dies as soon as it has put a folder aside as `.NAME.old`."""
    child = os.fork()
    if child == 0:
        rename = Path.rename

        def once(path: Path, target: Path) -> Path:
            rename(path, target)
            if Path(target).suffix == ".old":
                os.kill(os.getpid(), signal.SIGKILL)
            return target

        Path.rename = once  # type: ignore[method-assign,assignment]
        try:
            act()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_kill_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    old, new = folder(tmp_path / "model", "old"), folder(tmp_path / "new", "new")
    killed_between_renames(lambda: replace_folder(new, old))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.old", "new"]
    restore_folder(old)
    assert (old / "file").read_text() == "old"
    killed_between_renames(lambda: replace_folder(new, old))
    replace_folder(new, old)  # the next one
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (old / "file").read_text() == "new"


def test_a_rename_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    old = folder(tmp_path / "model", "old")
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "absent", old)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_whole_folder_wins_over_one_put_aside(tmp_path: Path) -> None:
    whole, aside = folder(tmp_path / "model", "new"), folder(tmp_path / ".model.old", "old")
    restore_folder(whole)
    assert (whole / "file").read_text() == "new"
    replace_folder(folder(tmp_path / "newer", "newer"), whole)
    assert (whole / "file").read_text() == "newer"
    assert not aside.exists()
