"""Clusters for the tests here: one of two nodes for each file that asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import SlurmCluster, skip_without_slurm


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    """A Slurm of two nodes; skips, with the reason, where there can be none."""
    skip_without_slurm()
    with SlurmCluster(2) as started:
        yield started
