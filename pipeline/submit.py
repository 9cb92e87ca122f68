"""`python -m pipeline.submit recipe=NAME [overrides…]`: the recipe's stages as Slurm jobs.

Each stage is a job of `slurm/*.sh` that waits for the one before it to end well; a stage that is
complete with the same configuration is not submitted. `submit.json` in run.dir says which jobs
there are; `status` and `cancel` go by it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from pipeline.config import compose
from pipeline.context import folder_name
from pipeline.schema import RunConfig
from pipeline.submitting import queue
from pipeline.submitting.chain import (
    LOGS,
    Job,
    done_stages,
    environment,
    make_jobs,
    shown,
    stages_of,
    words_to_pass_on,
)
from pipeline.submitting.record import Record, SubmittedJob, read_record, write_record
from pipeline.submitting.tables import WIDTH, as_text, rows_of, show

HELP = """\
Usage: python -m pipeline.submit recipe=NAME [run.dir=DIR] [slurm=SITE] [overrides …] [--dry-run]
       python -m pipeline.submit status run.dir=DIR [--json]
       python -m pipeline.submit cancel run.dir=DIR

Submits the recipe's stages as a chain of Slurm jobs: each waits for the one before it, and is
cancelled where that fails. A stage that is complete is left out, one that is in the queue is not
submitted twice, so after a failure the same command submits what is left. stage=NAME submits that
stage alone.

  --dry-run   print the commands, which can be pasted into a shell, and submit nothing
  status      a table of the jobs, and the end of the log of what failed; exit code 1 if one did
  cancel      cancel the jobs that wait or run; what they have saved stays

What jobs ask Slurm for is in the section slurm (python -m pipeline.run --help slurm.convert):
  slurm.partition=gpu slurm.account=lab slurm.convert.nodes=8 slurm.convert.time=12:00:00
  slurm.every.gpus_per_node=4 slurm.prepare.workers=32 'slurm.sft.options=[--exclusive]'
