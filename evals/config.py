"""Settings of `stage=evaluate`. Torch-free, so that the pipeline's schema can embed them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Literal

from evals.short import SHORT_TASKS
from evals.task import SuiteConfig

MIXERS: tuple[str, ...] = ("full", "swa", "mamba2", "allmem")
CONTROLS: tuple[str, ...] = ("memory_off", "write_off", "state_shuffled")
COLOURS = {
    "full": "#000000",
    "swa": "#E69F00",
    "mamba2": "#009E73",
    "allmem": "#0072B2",
    "memory_off": "#CC79A7",
    "write_off": "#D55E00",
    "state_shuffled": "#56B4E9",
}
"""In figures and dashboards: Okabe and Ito's palette, told apart by people with colour blindness
too."""
KINDS: tuple[str, ...] = ("text", "recall", "chat")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How long-context tasks and short tasks are answered."""

    batch_size: int = 8
    """Answers written together, and log-likelihoods computed together."""

    prefill_chunk: int = 4096
    """Tokens of a prompt read at once; bounds memory whatever the prompt's length."""

    temperature: float = 0.0
    """Of long-context tasks; 0 takes the most likely token. Short tasks have their own."""

    top_p: float = 1.0
    """Share of the probability that is sampled from, where temperature is above 0."""

    num_samples: int = 1
    """Samplings of each example, whose scores are averaged; more than 1 needs a temperature."""

    max_positions: int = 0
    """Tokens of prompt and answer together; 0 takes the model's max_position_embeddings."""

    chat: Literal["auto", "always", "never"] = "auto"
    """Whether tasks that want the chat template get it; auto: where the tokenizer has one."""

    thinking: bool = False
    """What a chat template that asks for enable_thinking gets."""

    resamples: int = 1000
    """Of the bootstrap behind standard errors; 0 gives none."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: a value is out of range.
        """
        for name, least in (
            *(("batch_size", 1), ("prefill_chunk", 1), ("num_samples", 1)),
            *(("max_positions", 0), ("resamples", 0), ("temperature", 0)),
        ):
            if getattr(self, name) < least:
                raise ValueError(
                    f"eval.generation.{name}={getattr(self, name)} is below {least}; "
                    f"set eval.generation.{name}={least}"
                )
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"eval.generation.top_p={self.top_p} is not in (0, 1]; set eval.generation.top_p=1"
            )
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"eval.generation.num_samples={self.num_samples} greedy answers would all be one; "
                "set eval.generation.temperature=0.7, or num_samples=1"
            )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What `stage=evaluate` measures, and on what."""

    mixers: tuple[str, ...] = MIXERS
    """Token mixers put side by side on the same documents, in the table's order."""

    controls: tuple[str, ...] = CONTROLS
    """Controls of the `allmem` mixer: no memory output, no writes, another document's state."""

    kinds: tuple[str, ...] = ("text", "recall")
    """Kinds of held-out document that are read from `prepare/eval`; none with tasks below alone."""

    documents: str | None = None
    """Run whose `stage=prepare` made the held-out documents, for other texts or lengths than the
    model was trained on; default: this run."""

    suites: SuiteConfig = field(default_factory=SuiteConfig)
    """Long-context tasks."""

    short_tasks: tuple[str, ...] = ()
    """Short tasks through lm-evaluation-harness, `arc_easy` for example."""

    data_dir: str | None = None
    """Folder with the data of short tasks; without it they come from the hub."""

    short_limit: int = 0
    """First examples of each short task that are used; 0 takes all."""

    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """How tasks are answered."""

    window_size: int = 2048
    """W: keys that sliding-window attention sees, the query's own position included."""

    num_sinks: int = 128
    """s: first positions of a document that every query sees."""

    chunk_size: int = 1024
    """c: tokens the memory takes in by one write; at most W."""

    batch_size: int = 4
    """Equal-length documents a forward pass; at least 2 while `state_shuffled` is asked for."""

    max_samples: int = 64
    """Held-out documents of each kind, the longest and first ones of the shards; 0 takes all."""

    min_length: int = 0
    """Tokens that a document must have; 0 takes those longer than the window."""

    memory_norms: bool = True
    """Whether the memory's state is followed along one held-out document, for a figure."""

    logits_rows: int = 1024
    """Positions whose logits are held at once; bounds memory to `logits_rows * vocabulary`."""

    num_bins: int = 16
    """About how many bins of position and of distance; their edges fall on multiples of W/k."""

    timing_repeats: int = 5
    """Timed prefills of each mixer; the median counts. 0 measures no speed."""

    timing_warmup: int = 1
    """Prefills of each mixer before the clock counts."""

    timing_batch_size: int = 1
    """Sequences in a timed prefill."""

    timing_length: int = 0
    """Tokens of a timed prefill; 0 takes the longest evaluated document's length."""

    cache_element_bytes: int = 2
    """Bytes of a cached key, value or pending-chunk element (2: bfloat16). W, M are float32."""

    long_context: int = 131072
    """The second document length, in tokens, at which cache bytes are given."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: a value is out of range; the message names value, rule and mend.
        """
        _check_names("mixers", self.mixers, MIXERS)
        _check_names("controls", self.controls, CONTROLS)
        _check_names("kinds", self.kinds, KINDS)
        if not self.mixers:
            raise ValueError("eval.mixers is empty; name at least one of " + ", ".join(MIXERS))
        _check_short(self.short_tasks)
        if not self.kinds and not self.suites.tasks and not self.short_tasks:
            raise ValueError(
                "eval.kinds, eval.suites.tasks and eval.short_tasks are all empty; name at least "
                "one kind: " + ", ".join(KINDS)
            )
        for name in (
            *("window_size", "chunk_size", "batch_size", "logits_rows", "num_bins"),
            *("timing_batch_size", "cache_element_bytes", "long_context"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"eval.{name}={getattr(self, name)} must be at least 1; set eval.{name}=1"
                )
        for name in (
            *("num_sinks", "max_samples", "min_length", "short_limit"),
            *("timing_repeats", "timing_warmup", "timing_length"),
        ):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"eval.{name}={getattr(self, name)} must not be negative; set eval.{name}=0"
                )
        if self.chunk_size > self.window_size:
            raise ValueError(
                f"eval.chunk_size={self.chunk_size} exceeds eval.window_size={self.window_size}: "
                "tokens would fall between window and memory; "
                f"set eval.chunk_size={self.window_size} or less"
            )
        if "state_shuffled" in self.controls and self.batch_size < 2:
            raise ValueError(
                f"eval.batch_size={self.batch_size} leaves no second document to take a state "
                "from; set eval.batch_size=2 or drop state_shuffled from eval.controls"
            )


def _check_short(names: tuple[str, ...]) -> None:
    for name in names:
        if name not in SHORT_TASKS:
            near = difflib.get_close_matches(name, SHORT_TASKS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it knows {', '.join(SHORT_TASKS)}"
            raise ValueError(f"eval.short_tasks has {name!r}, which is unknown; {hint}")
    _check_names("short_tasks", names, tuple(SHORT_TASKS))


def _check_names(section: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"eval.{section} has {name!r}; it knows only {', '.join(known)}")
    if len(set(names)) != len(names):
        raise ValueError(f"eval.{section}={list(names)} names one twice; name each once")
