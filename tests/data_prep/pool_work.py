"""What processes of the pool do in tests: by the task they answer, fail or die."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable


def setup(offset: int) -> Callable[[int], tuple[int, int]]:
    """Gives the work: task -1 fails, -2 dies, others are answered with the process's number."""

    def work(task: int) -> tuple[int, int]:
        if task == -1:
            raise ValueError("task=-1 must not be negative; give another one")
        if task == -2:
            os.kill(os.getpid(), signal.SIGKILL)
        return task + offset, os.getpid()

    return work
