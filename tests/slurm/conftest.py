"""Clusters and small runs for the tests here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.tokenizer import train_sentencepiece
from tests.pipeline.conftest import library_text
from tests.slurm.cluster import SlurmCluster, skip_without_slurm

JOB_ENV = {"ALLMEM_ENV": sys.prefix, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
"""Site settings of the jobs: this Python."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A Slurm of two nodes for the tests of a file; skips, with the reason, where there is none."""
    skip_without_slurm()
    scratch = tmp_path_factory.mktemp("scratch")
    env = {**JOB_ENV, "ALLMEM_SCRATCH": str(scratch), "ALLMEM_PREFLIGHT": "0"}
    with SlurmCluster(2, env=env) as started:
        yield started


@pytest.fixture(scope="session")
def tiny_words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words for `recipe=tiny` on a small text, one thread a rank; MLflow as it is by default."""
    folder = tmp_path_factory.mktemp("tiny")
    text = library_text(60_000)
    (folder / "text.txt").write_text(text, encoding="utf-8")
    tokenizer = train_sentencepiece([text], 640, folder / "tokenizer")
    file = folder / "text.txt"
    return [
        "recipe=tiny",
        f"data.tokenizer='{tokenizer}'",
        f"data.sources=[{{kind: text, name: code, path: '{file}', eval_path: '{file}'}}]",
        "data.seq_length=64",
        "data.train_samples=48",
        "data.eval_samples=8",
        "parallel.num_threads=1",
    ]


def shape(folder: Path, *, nodes: int) -> list[str]:
    """What takes a job script from 8 GPUs a node to one task a node without any."""
    words = ["--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0"]
    return [*words, f"--nodes={nodes}", f"--output={folder}/%x-%j.out"]
