"""The section `collect`: which prompts, how the student answers, and the shards made of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from data_prep.config import CHAT_KINDS, FILE_KINDS, RECORD_KINDS, SourceConfig

PROMPT_KINDS = (*CHAT_KINDS, *RECORD_KINDS, *FILE_KINDS)
"""Sources that prompts are read from: conversations without their last response, or texts."""


@dataclass(frozen=True, kw_only=True)
class CollectSettings:
    """Responses of the model that the stages before trained, to train on (offline on-policy)."""

    sources: list[SourceConfig] = field(default_factory=list)
    """Where prompts come from, with the fields of `data.sources`: conversations (`chat_jsonl`, …)
    lose what follows their last user message; each text of another kind is one user message. With
    `chat: {too_long: truncate_document}` a long prompt loses its middle, else it is left out."""

    max_prompts: int | None = None
    """Take the first so many prompts; default: all."""

    max_prompt_tokens: int = 2048
    """Tokens of a prompt in the chat template."""

    max_new_tokens: int = 1024
    """Tokens of a response; a longer one is cut there."""

    responses_per_prompt: int = 1
    """Responses drawn for each prompt; more than one needs `temperature` above 0."""

    temperature: float = 1.0
    """1: the student's own distribution; 0: its likeliest token each time."""

    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""

    keep_unfinished: bool = True
    """Keep responses that were cut at `max_new_tokens`."""

    batch_size: int = 8
    """Responses that one rank makes at once; a kill loses at most these."""

    prefill_chunk: int = 4096
    """Tokens of a prompt that are read at once."""

    prompts_per_file: int = 64
    """Prompts of one file of responses; ranks share the work by files."""

    seq_length: int | None = None
    """Tokens of a sample of the shards made of the responses; default: the longest that
    `max_prompt_tokens` and `max_new_tokens` give, with 16 for the chat template's end."""

    packing: str = "best_fit"
    """`best_fit`: several conversations in a sample; `none`: one in each."""

    samples_per_shard: int = 256
    """Samples of one shard."""

    eval_fraction: float = 0.0
    """Share of the conversations held out for `on_policy.eval_every`."""

    def __post_init__(self) -> None:
        """Check the sources and the ranges.

        Raises:
            ValueError: a value is out of range, or a source that holds no prompts.
        """
        object.__setattr__(self, "sources", list(self.sources))
        names = ("max_prompt_tokens", "max_new_tokens", "responses_per_prompt", "batch_size")
        for name in (*names, "prefill_chunk", "prompts_per_file", "samples_per_shard"):
            _at_least(name, getattr(self, name), 1)
        if self.max_prompts is not None:
            _at_least("max_prompts", self.max_prompts, 1)
        if self.temperature < 0:
            raise ValueError(
                f"collect.temperature={self.temperature} must not be negative; 0 takes the "
                "likeliest token"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"collect.top_p={self.top_p} must lie in (0, 1]; 1 leaves it off")
        if self.responses_per_prompt > 1 and self.temperature == 0:
            raise ValueError(
                f"collect.responses_per_prompt={self.responses_per_prompt} with temperature=0 "
                "would be the same response each time; set collect.temperature=1"
            )
        if not 0.0 <= self.eval_fraction < 1.0:
            raise ValueError(
                f"collect.eval_fraction={self.eval_fraction} must lie in [0, 1); 0.01 is one in a "
                "hundred"
            )
        for source in self.sources:
            if source.kind not in PROMPT_KINDS:
                raise ValueError(
                    f"collect source {source.name}: kind={source.kind} holds no prompts; use one "
                    f"of {', '.join(PROMPT_KINDS)}"
                )
        sources = [source.name for source in self.sources]
        if len(set(sources)) != len(sources):
            raise ValueError(f"collect source names {sources} must differ; give each a name")
        if self.seq_length is not None and self.seq_length <= self.max_new_tokens:
            raise ValueError(
                f"collect.seq_length={self.seq_length} leaves no room for a prompt beside "
                f"max_new_tokens={self.max_new_tokens}; set collect.seq_length="
                f"{self.longest_sample}"
            )

    @property
    def longest_sample(self) -> int:
        """Tokens that hold the longest prompt with the longest response."""
        return self.max_prompt_tokens + self.max_new_tokens + 16

    @property
    def sample_length(self) -> int:
        """`seq_length`, or what the longest prompt and response need."""
        return self.seq_length or self.longest_sample


def _at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ValueError(f"collect.{name}={value} must be at least {minimum}")


FREE_KEYS = ("batch_size", "prefill_chunk")
"""Keys of `collect` that decide nothing about its result."""
