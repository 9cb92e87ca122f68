"""Saving while training goes on, by all ranks.

A save has three parts:

1. *Snapshot*, on the main thread: tensors are put together one at a time over the ranks that share
   them, and each is kept, as a copy on the CPU, by one rank: the one with the fewest bytes so far.
2. *Writing*, in a thread of each rank: its own files into a folder with an unfinished name.
3. *Finishing*, in a thread of rank 0 once all ranks have written: state, the folder's name, and the
   deletion of checkpoints that are not kept.

Threads never communicate. Ranks agree on how far they are in `poll`, which every rank calls once a
step, so that an error of one thread ends all ranks at the same step.
"""

from __future__ import annotations

import copy
import math
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch.distributed as dist
from torch import Tensor, nn

from allmem_megatron.convert import to_hf
from allmem_megatron.model import AllMemGPTModel
from allmem_megatron.sharding import full_of
from pipeline.atomic import UNFINISHED, disk_error, remove, remove_unfinished
from pipeline.checkpoint import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    Checkpoint,
    checkpoint_path,
    finish_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    refuse_other_config,
    shard_files,
    write_shard,
)
from pipeline.context import StageContext
from pipeline.distributed import MainRankFailedError, on_main, sum_over_ranks
from pipeline.engine import MOMENTS, Engine
from pipeline.restoring import restore
from pipeline.retention import HELD_OUT, Retention, prune

SALVAGE_S = 5.0
"""Seconds that rank 0, after an error, waits for the other ranks' files."""


