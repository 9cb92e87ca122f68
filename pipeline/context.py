"""What a stage gets beside its configuration: where it works, who it is, whom it tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts import Artifact, add_artifacts
from pipeline.config import split_entry
from pipeline.console import Reporter
from pipeline.distributed import Ranks
from pipeline.lineage import data_entry
from pipeline.metrics_log import MetricsLog
from pipeline.schema import section_of

DONE_FILE = "DONE.json"
"""Mark of a finished stage, in its folder."""


def folder_name(entry: str) -> str:
    """Folder of a stage entry: `convert:on_policy@mamba2` → `convert_on_policy_mamba2`."""
    return entry.replace("@", "_").replace(":", "_")


def is_finished(run_dir: Path, entry: str) -> bool:
    """Whether a stage of the run has its mark."""
    return (run_dir / folder_name(entry) / DONE_FILE).is_file()


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """One stage of one run; what `run(config, context)` of `stages/NAME.py` gets."""

    entry: str
    """The recipe's entry, `convert` or `convert@mamba2`."""
    branch: str
    """The entry's recurrent branch, `allmem` or `mamba2`: its own, or the recipe's."""
    run_dir: Path
    """Folder of the whole run."""
    ranks: Ranks
    """This process among the others; `ranks.is_main` writes files."""
    reporter: Reporter
    """Lines and progress bars; silent on other ranks."""
    metrics: MetricsLog
    """The stage's `metrics.jsonl`; MLflow gets every line from there."""
    fingerprint: Mapping[str, Any]
    """Flat configuration that decides the stage's result; checkpoints of another are refused."""
    commit: str
    """Commit of the program, `unknown` outside a repository."""

    @property
    def name(self) -> str:
        """The stage's name without round and branch."""
        return split_entry(self.entry)[0]

    @property
    def section(self) -> str:
        """The stage's section of settings: `on_policy` for `convert:on_policy`."""
        return section_of(self.entry)

    @property
    def dir(self) -> Path:
        """The stage's folder."""
        return self.run_dir / folder_name(self.entry)

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.ranks.device

    @property
    def data_dir(self) -> Path:
        """Shards (`train/` and `eval/` under it) made by `prepare`, or `collect` for its round."""
        return self.run_dir / folder_name(data_entry(self.entry))

    def say(self, line: str) -> None:
        """Print a line on rank 0."""
        self.reporter.say(line)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record metrics of a step (rank 0 writes them)."""
        self.metrics.write(step, values)

    def artifact(self, *paths: Path, folder: str = "", on_parent: bool = False) -> None:
        """Give finished files to MLflow (rank 0 does); no run waits for it or fails by it.

        Args:
            paths: the files.
            folder: folder among the run's artifacts; empty for their root.
            on_parent: the recipe's own run gets them too, under the stage's name.
        """
        if self.ranks.is_main:
            artifacts = [Artifact(path=p, folder=folder, on_parent=on_parent) for p in paths]
            add_artifacts(self.run_dir, folder_name(self.entry), artifacts)
