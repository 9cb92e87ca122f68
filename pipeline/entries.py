"""Entries of a recipe's stages: `STAGE`, `STAGE:ROUND`, `STAGE@BRANCH`, `STAGE:ROUND@BRANCH`."""

from __future__ import annotations

from pipeline.nearest import nearest
from pipeline.schema import BRANCHES, ROUNDS, STAGES


def split_entry(entry: str) -> tuple[str, str | None]:
    """`convert@mamba2` → (`convert`, `mamba2`); `convert`, `convert:on_policy` → (`convert`, None).

    Raises:
        ValueError: an unknown stage, round or branch.
    """
    whole, _, branch = entry.partition("@")
    name, colon, further = whole.partition(":")
    known = (*STAGES, "all")
    if name not in known:
        raise ValueError(f"stage={entry} is unknown{nearest(name, known)}")
    rounds = ROUNDS.get(name, ())
    if colon and further not in rounds:
        of_stage = [f"{stage}:{one}" for stage, names in ROUNDS.items() for one in names]
        raise ValueError(
            f"stage={entry} names the unknown round {further!r}{nearest(further, rounds)} "
            f"(there is {', '.join(of_stage)})"
        )
    if "@" in entry and branch not in BRANCHES:
        raise ValueError(
            f"stage={entry} names the unknown branch {branch!r}{nearest(branch, BRANCHES)}"
        )
    return name, branch or None
