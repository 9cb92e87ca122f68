"""What every suite gives: examples, a task that scores them, and how a prompt becomes tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

PROMPTS_UPSTREAM = "upstream:lm_eval"
PROMPTS_LOCAL = "local"
PROMPTS_OWN = "own"


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question with its references; what a model is asked, before any chat template."""

    id: str
    """Unique within its task, and the same in every run."""
    prompt: str
    answers: tuple[str, ...]
    """References by the suite's own rule; never empty."""
    max_new_tokens: int
    """Upstream's generation length."""
    answer_prefix: str = ""
    """Start of the answer that is given to the model: after the prompt, or, with a chat template,
    after the assistant's header. Not part of the prediction."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation, where upstream stops at more than the end token."""
    length: int | None = None
    """The data's own measure of the context (words, characters or, for what is generated here,
    tokens); None where it has none."""
    distance: int | None = None
    """Tokens from the evidence's end to the prompt's end; None where the evidence's place is not
    known."""
    depth: float | None = None
    """Place of the evidence in the prompt, 0 (start) to 1 (end); None where not known."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What the scorer needs besides: classes, options, keywords."""

    def __post_init__(self) -> None:
        """Check what no scorer can do without.

        Raises:
            ValueError: no answer, or nothing to generate.
        """
        if not self.answers:
            raise ValueError(
                f"example {self.id!r} has an empty list of answers and cannot be scored; "
                "mend or remove it in the data file"
            )
        if self.max_new_tokens < 1:
            raise ValueError(
                f"example {self.id!r} has max_new_tokens={self.max_new_tokens}; give at least 1"
            )


def checked(example: Example, scorer: Callable[[str, Example], float], where: str) -> Example:
    """The example, once silence could be scored against it: bad references show before any answer.

    Raises:
        ValueError: its references cannot be scored; the message has their place.
    """
    try:
        scorer("", example)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return example


class Task(Protocol):
    """One data set with its rule of scoring."""

    @property
    def name(self) -> str:
        """Within its suite, as `longbench/hotpotqa` without the suite: `hotpotqa`."""

    @property
    def suite(self) -> str:
        """`longbench`, `infinitebench`, `lveval`, `ruler` or `recall`."""

    @property
    def metric(self) -> str:
        """Name of the score, as `f1`, for `results.json`."""

    @property
    def chat(self) -> bool:
        """Whether upstream puts a chat model's template around the prompt."""

    @property
    def prompts_source(self) -> str:
        """`upstream:lm_eval`, `local` or `own`; scores of `own` prompts compare with no table."""

    @property
    def truncates(self) -> bool:
        """Whether an over-long prompt loses its middle (upstream's rule) or is refused."""

    @property
    def one_line(self) -> bool:
        """Whether a newline ends an answer, and neither it nor the end token can come first."""

    def examples(self) -> Iterator[Example]:
        """The examples in the data's order, read anew at each call."""

    def score(self, prediction: str, example: Example) -> float:
        """Upstream's score of one prediction, 0 to 1."""

    def aggregate(self, scores: Sequence[float]) -> float:
        """Upstream's score of the data set, 0 to 100, with upstream's rounding."""


@dataclass(frozen=True, kw_only=True)
class SuiteTask:
    """The `Task` of every suite: data and rule as two functions."""

    name: str
    suite: str
    metric: str
    load: Callable[[], Iterator[Example]]
    scorer: Callable[[str, Example], float]
    prompts_source: str
    chat: bool = True
    truncates: bool = True
    one_line: bool = False
    decimals: int | None = 2
    """Digits that upstream rounds the aggregate to; None does not round."""
    mean_first: bool = False
    """Whether upstream divides before it multiplies by 100 (the last digit can differ)."""
    max_examples: int = 0
    """How many of the first examples are used; 0 takes all."""

    def examples(self) -> Iterator[Example]:
        """The examples in the data's order, read anew at each call."""
        for index, example in enumerate(self.load()):
            if self.max_examples and index >= self.max_examples:
                return
            yield example

    def score(self, prediction: str, example: Example) -> float:
        """Upstream's score of one prediction, 0 to 1."""
        return float(self.scorer(prediction, example))

    def aggregate(self, scores: Sequence[float]) -> float:
        """Mean in percent, summed in the order given, rounded as upstream does.

        Raises:
            ValueError: there is no score.
        """
        if not scores:
            raise ValueError(f"{self.suite}/{self.name} has no scores to average; score an example")
        total = 0.0
        for score in scores:  # `sum` rounds otherwise from Python 3.12 on
            total += score
        value = total / len(scores) * 100 if self.mean_first else 100 * total / len(scores)
        return value if self.decimals is None else round(value, self.decimals)


