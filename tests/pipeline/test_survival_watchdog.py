"""The watchdog on real collectives: three gloo ranks, started once, wait for each other in turn."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.survival import EXIT_HANG

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("watchdog_worker.py")
HERE = "tests/pipeline/watchdog_worker.py:"


def start_ranks(
    number: int, command: list[str], folder: Path, environment: dict[str, str]
) -> list[subprocess.Popen[bytes]]:
    """Start ranks directly, as srun does: no launcher ends them when one of them ends."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={
                **environment, "RANK": str(rank), "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            },
            stdout=(folder / f"out-{rank}").open("w"),
            stderr=(folder / f"err-{rank}").open("w"),
        )
        for rank in range(number)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> dict[str, str]:
    """What rank 0 said in each part; exit codes and what rank 1 said beside them."""
    folder = tmp_path_factory.mktemp("watchdog")
    ranks = start_ranks(3, [str(WORKER), str(folder)], folder, {**os.environ, **environment})
    try:
        codes = [rank.wait(timeout=180) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    text = (folder / "err-0").read_text()
    parts = dict(part.split("\n", 1) for part in text.split("== ")[1:])
    further = {name: (folder / name).read_text() for name in ("err-1", "seconds-0")}
    return {**parts, **further, "codes": str(codes)}


def calls(text: str) -> str:
    """Without what differs from run to run: seconds and lines of the worker."""
    return re.sub(r"worker\.py:\d+", "worker.py:N", re.sub(r"for \d+ s", "for N s", text))


def test_the_rank_that_is_late_to_a_reduction_is_named(told: dict[str, str]):
    text = calls(told["late_to_a_reduction"])
    assert text.startswith(
        "no progress for N s:\n"
        f"  ranks 0 and 2: in all_reduce float32[8, 2] over ranks 0-2 ({HERE}N), step 1, for N s\n"
        "  rank 1: computing, step 1, after barrier "
    )
    assert "  the others wait for rank 1\n" in text


def test_a_chain_of_receivers_leads_to_the_rank_that_computes(told: dict[str, str]):
    text = calls(told["late_to_send"])
    wait = f"in wait for irecv bfloat16[4] with rank {{}} ({HERE}N), step 2"
    assert f"rank 1: {wait.format(0)}" in text
    assert f"rank 2: {wait.format(1)}" in text
    assert "the others wait for rank 0\n" in text


def test_a_helper_is_shown_where_it_is_called(told: dict[str, str]):
    assert re.search(rf"in all_reduce float64\[1\] over ranks 0-2 \({HERE}\d+\)",
                     told["late_to_a_sum"])  # fmt: skip
    assert "the others wait for rank 2\n" in told["late_to_a_sum"]


def test_ranks_that_wait_for_a_rank_of_another_group_lead_to_it(told: dict[str, str]):
    text = told["late_in_a_group"]
    assert "rank 0: in barrier over ranks 0-2" in text
    assert "rank 2: in all_gather float32[3] over ranks 1 and 2" in text
    assert "the others wait for rank 1\n" in text


def test_batched_point_to_point_operations_work_as_without_the_watchdog(told: dict[str, str]):
    assert told["batched"] == ""


def test_a_hang_ends_the_run_with_the_table(told: dict[str, str]):
    assert told["codes"] == str([EXIT_HANG] * 3)
    text = told["never"]
    assert "error: no progress for" in text
    assert "rank 0: in broadcast float32[5] over ranks 0-2" in text
    assert "rank 1: leaves" in told["err-1"]


def test_a_call_costs_some_microseconds_more(told: dict[str, str]):
    assert float(told["seconds-0"]) < 100e-6  # about 10 on an idle core
