"""A rank that dies, fails or stops is known to the others within seconds.

The ranks are real processes with the real hub and threads, but without torch, so that each case
takes seconds. Cases start side by side; the whole program is tested in `test_survival_run.py`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.survival import EXIT_HANG, EXIT_RANK_LOST, EXIT_REQUEUE, EXIT_USER_ERROR

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("survival_worker.py")


@dataclass(frozen=True)
class Ended:
    """How the ranks of a case ended."""

    codes: list[int]
    errors: list[str]
    outputs: list[str]
    seconds: float
    """From the event, or from the moment when all ranks were up, to the last rank's end."""


class Case:
    """The ranks of one case."""

    def __init__(self, name: str, world: int, folder: Path, event: Callable[[Case], None]) -> None:
        folder.mkdir()
        self.folder, self.event = folder, event
        self.frozen: subprocess.Popen[bytes] | None = None
        self.ranks = [
            subprocess.Popen(
                [sys.executable, str(WORKER), name, str(rank), str(world), str(folder)],
                env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": str(rank)},
                stdout=(folder / f"out-{rank}").open("w"),
                stderr=(folder / f"err-{rank}").open("w"),
            )
            for rank in range(world)
        ]

    def end(self) -> Ended:
        deadline = time.monotonic() + 120
        while len(list(self.folder.glob("up-*"))) < len(self.ranks):
            assert time.monotonic() < deadline, self.texts("err")
            time.sleep(0.02)
        self.event(self)
        started = time.monotonic()
        codes = [rank.wait(timeout=60) for rank in self.ranks if rank is not self.frozen]
        seconds = time.monotonic() - started
        return Ended(codes, self.texts("err"), self.texts("out"), seconds)

    def texts(self, kind: str) -> list[str]:
        return [(self.folder / f"{kind}-{r}").read_text() for r in range(len(self.ranks))]


def send(number: int, rank: int) -> Callable[[Case], None]:
    return lambda case: case.ranks[rank].send_signal(number)


def freeze(rank: int) -> Callable[[Case], None]:
    def event(case: Case) -> None:
        case.frozen = case.ranks[rank]
        case.frozen.send_signal(signal.SIGSTOP)

    return event


def nothing(case: Case) -> None:
    """The ranks themselves make something happen."""


EVENTS: dict[str, tuple[str, int, Callable[[Case], None]]] = {
    "kill_2": ("wait", 4, send(signal.SIGKILL, 2)),
    "kill_0": ("wait", 3, send(signal.SIGKILL, 0)),
    "stop_3": ("stop", 4, send(signal.SIGTERM, 3)),
    "freeze_1": ("hang", 3, freeze(1)),
    **{
        name: (name, 3, nothing)
        for name in ("hang", "hold", "alone", "alike", "broken", "child", "interrupt", "well")
    },
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    folder = tmp_path_factory.mktemp("crews")

    def run(name: str) -> Ended:
        worker, world, event = EVENTS[name]
        case = Case(worker, world, folder / name, event)
        try:
            return case.end()
        finally:
            for rank in case.ranks:
                rank.kill()

    with ThreadPoolExecutor(6) as pool:
        return dict(zip(EVENTS, pool.map(run, EVENTS), strict=True))


def test_a_killed_rank_ends_the_others_within_ten_seconds(ended: dict[str, Ended]):
    case = ended["kill_2"]
    assert case.codes == [EXIT_RANK_LOST, EXIT_RANK_LOST, -signal.SIGKILL, EXIT_RANK_LOST]
    assert case.seconds < 10
    for rank in (0, 1, 3):
        assert f"rank {rank}: rank 2 is gone since " in case.errors[rank]
        assert "its process ended without a word" in case.errors[rank]


def test_the_death_of_rank_0_is_noticed_too(ended: dict[str, Ended]):
    case = ended["kill_0"]
    assert case.codes == [-signal.SIGKILL, EXIT_RANK_LOST, EXIT_RANK_LOST]
    assert case.seconds < 10
    assert all("rank 0 is gone since " in text for text in case.errors[1:])


def test_a_child_that_outlives_its_rank_does_not_hide_its_death(ended: dict[str, Ended]):
    case = ended["child"]
    assert case.codes == [EXIT_RANK_LOST, -signal.SIGKILL, EXIT_RANK_LOST]
    assert case.seconds < 10


def test_a_rank_that_holds_the_interpreter_is_not_taken_for_dead(ended: dict[str, Ended]):
    case = ended["hold"]
    assert case.codes == [0, 0, 0]
    assert int(case.outputs[1]) > 5  # the patience with machines that do not answer
    assert "".join(case.errors) == ""


def test_an_error_of_one_rank_ends_the_others_with_its_code(ended: dict[str, Ended]):
    case = ended["alone"]
    assert case.codes == [EXIT_USER_ERROR] * 3
    assert case.seconds < 10
    assert case.errors[2] == "error on rank 2: lr=-1 must be positive; set lr=1\n"
    assert "rank 2 is gone" in case.errors[0]
    assert "ValueError: lr=-1 must be positive" in case.errors[0]


def test_the_same_error_on_all_ranks_is_printed_once(ended: dict[str, Ended]):
    case = ended["alike"]
    assert case.codes == [EXIT_USER_ERROR] * 3
    assert case.errors == ["error on rank 0: lr=-1 must be positive; set lr=1\n", "", ""]


def test_an_error_that_follows_from_a_death_is_told_as_that_death(ended: dict[str, Ended]):
    case = ended["broken"]
    assert case.codes == [EXIT_RANK_LOST, -signal.SIGKILL, EXIT_RANK_LOST]
    assert "rank 2: rank 1 is gone since " in case.errors[2]
    assert case.errors[2].count("\n") == 1


def test_a_signal_to_one_rank_reaches_all(ended: dict[str, Ended]):
    case = ended["stop_3"]
    assert case.codes == [0, 0, 0, 0]
    assert case.outputs == ["SIGTERM on rank 3\n"] * 3 + ["SIGTERM\n"]
    assert case.errors[0] == "SIGTERM on rank 3: stops and saves as soon as it can\n"


def test_a_signal_to_another_rank_tears_off_what_may_be_torn_off(ended: dict[str, Ended]):
    case = ended["interrupt"]
    assert case.codes == [EXIT_REQUEUE, 0, EXIT_REQUEUE]
    assert case.outputs[0] == "torn off\n"


def test_ranks_that_end_one_after_the_other_are_no_alarm(ended: dict[str, Ended]):
    case = ended["well"]
    assert case.codes == [0, 0, 0]
    assert case.errors == ["", "", ""]


def test_a_hang_is_told_and_ended_with_the_rank_that_is_waited_for(ended: dict[str, Ended]):
    case = ended["hang"]
    assert case.codes == [EXIT_HANG] * 3
    text = case.errors[0]
    assert text.index("\nerror: no progress for ") > text.index("no progress for ")  # warned first
    assert "ranks 0 and 2: in all_reduce float32[8] over ranks 0-2 (pipeline/engine.py:210)" in text
    assert "rank 1: computing, step 12" in text
    assert "the others wait for rank 1" in text


def test_a_frozen_rank_is_named(ended: dict[str, Ended]):
    case = ended["freeze_1"]
    assert case.codes == [EXIT_HANG, EXIT_HANG]  # of those that are not frozen
    assert "rank 1: stopped or held up inside one call (not heard of), step 12" in case.errors[0]
    assert "the others wait for rank 1" in case.errors[0]
