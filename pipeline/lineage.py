"""Which stages' weights a stage starts from.

The weights of a stage are the base model's with every earlier training stage's newest checkpoint
laid over them, in the recipe's order. A stage `convert@mamba2` belongs to the branch `mamba2`: only
stages without a branch of their own (`pretrain`) and those of the same branch come before it.
A further round, `convert:on_policy`, starts from the rounds before it and trains on the shards of
`collect`, or `collect@mamba2` for `convert:on_policy@mamba2`.
"""

from __future__ import annotations

from pipeline.entries import split_entry
from pipeline.schema import TRAINING_STAGES, RunConfig


def branch_of(config: RunConfig, entry: str) -> str:
    """The recurrent branch of an entry: its own, or the recipe's main one."""
    return split_entry(entry)[1] or config.mixer.branch


def data_entry(entry: str) -> str:
    """The entry that makes the shards of a stage: `prepare`, or `collect` for a further round."""
    whole, at, branch = entry.partition("@")
    return f"collect{at}{branch}" if ":" in whole else "prepare"


def stored_length(config: RunConfig, entry: str) -> int:
    """Tokens of a sample of the shards that a stage trains on."""
    own = data_entry(entry) != "prepare"
    return config.collect.sample_length if own else config.data.seq_length


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


def check_sources(config: RunConfig) -> None:
    """Refuse to collect responses to no prompts. Raises: ValueError."""
    if not config.collect.sources:
        raise ValueError(
            "collect.sources is empty; name prompts, such as collect.sources="
            "[{kind: chat_jsonl, path: prompts.jsonl}]"
        )


def check_rounds(config: RunConfig) -> None:
    """Every further round has its `collect` before it, and every `collect` a trained model.

    Raises:
        ValueError: a stage that is missing, or in another order; no prompts.
    """
    if "collect" in {split_entry(entry)[0] for entry in config.stages}:
        check_sources(config)
    for place, entry in enumerate(config.stages):
        needed = data_entry(entry)
        if needed != "prepare" and needed not in config.stages[:place]:
            raise ValueError(
                f"stages has {entry} without {needed} before it, whose responses it trains on; "
                f"put {needed} before it"
            )
        if entry.partition("@")[0] == "collect":
            trained = lineage(config, branch=branch_of(config, entry), before=entry)
            if not {split_entry(other)[0] for other in trained} & {"convert", "sft"}:
                raise ValueError(
                    f"stages has {entry} before any stage that trains its model; put convert "
                    "before it"
                )
