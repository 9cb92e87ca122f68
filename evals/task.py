"""The suites' public face: settings, `build_tasks`, and the names that go with them.

A task is named `SUITE/NAME`: `longbench/hotpotqa`, `infinitebench/kv_retrieval`,
`lveval/cmrc_mixup_16k`, `ruler/vt_4096`, `recall/multi_key_8192`. `SUITE/*` is the whole suite,
`lveval/*_128k` one length; `longbench/paper`, `infinitebench/paper` and `lveval/paper` are the
sets of the paper's tables.
"""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import dataclass

from evals.example import (
    PROMPTS_LOCAL,
    PROMPTS_OWN,
    PROMPTS_UPSTREAM,
    Example,
    Prompt,
    SuiteTask,
    Task,
    Tokenizer,
    TooLongError,
    evidence_distance,
    prepare_prompt,
    truncate_middle,
)

__all__ = [
    "PROMPTS_LOCAL",
    "PROMPTS_OWN",
    "PROMPTS_UPSTREAM",
    "SUITES",
    "Example",
    "Prompt",
    "SuiteConfig",
    "SuiteTask",
    "Task",
    "Tokenizer",
    "TooLongError",
    "build_tasks",
    "evidence_distance",
    "prepare_prompt",
    "task_names",
    "truncate_middle",
]

SUITES: tuple[str, ...] = ("longbench", "infinitebench", "lveval", "ruler", "recall")


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """Which long-context tasks are run, and where their data are."""

    tasks: tuple[str, ...] = ()
    """Names or patterns of tasks, `SUITE/NAME`; empty runs no suite."""

    max_examples: int = 0
    """First examples of each task that are used; 0 takes all (for generated ones see samples)."""

    longbench_data: str = "THUDM/LongBench"
    """LongBench: a name on the hub, or a folder with `NAME.jsonl` or `data.zip`."""

    infinitebench_data: str = "xinrongzhang2022/InfiniteBench"
    """InfiniteBench: a name on the hub, or a folder with `NAME.jsonl`."""

    lveval_data: str = "infini-ai/LVEval"
    """LV-Eval: a name on the hub, or a folder with `NAME_16k.jsonl` (or `NAME/NAME_16k.jsonl`)."""

    longbench_prompts: str = ""
    """Folder of a copy of THUDM/LongBench (with `LongBench/config/dataset2prompt.json`); empty
    takes the same prompts from lm-evaluation-harness."""

    infinitebench_prompts: str = ""
    """Folder of a copy of OpenBMB/InfiniteBench, for the prompts that upstream gives open models
    (`yarn_mistral_templates`); empty takes those of GPT-4 from lm-evaluation-harness."""

    lveval_prompts: str = ""
    """Folder of a copy of infinigence/LVEval, whose `config.py` has the prompts; empty uses
    prompts of our own."""

    ruler_data: str = ""
    """Folder with `squad.json` and `hotpotqa.json` (qa_1, qa_2), and `*.txt` or
    `PaulGrahamEssays.json` as haystack; empty makes haystacks here and refuses qa."""

    recall_filler: str = ""
    """Folder of texts (`*.py`, `*.md`, `*.txt`, also in its subfolders) or name of an installed
    package, whose lines stand between the facts of `recall`; empty takes prose made up here."""

    recall_separator: str = " ->"
    """Between key and value of `recall/notes`, as in the recall documents that a model was trained
    on (`data.sources.recall.separator`)."""

    lengths: tuple[int, ...] = (4096,)
    """Tokens, generation included, of the examples that are generated here (RULER, recall)."""

    samples: int = 20
    """Examples of each generated task and length."""

    seed: int = 42
    """Of what is generated here."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: a value is out of range.
        """
        if self.max_examples < 0:
            raise ValueError(
                f"eval.suites.max_examples={self.max_examples} must not be negative; 0 takes all"
            )
        if self.samples < 1:
            raise ValueError(f"eval.suites.samples={self.samples} must be at least 1; set it to 20")
        for length in self.lengths:
            if length < 256:
                raise ValueError(
                    f"eval.suites.lengths has {length}; a generated example needs at least 256 "
                    "tokens; name 256 or more"
                )
        if len(set(self.lengths)) != len(self.lengths):
            raise ValueError(
                f"eval.suites.lengths={list(self.lengths)} names one twice; name each once"
            )


def task_names(config: SuiteConfig) -> list[str]:
    """Every name that `build_tasks` knows under these settings, in the suites' order."""
    from evals import suites

    return suites.names(config)


def build_tasks(config: SuiteConfig, *, tokenizer: Tokenizer | None = None) -> list[Task]:
    """The tasks that `config.tasks` names, in the suites' order, each once.

    Reads no data: a task reads them when its examples are asked for.

    Args:
        config: names and where data are.
        tokenizer: the model's; the generated suites (RULER, recall) measure lengths with it.

    Raises:
        ValueError: an unknown name (with the nearest right one), or a missing tokenizer, prompt
            or package.
    """
    from evals import suites

    return [suites.build(name, config, tokenizer) for name in chosen_names(config)]


def chosen_names(config: SuiteConfig) -> list[str]:
    """The `SUITE/NAME` that `config.tasks` names, in the suites' order, each once.

    Raises:
        ValueError: an unknown name (with the nearest right one).
    """
    from evals import suites

    known = suites.names(config)
    wanted: set[str] = set()
    for pattern in config.tasks:
        found = set(suites.GROUPS.get(pattern, ())) or set(fnmatch.filter(known, pattern))
        if not found:
            near = difflib.get_close_matches(pattern, [*known, *suites.GROUPS], n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"suites are {', '.join(SUITES)}"
            raise ValueError(f"eval.suites.tasks has {pattern!r}, which names no task; {hint}")
        wanted |= found
    return [name for name in known if name in wanted]
