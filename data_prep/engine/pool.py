"""A few processes of our own that work on tasks, their results in order.

They are started as fresh interpreters (no fork: the parent may hold CUDA, threads and locks) that
import no more than the work needs, and end by themselves when the parent is gone, also by SIGKILL.
With one process the work is done right here.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

_MAX_DEFAULT = 8
_AHEAD = 3
"""Tasks for each process that are read, worked on or waiting to be taken, so that memory is
bounded."""
_CODE = "import sys; from data_prep.engine.pool import serve; serve(int(sys.argv[1]))"

Work = Callable[[Any], Any]
Setup = Callable[..., Work]
"""Called once in each process; gives the function that does a task."""


def choose_processes(configured: int, *, pays: bool = True) -> int:
    """How many processes to use: as configured, else by the cores this process may use.

    Args:
        configured: `data.num_processes`; 0 leaves the choice.
        pays: whether there is enough work to make up for starting processes.
    """
    if configured:
        return configured
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's
    cores = max(1, len(os.sched_getaffinity(0)) // ranks_here)
    return min(cores, _MAX_DEFAULT) if pays else 1


class Pool:
    """Processes that each call `setup(*arguments)` once and then do tasks.

    Args:
        setup: a function of a module; gives the work.
        arguments: its arguments; they, tasks and results are pickled.
        num_processes: 1 does the work in this process.
    """

    def __init__(self, setup: Setup, arguments: tuple[Any, ...], num_processes: int) -> None:
        self.num_processes = num_processes
        self._setup, self._arguments = setup, arguments
        self._work: Work | None = None
        self._processes: list[_Process] = []
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def map(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """Results in the order of the tasks, which are read no further ahead than needed.

        Raises:
            OSError: a process was killed.
            Exception: what the work raised.
        """
        if self.num_processes == 1:
            if self._work is None:
                self._work = self._setup(*self._arguments)
            yield from map(self._work, tasks)
            return
        self._start()
        assert self._threads is not None
        running: deque[Future[Any]] = deque()
        for task in tasks:
            running.append(self._threads.submit(self._call, task))
            if len(running) >= _AHEAD * self.num_processes:
                yield running.popleft().result()
            while running and running[0].done():
                yield running.popleft().result()
        while running:
            yield running.popleft().result()

    def close(self) -> None:
        """End the processes, whatever they are at."""
        for process in self._processes:
            process.kill()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        self._processes, self._threads, self._work = [], None, None

    def _start(self) -> None:
        if self._processes:
            return
        first = pickle.dumps((self._setup, self._arguments), protocol=5)
        self._processes = [_Process(first) for _ in range(self.num_processes)]
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(self.num_processes, thread_name_prefix="prepare")

    def _call(self, task: Any) -> Any:
        process = self._idle.get()
        try:
            good, result = process.call(task)
        finally:
            self._idle.put(process)
        if not good:
            raise result
        return result


class _Process:
    """One process and the pipe to it."""

    def __init__(self, first: bytes) -> None:
        self._connection, theirs = Pipe()
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        # Each process is one core's worth: neither the tokenizer nor NumPy starts threads.
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment = {
            **os.environ,
            **single,
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(paths),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        theirs.close()
        self._first: bytes | None = first

    def call(self, task: Any) -> tuple[bool, Any]:
        """(True, result) or (False, error)."""
        try:
            if self._first is not None:
                self._connection.send_bytes(self._first)
                self._first = None
            self._connection.send(task)
            answer: tuple[bool, Any] = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            status = self._process.wait()
            raise OSError(
                f"a process of the preparation ended with status {status} "
                f"({'out of memory?' if status == -signal.SIGKILL else 'see above'}); run the same "
                "command again, finished work is kept, with a smaller data.num_processes if "
                "memory is short"
            ) from error
        return answer

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.wait()
        self._connection.close()


def serve(descriptor: int) -> None:
    """What a process does: set up, then task after task until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and ends us
    with Connection(descriptor) as connection, contextlib.suppress(EOFError, ConnectionError):
        setup, arguments = pickle.loads(connection.recv_bytes())  # noqa: S301 - the parent's own
        work: Work | None = None
        while True:
            task = connection.recv()
            try:
                if work is None:
                    work = setup(*arguments)
                answer = (True, work(task))
            except Exception as error:  # noqa: BLE001 - raised again in the parent
                answer = (False, _sendable(error))
            connection.send(answer)


def _sendable(error: Exception) -> Exception:
    """The error itself where it can be pickled, else one with its text."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - made here
    except Exception:  # noqa: BLE001 - whatever an error's own pickling raises
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
