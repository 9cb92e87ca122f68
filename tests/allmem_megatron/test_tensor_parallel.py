"""Two tensor-parallel ranks compute the same function and gradients as one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("tp_worker.py")
ROOT = Path(__file__).parents[2]


def launch(out: Path, tp: int) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(tp),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    arguments = [sys.executable, str(WORKER), str(out), str(tp)]
    return [
        subprocess.Popen(
            arguments,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(tp)
    ]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """Results of one rank and of two, by number of ranks."""
    folder = tmp_path_factory.mktemp("tp")
    found = {}
    for tp in (1, 2):
        ranks = launch(folder / f"tp{tp}.pt", tp)
        try:
            errors = [rank.communicate(timeout=240)[1] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert all(rank.returncode == 0 for rank in ranks), errors[0][-3000:]
        found[tp] = torch.load(folder / f"tp{tp}.pt")
    return found


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "tp_sp"])
@pytest.mark.parametrize("mode", ["allmem", "mamba2", "full"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_tp2_matches_one_rank(sequence_parallel, mode, packed, layouts):
    one = layouts[1][mode, packed, False]
    two = layouts[2][mode, packed, sequence_parallel]
    assert one.keys() == two.keys()
    for name in one:
        if isinstance(one[name], dict):
            assert one[name].keys() == two[name].keys()
            for parameter, gradient in one[name].items():
                largest = gradient.abs().max()
                assert largest > 0, parameter
                torch.testing.assert_close(
                    two[name][parameter], gradient, rtol=1e-4, atol=1e-4 * float(largest)
                )
        else:
            torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-5)
