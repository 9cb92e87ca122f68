"""Where a task of a Slurm job stands: its rank and node, and on which nodes the others are."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Place:
    """One task among those of its step."""

    rank: int
    local_rank: int
    """Index on its node."""
    world_size: int
    node: str
    """Name of its node."""
    nodes: tuple[str, ...] = ()
    """All nodes in the order of the ranks; empty where nobody knows."""
    tasks: tuple[int, ...] = ()
    """Tasks on each of them."""
    meeting: str = "local"
    """A name that all tasks of one start of one job share, and no others."""

    @classmethod
    def from_environment(cls) -> Place:
        """By what `srun` and `slurm/common.sh` have set; one rank without them."""
        env = os.environ
        nodes = tuple(name for name in env.get("ALLMEM_NODES", "").split(",") if name)
        tasks = _counts(env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "")))
        if len(nodes) != len(tasks):
            nodes, tasks = (), ()
        names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
        return cls(
            rank=int(env.get("SLURM_PROCID", "0")),
            local_rank=int(env.get("SLURM_LOCALID", "0")),
            world_size=int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))),
            node=env.get("SLURMD_NODENAME", socket.gethostname()),
            nodes=nodes,
            tasks=tasks,
            meeting="-".join(env.get(name, "0") for name in names),
        )

    def who(self, rank: int) -> str:
        """`node3 (rank 17)`, or `rank 17` where the node is not known."""
        if rank == self.rank:
            return f"{self.node} (rank {rank})"
        last = 0
        for node, count in zip(self.nodes, self.tasks, strict=True):
            last += count
            if rank < last:
                return f"{node} (rank {rank})"
        return f"rank {rank}"


def _counts(text: str) -> tuple[int, ...]:
    """Slurm's `8(x2),4` as (8, 8, 4)."""
    found: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        found += [int(count)] * int(times or 1)
    return tuple(found)
