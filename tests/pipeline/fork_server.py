"""The real command line in forked processes: the slow imports happen once, a start costs little.

Imported by the servers of test_kill.py and test_relayout.py; those are started as programs, so this
folder is on their path.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

import pipeline.engine
import pipeline.run
import pipeline.stages.convert
import pipeline.stages.prepare
import pipeline.stages.pretrain
import pipeline.summary
import pipeline.tracking
from pipeline.context import StageContext

torch.set_num_threads(1)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(
    words: list[str], num_ranks: int, prepare: Callable[[int], None] | None = None
) -> list[int]:
    """Fork one process for each rank; their ids.

    Args:
        words: of the command line.
        num_ranks: processes that find each other as under torchrun.
        prepare: called with the rank in each of them first.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    port, children = free_port(), []
    for rank in range(num_ranks):
        child = os.fork()
        if child == 0:
            _be_rank(words, rank, num_ranks, port, prepare)
        children.append(child)
    return children


def _be_rank(
    words: list[str], rank: int, num_ranks: int, port: int, prepare: Callable[[int], None] | None
) -> None:
    status = 99
    try:
        if num_ranks > 1:
            place: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()})
        if prepare is not None:
            prepare(rank)
        status = pipeline.run.main(words)
    except BaseException:  # noqa: BLE001 - a forked process must not return into the server
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(children: list[int], timeout_s: float) -> list[int]:
    """Exit codes (negative for a signal); what is left after `timeout_s` is killed, code -1000."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout_s
    while len(codes) < len(children):
        late = time.monotonic() > deadline
        for child in children:
            if child in codes:
                continue
            if late:
                os.kill(child, signal.SIGKILL)
            done, status = os.waitpid(child, 0 if late else os.WNOHANG)
            if done:
                codes[child] = -1000 if late else os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return [codes[child] for child in children]


def is_over(child: int) -> bool:
    """Whether a child has ended by itself; it can still be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def after_steps(stage: str, action: Callable[[int], None]) -> None:
    """Let this process do something when it has logged a step of a stage; it gets the number."""
    log = StageContext.log

    def log_and_act(self: StageContext, number: int, values: Any) -> None:
        log(self, number, values)
        if self.entry == stage:
            action(number)

    StageContext.log = log_and_act  # type: ignore[method-assign]
