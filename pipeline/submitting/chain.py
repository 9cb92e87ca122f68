"""From a recipe to the commands of its jobs: which stages are left, and how each is submitted.

All stages of a run share its folder, which one process at a time may use, so the chain is a line:
each job waits for the one before it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import PROJECT_ROOT, split_entry
from pipeline.context import DONE_FILE, folder_name
from pipeline.done import KEPT
from pipeline.fingerprint import fingerprint
from pipeline.lineage import branch_of, data_entry, lineage
from pipeline.schema import RunConfig, section_of

SCRIPTS = PROJECT_ROOT / "slurm"
LOGS = "logs"
"""Folder in run.dir of what the jobs print."""
_ENDS = ("evaluate", "export")
_NOT_PASSED_ON = ("stage", "slurm", "run.dir", "data.num_workers", "data.worker_rank")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A stage as a job that can be submitted."""

    entry: str
    script: Path
    options: tuple[str, ...]
    """Of sbatch, without the dependency."""
    words: tuple[str, ...]
    """Of the script."""
    log: str
    """Path of its output, with sbatch's patterns."""

    def command(self, after: str | None) -> tuple[str, ...]:
        """The whole command.

        Args:
            after: id of the job that must have ended well before this one starts.
        """
        wait = (f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes") if after else ()
        return ("sbatch", "--parsable", *wait, *self.options, str(self.script), *self.words)


def stages_of(config: RunConfig) -> tuple[str, ...]:
    """The stages to submit: the recipe's, or the one that `stage=` names.

    Raises:
        ValueError: `stage=plan`.
    """
    wanted = config.stage.name
    if wanted == "all":
        return config.stages
    if wanted == "plan":
        raise ValueError("stage=plan is no job; call python -m pipeline.run stage=plan here")
    return (wanted,)


def words_to_pass_on(words: Sequence[str]) -> tuple[str, ...]:
    """What a stage is told of the words on the command line: all that decides its result.

    Raises:
        ValueError: a word that the job script sets.
    """
    kept = []
    for word in words:
        key = word.partition("=")[0].lstrip("+")
        if key.startswith("data.worker_rank") or key == "data.num_workers":
            raise ValueError(f"{word} is set by the job array; set slurm.prepare.workers instead")
        if key not in _NOT_PASSED_ON and not key.startswith("slurm."):
            kept.append(word)
    return tuple(kept)


def make_jobs(config: RunConfig, words: Sequence[str], run_dir: Path) -> dict[str, Job]:
    """A job for each of the stages, done or not.

    Args:
        config: composed from the words.
        words: as given on the command line.
        run_dir: absolute.

    Raises:
        ValueError: a job script is missing, or a word that the scripts set themselves.
    """
    passed = words_to_pass_on(words)
    jobs = {}
    for entry in stages_of(config):
        name, section = split_entry(entry)[0], section_of(entry)
        script = _script(name, config.recipe)
        number = "%A_%a" if name == "prepare" else "%j"
        log = f"{run_dir}/{LOGS}/{folder_name(entry)}-{number}.out"
        jobs[entry] = Job(
            entry=entry,
            script=script,
            options=(
                f"--job-name={run_dir.name}-{folder_name(entry)}",
                f"--output={log}",
                *config.slurm.site_options(),
                *config.slurm.job(section).sbatch_options(),
            ),
            words=(*passed, f"stage={entry}", f"run.dir={_quoted(str(run_dir))}"),
            log=log,
        )
    return jobs


def _quoted(path: str) -> str:
    """A path as a value that Hydra reads as it is."""
    if re.fullmatch(r"[\w./-]+", path, re.ASCII):
        return path
    return "'" + path.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _script(name: str, recipe: str) -> Path:
    names = [f"{name}.sh", "stage.sh"]
    if name == "convert":
        names.insert(0, f"convert_{recipe}.sh")
    for candidate in names:
        if (SCRIPTS / candidate).is_file():
            return SCRIPTS / candidate
    raise ValueError(f"{SCRIPTS} has no {' or '.join(names)}; put the job scripts back")


def environment() -> dict[str, str]:
    """What jobs need to know of this process: its Python, unless the site says otherwise."""
    said = any(os.environ.get(name) for name in ("ALLMEM_ENV", "ALLMEM_CONTAINER"))
    if said or not (Path(sys.prefix) / "bin" / "python").exists():
        return {}
    return {"ALLMEM_ENV": sys.prefix}


def shown(command: Sequence[str], variables: dict[str, str]) -> str:
    """A command as one types it."""
    prefix = "".join(f"{name}={shlex.quote(value)} " for name, value in variables.items())
    return prefix + shlex.join(command)


def needed_by(config: RunConfig, entry: str) -> set[str]:
    """Entries whose results a stage is made from."""
    name = split_entry(entry)[0]
    if name == "prepare":
        return set()
    if name == "evaluate":
        return {other for other in config.stages if split_entry(other)[0] not in _ENDS}
    return {data_entry(entry), *lineage(config, branch=branch_of(config, entry), before=entry)}


def done_stages(config: RunConfig, run_dir: Path) -> list[str]:
    """Stages that are complete with this configuration, and need nothing that is not.

    Raises:
        ValueError: a stage whose results are not thrown away is complete with another
            configuration; the stage itself would refuse.
    """
    stages = stages_of(config)
    done: list[str] = []
    for entry in stages:
        needed = needed_by(config, entry) & set(stages)
        if _mark(config, run_dir, entry) and needed <= set(done):
            done.append(entry)
    return done


def _mark(config: RunConfig, run_dir: Path, entry: str) -> bool:
    """Whether `DONE.json` is there, and is of this configuration."""
    import torch

    from pipeline.checkpoint import refuse_other_config

    path = run_dir / folder_name(entry) / DONE_FILE
    if not path.is_file():
        return False
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["config"]
    # What `auto` comes to is decided where the stage runs, which is not here.
    auto = config.parallel.dtype == "auto"
    dtype = stored.get("parallel.dtype", "float32") if auto else config.parallel.dtype
    current = fingerprint(
        config,
        entry,
        dtype=getattr(torch, dtype),
        device=torch.device(stored.get("parallel.device", "cpu")),
    )
    if current == stored:
        return True
    name = split_entry(entry)[0]
    if name in (*KEPT, "prepare"):
        refuse_other_config(path.parent, stored, current)
    return False