class _Job(threading.Thread):
    """Work in a thread; what it raised."""

    def __init__(self, action: Callable[[], None]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._action = action
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._action()
        except Exception as error:  # noqa: BLE001 - raised by the main thread in `poll`
            self.error = error


@dataclass
class _Shard:
    """What this rank has to write of a checkpoint."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    num_writers: int
    writer_of: dict[str, dict[str, int]]
    """Writer of every tensor of all ranks, by file."""


@dataclass
class _Flight:
    """A checkpoint on its way to the disk."""

    path: Path
    temporary: Path
    finish: Callable[[], None]
    """What rank 0 does when all ranks have written."""
    num_writers: int
    job: _Job
    finishing: bool = False


class Saver:
    """Checkpoints of one training stage.

    Args:
        context: the stage; its folder gets `checkpoints/`.
        model: whose parameters are trained.
        trained: them by the model's own names, as they are before the engine takes them.
        engine: has the float32 weights and moments.
        retention: what stays on the disk.
        asynchronous: write while training goes on; else `save` returns when all is written.
    """

    def __init__(
        self,
        context: StageContext,
        model: AllMemGPTModel,
        trained: Mapping[str, nn.Parameter],
        engine: Engine,
        *,
        retention: Retention,
        asynchronous: bool = True,
    ) -> None:
        self.folder = context.dir / "checkpoints"
        self._context, self._model, self._engine = context, model, engine
        self._ranks = context.ranks
        self._trained = dict(trained)
        self._retention, self._asynchronous = retention, asynchronous
        self._flight: _Flight | None = None
        self._lock = threading.Lock()
        self._losses: list[tuple[float, int]] = []
        self._held_out: tuple[int, float] | None = None
        self._token = on_main(self._ranks, self._start)

    def _start(self) -> str:
        remove_unfinished(self.folder)
        return uuid.uuid4().hex[:8]

    def resume(self) -> Checkpoint | None:
        """Put the newest checkpoint into the engine and give it back; None where there is none.

        Raises:
            ValueError: it cannot be read, or was made with another configuration.
        """
        newest = on_main(self._ranks, lambda: latest_checkpoint(self.folder))
        if newest is None:
            return None
        saved = load_checkpoint(newest)
        refuse_other_config(newest, saved.state["config"], self._context.fingerprint)
        restore(saved, self._model, self._trained, self._engine)
        return saved

    # --- scores -----------------------------------------------------------------------------------

    def note_loss(self, loss: float, loss_tokens: int) -> None:
        """A step's mean loss, for the mean since the last checkpoint."""
        self._losses.append((loss, loss_tokens))

    def note_held_out(self, step: int, loss: float) -> None:
        """The held-out loss of the weights after `step`."""
        self._held_out = (step, loss)

    def _score(self, step: int) -> dict[str, Any] | None:
        metric = self._retention.metric
        if metric == HELD_OUT:
            measured = self._held_out is not None and self._held_out[0] == step
            loss = self._held_out[1] if self._held_out is not None and measured else math.nan
        else:
            tokens = sum(count for _, count in self._losses)
            total = math.fsum(loss * count for loss, count in self._losses)
            loss = total / tokens if tokens else math.nan
        return {"metric": metric, "loss": loss} if math.isfinite(loss) else None

    # --- writing ----------------------------------------------------------------------------------

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Begin to save the engine's weights and moments as the checkpoint of `step`.

        Every rank calls it. A save that is still under way is waited for first.

        Args:
            step: optimizer steps done.
            state: further values of `state.json`; rank 0's count.

        Raises:
            OSError: this save (where not asynchronous) or the one before could not be written;
                MainRankFailedError on the ranks other than 0.
        """
        self.wait()
        path = checkpoint_path(self.folder, step)
        temporary = self.folder / f"{UNFINISHED}{path.name}-{self._token}"
        shard = self._snapshot()
        full = copy.deepcopy({**state, "step": step, "score": self._score(step)})
        full["updates"] = self._engine.num_updates
        self._losses.clear()
        rank, alone = self._ranks.rank, self._ranks.world_size == 1

        def write() -> None:
            if rank < shard.num_writers:
                write_shard(
                    temporary,
                    writer=rank,
                    num_writers=shard.num_writers,
                    model=shard.model,
                    optimizer=shard.optimizer,
                )
            shard.model.clear()
            shard.optimizer.clear()
            if alone:
                finish()

        def finish() -> None:
            finish_checkpoint(
                temporary,
                path,
                state=full,
                num_writers=shard.num_writers,
                writer_of=shard.writer_of,
            )
            prune(self.folder, self._retention)

        self._flight = _Flight(
            path=path,
            temporary=temporary,
            finish=_on_disk(finish, path),
            num_writers=shard.num_writers,
            job=_Job(_on_disk(write, path)),
            finishing=alone,
        )
        if not self._asynchronous:
            self.wait()

    def _snapshot(self) -> _Shard:
        """Copy to the CPU what this rank writes; collective, one tensor at a time."""
        loads = [0] * self._ranks.world_size
        model: dict[str, Tensor] = {}
        optimizer: dict[str, Tensor] = {}
        writer_of: dict[str, dict[str, int]] = {MODEL_FILE: {}, OPTIMIZER_FILE: {}}
        for name, parameter in self._trained.items():
            writer = loads.index(min(loads))
            for kind in ("weight", *MOMENTS):
                whole = self._whole(name, kind, parameter)
                loads[writer] += whole.numel() * whole.element_size()
                file = MODEL_FILE if kind == "weight" else OPTIMIZER_FILE
                prefix = "" if kind == "weight" else f"{kind}."
                target = model if kind == "weight" else optimizer
                for hf_name, part in to_hf({name: whole}, self._model.base_config).items():
                    writer_of[file][prefix + hf_name] = writer
                    if writer == self._ranks.rank:
                        target[prefix + hf_name] = part.cpu().contiguous()
        num_writers = sum(load > 0 for load in loads)
        return _Shard(model, optimizer, num_writers, writer_of)

    def _whole(self, name: str, kind: Any, parameter: nn.Parameter) -> Tensor:
        part = self._engine.tensor(name, kind)  # a copy: training may change its own
        if self._ranks.tp > 1:  # collectives of NCCL want the device
            part = part.to(self._ranks.device)
        return full_of(part, parameter)

    def poll(self) -> None:
        """Take a save that is under way a step further; every rank calls it once a step.

        Raises:
            OSError: a rank could not write; MainRankFailedError on the ranks other than 0.
        """
        flight = self._flight
        if flight is None:
            return
        finished = not flight.job.is_alive()
        failed = finished and flight.job.error is not None
        values = [float(finished), float(failed)]
        num_finished, num_failed = sum_over_ranks(values, self._ranks.device)
        if num_failed:
            self._fail(flight)
        if num_finished < self._ranks.world_size:
            return
        if flight.finishing:
            self._flight = None
            return
        flight.finishing = True
        flight.job = _Job(flight.finish if self._ranks.is_main else _nothing)

    def wait(self) -> None:
        """Wait until the save that is under way is on the disk; every rank calls it.

        Raises:
            OSError: a rank could not write; MainRankFailedError on the ranks other than 0.
        """
        while (flight := self._flight) is not None:
            flight.job.join()
            self.poll()

    def _fail(self, flight: _Flight) -> None:
        """Raise the error of a rank's thread on all ranks."""
        flight.job.join()
        self._flight = None
        error = flight.job.error
        own = None if error is None else str(getattr(error, "strerror", None) or error)
        texts: list[str | None] = [own]
        if self._ranks.world_size > 1:
            texts = [None] * self._ranks.world_size
            dist.all_gather_object(texts, own)
        if self._ranks.is_main:  # no rank writes there any more
            remove(flight.temporary)
        if self._ranks.is_main and error is not None:
            raise error
        rank, text = next((rank, text) for rank, text in enumerate(texts) if text is not None)
        if self._ranks.is_main:
            raise OSError(f"rank {rank}: {text}")
        raise MainRankFailedError(f"rank {rank} failed: {text}")

    def salvage(self) -> None:
        """After an error: finish the save that is under way without asking the other ranks.

        Files that are there are whole, so rank 0 needs only to see those of all ranks.
        """
        with self._lock:  # a thread that ends the process may ask at the same time
            flight, self._flight = self._flight, None
        if flight is None:
            return
        flight.job.join()
        error = flight.job.error
        if error is None and self._ranks.is_main and not flight.finishing:
            files = [flight.temporary / name for name in shard_files(flight.num_writers)]
            deadline = time.monotonic() + SALVAGE_S
            while not all(file.is_file() for file in files):
                if time.monotonic() > deadline:
                    error = TimeoutError("another rank has not written its files")
                    break
                time.sleep(0.05)
            else:
                flight.job = _Job(flight.finish)
                flight.job.join()
                error = flight.job.error
        if error is not None:
            self._context.say(f"{flight.path.name} could not be saved: {error}")


def _nothing() -> None:
    """What ranks other than 0 do while it finishes."""


def _on_disk(action: Callable[[], None], path: Path) -> Callable[[], None]:
    """The action, with errors of the disk in words."""

    def run() -> None:
        try:
            action()
        except (OSError, safetensors.SafetensorError) as error:
            raise disk_error(error, path) from error

    return run
