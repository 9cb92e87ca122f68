"""Ranks that stay up while tests ask them for one parallel layout after the other."""

from __future__ import annotations

import json
import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("layout_worker.py")
ANSWER_S = 180.0
"""Seconds that a case may take, the start of the processes included."""


class RankCrew:
    """Some processes of `layout_worker.py`, and what they have computed.

    Args:
        num_ranks: of the processes.
        folder: for their results and messages.
    """

    def __init__(self, num_ranks: int, folder: Path) -> None:
        self.num_ranks, self.folder = num_ranks, folder
        self.results: dict[str, Any] = {}
        self._processes: list[subprocess.Popen[str]] = []

    def start(self) -> None:
        """Start the processes; the first case waits for them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(self.num_ranks),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        for rank in range(self.num_ranks):
            with (self.folder / f"rank{rank}of{self.num_ranks}.err").open("a") as messages:
                process = subprocess.Popen(
                    [sys.executable, str(WORKER)],
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=messages,
                    text=True,
                    bufsize=1,
                )
            self._processes.append(process)

    def run(self, case: dict[str, Any]) -> dict[str, Any]:
        """What rank 0 computed for a case; asked once, then remembered."""
        key = json.dumps(case, sort_keys=True)
        if key not in self.results:
            if not self._processes:
                self.start()
            path = self.folder / f"{self.num_ranks}_{len(self.results)}.pt"
            for process in self._processes:
                assert process.stdin is not None
                process.stdin.write(json.dumps({**case, "path": str(path)}) + "\n")
            self._wait(case)
            self.results[key] = torch.load(path)
        return self.results[key]

    def _wait(self, case: dict[str, Any]) -> None:
        waiting = dict(enumerate(self._processes))
        errors: dict[int, str] = {}
        deadline = time.monotonic() + ANSWER_S
        with selectors.DefaultSelector() as selector:
            for rank, process in waiting.items():
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ, rank)
            while waiting and (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    rank = key.data
                    line = waiting.pop(rank).stdout.readline()  # type: ignore[union-attr]
                    selector.unregister(key.fileobj)
                    answer = json.loads(line) if line else "the process has ended"
                    if answer is not None:
                        errors[rank] = answer
        if waiting or errors:
            self.stop()  # what a failed case leaves in flight would meet the next one
            told = "\n".join(f"rank {rank}: {text}" for rank, text in sorted(errors.items()))
            messages = (self.folder / f"rank0of{self.num_ranks}.err").read_text()[-2000:]
            pytest.fail(f"{case}\nno answer from ranks {sorted(waiting)}\n{told}\n{messages}")

    def stop(self) -> None:
        """End the processes; the next case starts others."""
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes.clear()


@pytest.fixture(scope="session")
def crews(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, RankCrew]]:
    """Crews of one rank and of four."""
    folder = tmp_path_factory.mktemp("layouts")
    found = {number: RankCrew(number, folder) for number in (1, 4)}
    for crew in found.values():
        crew.start()
    yield found
    for crew in found.values():
        crew.stop()
