"""Slurm's commands: submit, ask for states, cancel. Works without accounting (no `sacct`)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

TIMEOUT_S = 120
"""Seconds that one of Slurm's commands may take; a busy controller lets sbatch wait."""

ACTIVE = frozenset(
    (
        *("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED"),
        *("REQUEUE_HOLD", "REQUEUE_FED", "RESIZING", "SIGNALING", "STAGE_OUT", "SPECIAL_EXIT"),
    )
)
"""States of jobs that will still run, or do."""

GONE = "UNKNOWN"
"""Slurm has forgotten the job (MinJobAge, five minutes by default, after its end)."""

_ORDER = (
    *("FAILED", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "TIMEOUT", "DEADLINE", "PREEMPTED"),
    *("REVOKED", "CANCELLED"),
)
"""States of jobs that ended otherwise than well, the most telling first."""
_FIELD = re.compile(r"(?:^| )([A-Za-z][A-Za-z:/]*)=(.*?)(?= [A-Za-z][A-Za-z:/]*=|$)")


class SlurmError(ValueError):
    """Slurm is not there, or refused; the message has its words."""


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What Slurm knows of a job; of an array, of all its tasks together."""

    state: str
    """`PENDING`, `RUNNING`, `COMPLETED`, `FAILED`, … or `UNKNOWN`."""
    reason: str = ""
    """Why it waits, or how it ended."""
    run_time: str = ""
    nodes: str = ""
    restarts: int = 0
    tasks: str = ""
    """Of an array: `3 COMPLETED, 5 RUNNING`."""
    active: bool = False
    """Whether the job waits or runs, or a task of it does."""

    @property
    def has_failed(self) -> bool:
        """Whether it ended otherwise than well."""
        return self.state in _ORDER


def is_there(program: str) -> bool:
    """Whether one of Slurm's commands can be called here."""
    return shutil.which(program) is not None


def require(*programs: str) -> None:
    """Refuse to go on without Slurm's commands. Raises: SlurmError."""
    missing = [program for program in programs if not is_there(program)]
    if missing:
        raise SlurmError(
            f"{missing[0]} is not on this machine's PATH; call this on a login node of the cluster "
            "(module load slurm, where the site has it so), or look with --dry-run"
        )


def submit(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Call sbatch; the job's id.

    Args:
        command: `sbatch --parsable …`.
        environment: variables beside those of this process.

    Raises:
        SlurmError: sbatch is not there or refuses, with its words.
    """
    require("sbatch")
    done = _call(command, {**os.environ, **environment})
    words = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
    if done.returncode:
        raise SlurmError(f"sbatch refused: {words}")
    job = done.stdout.strip().splitlines()[-1].split(";")[0] if done.stdout.strip() else ""
    if not job.isdecimal():
        raise SlurmError(f"sbatch gave no job id but {done.stdout.strip()!r} ({words})")
    return job


def states(jobs: Iterable[str]) -> dict[str, JobState]:
    """The state of each job, one that Slurm has forgotten included.

    Raises:
        SlurmError: the controller does not answer.
    """
    found = {}
    for job in jobs:
        require("scontrol")
        done = _call(["scontrol", "show", "job", "-o", job], os.environ)
        if done.returncode:
            if "Invalid job id" not in done.stderr + done.stdout:
                raise SlurmError(
                    f"scontrol show job {job} failed: {' '.join(done.stderr.split())}; ask again "
                    "when Slurm's controller answers"
                )
            found[job] = JobState(state=GONE, reason="Slurm has forgotten the job")
            continue
        found[job] = parse(done.stdout)
    return found


def parse(shown: str) -> JobState:
    """From the lines of `scontrol show job -o`, one a task of an array."""
    rows = [dict(_FIELD.findall(line)) for line in shown.splitlines() if line.startswith("JobId=")]
    if not rows:
        return JobState(state=GONE, reason="scontrol said nothing of it")
    kinds = [row["JobState"] for row in rows]
    worst = [kind for kind in _ORDER if kind in kinds]
    going = [kind for kind in ("RUNNING", *kinds) if kind in kinds and kind in ACTIVE]
    state = [*worst, *going, kinds[0]][0]  # a task that failed ends the chain, whoever still runs
    row = rows[kinds.index(state)]
    reason = "" if row["Reason"] in ("None", "(null)") else row["Reason"]
    code = row.get("ExitCode", "0:0")
    if code not in ("0:0", "") and state in _ORDER:
        reason = f"{reason or 'ended'} (exit code {code.split(':')[0]})"
    tasks = ""
    if len(rows) > 1:
        tasks = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    return JobState(
        state=state,
        reason=reason,
        run_time=row.get("RunTime", ""),
        nodes="" if row.get("NodeList") in (None, "(null)") else row["NodeList"],
        restarts=max(int(row.get("Restarts", "0")) for row in rows),
        active=bool(going),
        tasks=tasks,
    )


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs; those that have ended already do not matter.

    Raises:
        SlurmError: scancel is not there or failed, with its words.
    """
    if not jobs:
        return
    require("scancel")
    done = _call(["scancel", *jobs], os.environ)
    if done.returncode and "Invalid job id" not in done.stderr:
        raise SlurmError(
            f"scancel {' '.join(jobs)} failed: {' '.join(done.stderr.split())}; cancel them by hand"
        )


def _call(
    command: Sequence[str], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            list(command),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=dict(environment),
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{command[0]} gave no answer within {TIMEOUT_S} s; see `scontrol ping`, and by squeue "
            "--me whether it came through all the same, then give the same command again"
        ) from None