class Tokenizer(Protocol):
    """What prompts and generators need of a tokenizer."""

    def encode(self, text: str) -> Sequence[int]:
        """Tokens of a text, with the special tokens that the model's tokenizer puts around one."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special tokens left out."""


class TooLongError(ValueError):
    """An example that does not fit the model's positions, by its suite's rule."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Tokens to feed to a model."""

    tokens: tuple[int, ...]
    num_cut: int
    """Tokens of the prompt that were cut out of its middle; 0 where it fitted."""


def evidence_distance(example: Example, num_tokens: int, num_cut: int) -> int | None:
    """Tokens from the evidence to the end of the prompt; from its depth where that is all we know.

    Args:
        example: whose evidence.
        num_tokens: of the prompt as it is asked.
        num_cut: tokens that were cut out of its middle before.

    Returns:
        None where the evidence's place is not known, and where it was cut out.
    """
    distance = example.distance
    if distance is None and example.depth is not None:
        distance = round((1 - example.depth) * (num_tokens + num_cut))
    if distance is None or num_cut == 0 or distance <= num_tokens // 2:
        return distance
    distance -= num_cut
    return distance if distance >= num_tokens // 2 else None


def truncate_middle(tokens: Sequence[int], limit: int) -> tuple[Sequence[int], Sequence[int]]:
    """First and last half of `limit` tokens where there are more, else all of them and nothing.

    As LongBench, LV-Eval and InfiniteBench do: an odd limit keeps one token less.

    Raises:
        ValueError: the limit leaves no token.
    """
    if limit < 2:
        raise ValueError(
            f"limit={limit} leaves no prompt; give the model more positions or generate less"
        )
    if len(tokens) <= limit:
        return tokens, ()
    half = limit // 2
    return tokens[:half], tokens[-half:]


def prepare_prompt(
    task: Task,
    example: Example,
    tokenizer: Tokenizer,
    *,
    max_positions: int,
    chat_template: Callable[[str], str] | None = None,
) -> Prompt:
    """Tokens of an example's prompt: truncated, put into the chat template, and encoded.

    The order is LongBench's: the bare prompt is encoded, cut and decoded half by half, and only
    then put into the template, so that the template is never cut. Decoding and encoding again can
    lengthen a text by some tokens; then the limit is lowered by the excess and all done again.

    Args:
        task: decides whether the template applies and whether a long prompt is cut or refused.
        example: one of its examples.
        tokenizer: the model's.
        max_positions: tokens that prompt and generation may have together.
        chat_template: puts a user's message into the model's template, up to and with the
            assistant's header; None for a base model.

    Raises:
        TooLongError: for a task that is not cut, or with nothing left of the prompt.
    """
    budget = max_positions - example.max_new_tokens

    def rendered(text: str) -> tuple[int, ...]:
        body = chat_template(text) if chat_template is not None and task.chat else text
        return tuple(tokenizer.encode(body + example.answer_prefix))

    tokens = rendered(example.prompt)
    if len(tokens) <= budget:
        return Prompt(tokens=tokens, num_cut=0)
    where = f"{task.suite}/{task.name} example {example.id!r}"
    if not task.truncates:
        raise TooLongError(
            f"{where} has {len(tokens)} tokens and generates {example.max_new_tokens}, more than "
            f"the model's {max_positions} positions, and its suite cuts nothing; "
            "generate it shorter or give the model more positions"
        )
    bare = tokenizer.encode(example.prompt)
    limit = budget - (len(tokens) - len(bare))
    while limit >= 2:
        head, tail = truncate_middle(bare, limit)
        tokens = rendered(tokenizer.decode(head) + tokenizer.decode(tail))
        if len(tokens) <= budget:
            return Prompt(tokens=tokens, num_cut=len(bare) - len(head) - len(tail))
        limit -= len(tokens) - budget
    raise TooLongError(
        f"{where}: {max_positions} positions less {example.max_new_tokens} to generate leave no "
        "room for its prompt; give the model more positions"
    )
