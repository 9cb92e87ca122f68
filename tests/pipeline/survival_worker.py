"""One rank of a crew without torch: `python survival_worker.py CASE RANK WORLD FOLDER`.

Rank 0 writes the hub's port and token to FOLDER/hub.json. Every rank writes FOLDER/up-RANK once it
is connected, then does what its case says.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import hang
from pipeline.crew import Crew, aboard, linger
from pipeline.hub import Hub, Patience
from pipeline.survival import RankLostError, StopRequested, exit_code, hearing_signals, stop
from pipeline.wire import connect

PATIENCE = Patience(dead_s=5, warning_s=0, hang_s=1000)
IMPATIENT = Patience(dead_s=5, warning_s=2, hang_s=5)


def wait(crew: Crew, rank: int, folder: Path) -> None:
    """As in a collective: for ever, unless something ends the process."""
    time.sleep(60)


def hold_the_interpreter(crew: Crew, rank: int, folder: Path) -> None:
    """Rank 1 stays in a C call that never gives the interpreter away, longer than `dead_s`."""
    started = time.monotonic()
    if rank == 1:
        ctypes.PyDLL(None).sleep(8)
    else:
        time.sleep(9)
    print(round(time.monotonic() - started))


def fail_alone(crew: Crew, rank: int, folder: Path) -> None:
    """Rank 2 fails by what a user can mend."""
    if rank == 2:
        raise ValueError("lr=-1 must be positive; set lr=1")
    time.sleep(60)


def fail_alike(crew: Crew, rank: int, folder: Path) -> None:
    """All ranks fail by the same, rank 0 the last."""
    time.sleep(0.0 if rank else 0.2)
    raise ValueError("lr=-1 must be positive; set lr=1")


def break_off(crew: Crew, rank: int, folder: Path) -> None:
    """Rank 1 dies; rank 2 sees its connection to rank 1 break, as gloo does."""
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 2:
        time.sleep(0.3)
        raise RuntimeError("Connection closed by peer")
    time.sleep(60)


def leave_a_child(crew: Crew, rank: int, folder: Path) -> None:
    """Rank 1 forks a worker that outlives it."""
    if rank == 1:
        if os.fork() == 0:
            time.sleep(12)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def hear_of_a_stop(crew: Crew, rank: int, folder: Path) -> None:
    """Ends well once anybody was asked to stop."""
    while not stop.requested:
        time.sleep(0.01)
    print(stop.reason)


def be_interrupted(crew: Crew, rank: int, folder: Path) -> None:
    """Rank 0 works where it may be torn off; rank 1 is asked to stop."""
    if rank == 1:
        signal.raise_signal(signal.SIGUSR1)
        time.sleep(1)
    else:
        try:
            with stop.interrupting():
                while True:
                    sum(range(1000))
        finally:
            print("torn off")


def end_well(crew: Crew, rank: int, folder: Path) -> None:
    """Ranks end one after the other, rank 0 first."""
    time.sleep(0.7 * rank)


CASES: dict[str, tuple[Callable[[Crew, int, Path], None], Patience]] = {
    "wait": (wait, PATIENCE),
    "hang": (wait, IMPATIENT),
    "hold": (hold_the_interpreter, PATIENCE),
    "alone": (fail_alone, PATIENCE),
    "alike": (fail_alike, PATIENCE),
    "broken": (break_off, PATIENCE),
    "child": (leave_a_child, PATIENCE),
    "stop": (hear_of_a_stop, PATIENCE),
    "interrupt": (be_interrupted, PATIENCE),
    "well": (end_well, PATIENCE),
}


def state(rank: int) -> dict[str, Any]:
    """All ranks wait in a collective that rank 1 has not come to."""
    counts = {"0": 6 if rank == 1 else 7}
    found = {"watching": True, "step": 12, "counts": counts, "quiet_s": time.monotonic() - START}
    call = {"call": "all_reduce float32[8]", "place": "pipeline/engine.py:210", "group": "0"}
    return found if rank == 1 else {**found, **call, "number": 7, "members": [0, 1, 2]}


START = time.monotonic()


def main() -> int:
    """Join the crew, do what the case says; the exit code."""
    case, rank, world, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    action, patience = CASES[case]
    hang.SILENT_S = 1.5
    note, hub = folder / "hub.json", None
    if rank == 0:
        hub = Hub(world, patience, local_only=True)
        hub.start()
        note.with_suffix(".new").write_text(json.dumps([hub.port, hub.token]))
        note.with_suffix(".new").rename(note)
    while not note.exists():
        time.sleep(0.01)
    port, token = json.loads(note.read_text())
    connection = connect(["127.0.0.1"], port, timeout_s=10)
    crew = Crew(
        rank, connection, token=token, patience=patience, state=lambda: state(rank), beat_s=0.2
    )
    (folder / f"up-{rank}").touch()
    while len(list(folder.glob("up-*"))) < world:
        time.sleep(0.01)
    global START
    START = time.monotonic()
    try:
        with aboard(crew, hub):
            action(crew, rank, folder)
    except ValueError as error:
        if not getattr(error, "told_by_rank_0", False):
            print(f"error on rank {rank}: {error}", file=sys.stderr)
        return 2
    except (RankLostError, StopRequested) as error:
        return exit_code(error)
    return 0


if __name__ == "__main__":
    with hearing_signals():
        status = main()
    linger()
    sys.exit(status)