or in a file of your site, configs/slurm/NAME.yaml, as slurm=NAME. What is not set there is as
slurm/*.sh has it. The site's environment, and what to do when a job fails: docs/slurm.md.

Example:
  python -m pipeline.submit recipe=qwen3_8b run.dir=/shared/runs/qwen3_8b slurm.partition=gpu
"""

PLACEHOLDER = "AFTER"
LOCK = ".submit.lock"


@dataclass(frozen=True, kw_only=True)
class Chain:
    """What a call would do."""

    config: RunConfig
    run_dir: Path
    jobs: Mapping[str, Job]
    done: tuple[str, ...]
    record: Record
    queued: Mapping[str, str]
    """Stages that are in the queue already, with their jobs."""

    @property
    def left(self) -> list[str]:
        """Stages to submit."""
        return [e for e in self.jobs if e not in self.done and e not in self.queued]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0, 1 (`status`: a job failed) or 2 (an error that the user can mend, told in one line).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    flags = {word for word in words if word.startswith("--") or word == "-h"}
    words = [word for word in words if word not in flags]
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    try:
        if not words or flags & {"-h", "--help"} or words[0] == "help":
            print(HELP, end="")
            return 0
        command = words.pop(0) if words[0] in ("status", "cancel", "submit") else "submit"
        allowed = {"submit": {"--dry-run"}, "status": {"--json"}, "cancel": set[str]()}[command]
        if unknown := sorted(flags - allowed):
            raise ValueError(
                f"{command} has no {unknown[0]}; it has {', '.join(allowed) or 'no options'}, see "
                "--help"
            )
        if command == "status":
            return _status(_run_dir(words), console, as_json="--json" in flags)
        if command == "cancel":
            return _cancel(_run_dir(words), console)
        if "--dry-run" in flags:
            return _dry_run(_plan(words, ask=queue.is_there("scontrol")))
        queue.require("sbatch", "scontrol")
        with _alone(_folder(compose(words), words)):
            return _submit(_plan(words, ask=True), console)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; status shows what was submitted", file=sys.stderr)
        return 130


def _run_dir(words: Sequence[str]) -> Path:
    """The run's folder by `run.dir=DIR`, or a recipe's default one.

    Raises:
        ValueError: neither is given.
    """
    if odd := [word for word in words if not all(word.partition("="))]:
        raise ValueError(f"{odd[0]!r} is not KEY=VALUE; write run.dir=DIR, the folder of the run")
    given = [word for word in words if word.startswith("run.dir=")]
    if given:
        return Path(given[-1].partition("=")[2].strip("'\"")).absolute()
    if not any(word.startswith("recipe=") for word in words):
        raise ValueError("run.dir is not given; write run.dir=DIR, the folder of the run")
    return _folder(compose(words), words)


def _folder(config: RunConfig, words: Sequence[str]) -> Path:
    """The run's folder: `run.dir`, or where `slurm/common.sh` would put it without."""
    runs = os.environ.get("ALLMEM_RUNS")
    if runs and not any(word.lstrip("+").startswith("run.dir=") for word in words):
        return Path(runs).absolute() / config.recipe
    return Path(config.run.dir).absolute()


@contextlib.contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """Keep other calls for the same run away, so that no stage is submitted twice.

    Raises:
        ValueError: one is at work.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another pipeline.submit is at work for {run_dir}; when it is done, see: "
                f"python -m pipeline.submit status run.dir={run_dir}"
            ) from None
        yield


def _plan(words: Sequence[str], *, ask: bool) -> Chain:
    """What is left to submit.

    Args:
        words: of the command line.
        ask: whether Slurm is there to be asked for states.

    Raises:
        ValueError: the configuration is refused, or jobs of another one are in the queue.
    """
    config = compose(words)
    run_dir = _folder(config, words)
    jobs = make_jobs(config, words, run_dir)
    done = done_stages(config, run_dir)
    passed = words_to_pass_on(words)
    former = read_record(run_dir)
    queued: dict[str, str] = {}
    record = Record(recipe=config.recipe, words=passed, stages=config.stages)
    if former is not None:
        states = queue.states(job.job for job in former.jobs) if ask else {}
        active = [job for job in former.jobs if job.job in states and states[job.job].active]
        if active and sorted(former.words) != sorted(passed):
            ids = ", ".join(f"{job.entry} {job.job}" for job in active)
            raise ValueError(
                f"jobs of other settings are in the queue for {run_dir} ({ids}: "
                f"{' '.join(former.words)}); wait for them, or: python -m pipeline.submit cancel "
                f"run.dir={run_dir}"
            )
        queued = {job.entry: job.job for job in active if job.entry in jobs}
        record = replace(former, recipe=config.recipe, words=passed, stages=config.stages)
    return Chain(
        config=config,
        run_dir=run_dir,
        jobs=jobs,
        done=tuple(entry for entry in done if entry not in queued),
        record=record,
        queued=queued,
    )


def _dry_run(chain: Chain) -> int:
    """Print the commands as a shell script."""
    for entry in stages_of(chain.config):
        if entry in chain.done:
            print(f"# {entry}: complete, not submitted")
        elif entry in chain.queued:
            print(f"# {entry}: in the queue as job {chain.queued[entry]}, not submitted again")
    if not chain.left:
        return 0
    print(shown(("mkdir", "-p", str(chain.run_dir / LOGS)), {}))
    after = None
    for entry, job in chain.jobs.items():
        if entry in chain.queued:
            after = chain.queued[entry]
        elif entry in chain.left:
            name = f"job_{folder_name(entry)}"
            line = shown(job.command(PLACEHOLDER if after else None), environment())
            line = line.replace(f"afterok:{PLACEHOLDER}", f"afterok:{after}")
            print(f"{name}=$({line})")
            after = f"${name}"
    return 0


def _submit(chain: Chain, console: Console) -> int:
    """Submit what is left; a refusal cancels what this call has submitted."""
    run_dir, record = chain.run_dir, chain.record
    if not chain.left:
        what = "complete" if not chain.queued else "complete or in the queue"
        console.print(f"nothing to submit: every stage is {what} ({run_dir})", soft_wrap=True)
        return _status(run_dir, console) if record.jobs else 0
    (run_dir / LOGS).mkdir(parents=True, exist_ok=True)
    write_record(run_dir, record)  # before the first job, so that none is unknown
    after: str | None = None
    new: list[SubmittedJob] = []
    for entry, job in chain.jobs.items():
        if entry in chain.queued:
            after = chain.queued[entry]
        if entry not in chain.left:
            continue
        command = job.command(after)
        try:
            number = queue.submit(command, environment())
        except queue.SlurmError as error:
            raise _undone(run_dir, record, entry, new, error) from error
        new.append(
            SubmittedJob(
                entry=entry,
                job=number,
                after=after,
                log=job.log,
                command=command,
                submitted=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            )
        )
        record = record.with_job(new[-1])
        write_record(run_dir, record)
        after = number
    _status(run_dir, console)
    console.print(f"status:  python -m pipeline.submit status run.dir={run_dir}", soft_wrap=True)
    console.print(f"cancel:  python -m pipeline.submit cancel run.dir={run_dir}", soft_wrap=True)
    return 0


def _undone(
    run_dir: Path,
    record: Record,
    entry: str,
    new: Sequence[SubmittedJob],
    error: queue.SlurmError,
) -> ValueError:
    """Cancel what this call has submitted, and say so."""
    ids = ", ".join(f"{job.entry} {job.job}" for job in new)
    if not new:
        return ValueError(f"{entry} was not submitted: {error}")
    try:
        queue.cancel([job.job for job in new])
    except queue.SlurmError as other:
        return ValueError(
            f"{entry} was not submitted: {error}; still in the queue: {ids} ({other})"
        )
    write_record(
        run_dir,
        record.with_states({job.job: ("CANCELLED", f"{entry} was refused", "") for job in new}),
    )
    return ValueError(f"{entry} was not submitted: {error}; cancelled again: {ids}")


def _status(run_dir: Path, console: Console, *, as_json: bool = False) -> int:
    """Show the table, and note final states, which Slurm forgets."""
    record = _known(run_dir)
    ended = {
        job.job: queue.JobState(state=job.state, reason=job.reason, run_time=job.run_time)
        for job in record.jobs
        if job.state not in queue.ACTIVE and job.state != queue.GONE
    }
    if any(job.job not in ended for job in record.jobs):
        queue.require("scontrol")
    asked = queue.states(job.job for job in record.jobs if job.job not in ended)
    seen = {job: (state.state, state.reason, state.run_time) for job, state in asked.items()}
    write_record(run_dir, record.with_states(seen))
    rows = rows_of(record, {**ended, **asked}, run_dir)
    if as_json:
        print(as_text(rows))
    else:
        show(console, f"{record.recipe}: {run_dir}", rows)
    return int(any(row.failed for row in rows))


def _cancel(run_dir: Path, console: Console) -> int:
    """Cancel what waits or runs, the last stage first."""
    queue.require("scancel", "scontrol")
    record = _known(run_dir)
    states = queue.states(job.job for job in record.jobs)
    active = [job.job for job in record.jobs if states[job.job].active]
    queue.cancel(active[::-1])
    said = f"cancelled {', '.join(active)}" if active else "nothing waits or runs"
    console.print(said, soft_wrap=True)
    _status(run_dir, console)
    return 0


def _known(run_dir: Path) -> Record:
    record = read_record(run_dir)
    if record is None:
        raise ValueError(
            f"{run_dir} has no submit.json: nothing was submitted for it; give the run.dir that "
            "pipeline.submit was called with"
        )
    return record


if __name__ == "__main__":
    sys.exit(main())
