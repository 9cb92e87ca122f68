"""Which stages' weights a stage starts from.

The weights of a stage are the base model's with every earlier training stage's newest checkpoint
laid over them, in the recipe's order. A stage `convert@mamba2` belongs to the branch `mamba2`: only
stages without a branch of their own (`pretrain`) and those of the same branch come before it.
"""

from __future__ import annotations

from pipeline.config import split_entry
from pipeline.schema import TRAINING_STAGES, RunConfig


def branch_of(config: RunConfig, entry: str) -> str:
    """The recurrent branch of an entry: its own, or the recipe's main one."""
    return split_entry(entry)[1] or config.mixer.branch


def is_last(config: RunConfig, entry: str) -> bool:
    """Whether no other training stage of the recipe starts from this one's weights."""
    trained = [other for other in config.stages if split_entry(other)[0] in TRAINING_STAGES]
    return not any(
        entry in lineage(config, branch=branch_of(config, other), before=other)
        for other in trained
        if other != entry
    )


def lineage(config: RunConfig, *, branch: str, before: str | None = None) -> list[str]:
    """Training entries whose weights a model of `branch` holds, in order.

    Args:
        config: gives the recipe's stages and its own branch.
        branch: `none`, `allmem` or `mamba2`; `none` takes the base model's stages alone.
        before: stop at this entry; default: all of the recipe.
    """
    found = []
    for entry in config.stages:
        if entry == before:
            break
        name, _ = split_entry(entry)
        if name == "pretrain" or (name in TRAINING_STAGES and branch_of(config, entry) == branch):
            found.append(entry)
    return found
