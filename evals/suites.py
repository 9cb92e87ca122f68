"""The suites' names, groups and builders in one place."""

from __future__ import annotations

from evals import infinitebench, longbench, lveval, recall_tasks, ruler
from evals.example import SuiteTask, Tokenizer
from evals.task import SuiteConfig

GROUPS: dict[str, tuple[str, ...]] = {
    "longbench/paper": tuple(f"longbench/{name}" for name in longbench.PAPER),
    "infinitebench/paper": tuple(f"infinitebench/{name}" for name in infinitebench.PAPER),
    "lveval/paper": tuple(f"lveval/{name}_128k" for name in lveval.SETS),
}
"""Named groups: the sets of the paper's tables."""


def names(config: SuiteConfig) -> list[str]:
    """Every `SUITE/NAME` under these settings, in the suites' order."""
    found = {
        "longbench": longbench.names(),
        "infinitebench": infinitebench.names(),
        "lveval": lveval.names(),
        "ruler": ruler.names(config.lengths),
        "recall": recall_tasks.names(config.lengths),
    }
    return [f"{suite}/{name}" for suite, members in found.items() for name in members]


def build(full_name: str, config: SuiteConfig, tokenizer: Tokenizer | None) -> SuiteTask:
    """The task of one of `names(config)`.

    Raises:
        ValueError: what it needs (tokenizer, prompts, a package) is not there.
    """
    suite, _, name = full_name.partition("/")
    if suite == "longbench":
        return longbench.build(
            name,
            data=config.longbench_data,
            prompts=config.longbench_prompts,
            max_examples=config.max_examples,
        )
    if suite == "infinitebench":
        return infinitebench.build(
            name,
            data=config.infinitebench_data,
            prompts=config.infinitebench_prompts,
            max_examples=config.max_examples,
        )
    if suite == "lveval":
        return lveval.build(
            name,
            data=config.lveval_data,
            prompts=config.lveval_prompts,
            max_examples=config.max_examples,
        )
    if tokenizer is None:
        raise ValueError(
            f"{full_name} is generated at a length in tokens and needs a tokenizer; "
            "give build_tasks the model's"
        )
    if suite == "ruler":
        return ruler.build(
            name,
            data=config.ruler_data,
            tokenizer=tokenizer,
            samples=config.samples,
            seed=config.seed,
            max_examples=config.max_examples,
        )
    return recall_tasks.build(
        name,
        tokenizer=tokenizer,
        samples=config.samples,
        seed=config.seed,
        max_examples=config.max_examples,
        filler=config.recall_filler,
        separator=config.recall_separator,
    )
