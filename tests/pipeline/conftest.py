"""Fixtures of the pipeline's tests: a small tokenizer, a text, and the real command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.tokenizer import train_sentencepiece

ROOT = Path(__file__).resolve().parents[2]


def library_text(num_characters: int) -> str:
    """Python source that every machine has, in a fixed order."""
    folder = Path(sysconfig.get_paths()["stdlib"]) / "json"
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))
    return (text * (num_characters // len(text) + 1))[:num_characters]


@pytest.fixture(scope="session")
def tiny_overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that make `recipe=tiny` independent of files of the repository."""
    folder = tmp_path_factory.mktemp("tiny")
    text = library_text(60_000)
    (folder / "text.txt").write_text(text, encoding="utf-8")
    tokenizer = train_sentencepiece([text], 640, folder / "tokenizer")
    source = (
        f"{{kind: text, name: code, path: '{folder}/text.txt', eval_path: '{folder}/text.txt'}}"
    )
    return [
        "recipe=tiny",
        f"data.tokenizer='{tokenizer}'",
        f"data.sources=[{source}]",
        "data.seq_length=64",
        "data.train_samples=48",
        "data.eval_samples=8",
        "tracking=none",
        "parallel.num_threads=1",
    ]


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """One thread a process: tests share few cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def cli(environment: dict[str, str]) -> Cli:
    """Call `python -m pipeline.run` as a user does."""

    def call(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.run", *words],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if check:
            assert done.returncode == 0, done.stderr
        return done

    return call


@pytest.fixture(scope="session")
def metrics_of() -> Callable[[Path], list[dict[str, Any]]]:
    """Reads the lines of a stage's `metrics.jsonl`."""

    def read(stage_dir: Path) -> list[dict[str, Any]]:
        text = (stage_dir / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    return read
