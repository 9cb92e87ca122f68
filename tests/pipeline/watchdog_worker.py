"""One of three gloo ranks that wait for each other: `RANK=… python watchdog_worker.py FOLDER`.

Every part begins with a line `== NAME` on rank 0's standard error. The last one hangs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline import watchdog
from pipeline.crew import crew_of
from pipeline.distributed import Ranks, init_distributed, sum_over_ranks
from pipeline.schema import ParallelSettings
from pipeline.survival import hearing_signals
from pipeline.watchdog import note_step, watching

SETTINGS = ParallelSettings(device="cpu", hang_warning_s=1.5, timeout_s=8)
LATE_S = 3.5
ORIGINALS = (dist.isend, dist.irecv)


def late_to_a_reduction(ranks: Ranks) -> None:
    """Rank 1 computes for long."""
    if ranks.rank == 1:
        time.sleep(LATE_S)
    dist.all_reduce(torch.ones(8, 2))


def late_to_send(ranks: Ranks) -> None:
    """Rank 2 waits for rank 1, which waits for rank 0, which computes."""
    tensor = torch.ones(4, dtype=torch.bfloat16)
    if ranks.rank == 0:
        time.sleep(LATE_S)
    else:
        work = dist.irecv(tensor, src=ranks.rank - 1)
        assert work is not None
        work.wait()
    if ranks.rank < 2:
        dist.send(tensor, dst=ranks.rank + 1)


def late_to_a_sum(ranks: Ranks) -> None:
    """Rank 2 is late to a helper's collective, which is shown where the helper is called."""
    if ranks.rank == 2:
        time.sleep(LATE_S)
    sum_over_ranks([1.0], ranks.device)


def late_in_a_group(ranks: Ranks) -> None:
    """Ranks 1 and 2 have a group of their own."""
    group = dist.new_group([1, 2])
    if ranks.rank == 1:
        time.sleep(LATE_S)
    if ranks.rank:
        dist.all_gather([torch.empty(3), torch.empty(3)], torch.ones(3), group=group)
    dist.barrier()


def batched(ranks: Ranks) -> None:
    """`P2POp` takes the functions as they were and as they are."""
    for send, receive in ((dist.isend, dist.irecv), ORIGINALS):
        tensor = torch.full((2,), float(ranks.rank))
        found = torch.empty(2)
        there, here = (ranks.rank + 1) % 3, (ranks.rank - 1) % 3
        works = dist.batch_isend_irecv(
            [dist.P2POp(send, tensor, there), dist.P2POp(receive, found, here)]
        )
        for work in works:
            work.wait()
        assert found.tolist() == [float(here)] * 2


def never(ranks: Ranks) -> None:
    """Rank 0 goes another way than the others."""
    if ranks.rank == 0:
        dist.broadcast(torch.ones(5), src=1)
    else:
        dist.all_reduce(torch.ones(5))
        dist.barrier()
    time.sleep(60)


PARTS: list[Callable[[Ranks], None]] = [
    late_to_a_reduction, late_to_send, late_to_a_sum, late_in_a_group, batched, never,
]  # fmt: skip


def seconds_of_a_crumb(number: int = 2000) -> float:
    """Of a call that does nothing else."""
    form = watchdog.FORMS["all_reduce"]
    crumbed = watchdog._Watched("all_reduce", form, lambda tensor, **options: None)
    tensor = torch.ones(8)
    started = time.thread_time()
    for _ in range(number):
        crumbed(tensor, group=dist.group.WORLD)
    return (time.thread_time() - started) / number


def main(folder: Path) -> None:
    """Measure, then all parts in turn."""
    ranks = init_distributed(device="cpu", timeout_s=60)
    with crew_of(SETTINGS, ranks):
        with watching():
            (folder / f"seconds-{ranks.rank}").write_text(str(seconds_of_a_crumb()))
        assert (dist.isend, dist.irecv) == ORIGINALS  # put back
        assert dist.isend is ORIGINALS[0]
        with watching():
            for number, part in enumerate(PARTS, start=1):
                dist.barrier()
                if ranks.is_main:
                    print(f"== {part.__name__}", file=sys.stderr, flush=True)
                note_step(number)
                part(ranks)


if __name__ == "__main__":
    with hearing_signals():
        main(Path(sys.argv[1]))
