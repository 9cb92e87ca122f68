"""Examples that are generated at a wanted length, measured with the model's own tokenizer."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from evals.example import Example, Tokenizer


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A generated question before it is measured."""

    prompt: str
    answer_prefix: str
    answers: tuple[str, ...]
    evidence: tuple[int, int] | None = None
    """Characters of the prompt where the evidence begins and ends; where there are several
    pieces, the farthest from the end."""
    extra: Mapping[str, Any] = field(default_factory=dict)


Make = Callable[[random.Random, int, int], Draft]
"""Draft of (random numbers, size, index); larger sizes give longer prompts."""


def generated_examples(
    make: Make,
    tokenizer: Tokenizer,
    *,
    name: str,
    length: int,
    max_new_tokens: int,
    samples: int,
    seed: int,
    smallest: int = 1,
    step: int = 1,
) -> Iterator[Example]:
    """Examples whose prompt, answer prefix and generation together fill `length` tokens.

    The size is sought on the first draft; a sample that comes out longer is drawn again with a
    size smaller by `step` or by what its excess asks for, one that is much shorter with a larger
    one. Each sample has random numbers of its own, from the seed, the name and its index.

    Args:
        make: draws one.
        tokenizer: the model's.
        name: of the task, its length with it; part of the seed and of the ids.
        length: tokens, generation included.
        max_new_tokens: of each example.
        samples: how many.
        seed: of all.
        smallest: least size that `make` can do.
        step: by how much a size is lowered.

    Raises:
        ValueError: even the smallest size is too long.
    """
    budget = length - max_new_tokens

    def draw(size: int, index: int) -> tuple[Draft, int]:
        draft = make(random.Random(f"{seed}/{name}/{index}"), size, index)
        return draft, len(tokenizer.encode(draft.prompt + draft.answer_prefix))

    size = _largest_size(lambda size: draw(size, 0)[1], budget, smallest)
    for index in range(samples):
        draft, count = _fitted(partial(draw, index=index), size, budget, smallest, step)
        if count > budget:
            raise ValueError(
                f"{name}: its shortest prompt has {count} tokens and {max_new_tokens} are "
                f"generated, more than {length}; give eval.suites.lengths a larger length"
            )
        distance = depth = None
        if draft.evidence is not None:
            start, end = draft.evidence
            depth = start / len(draft.prompt)
            distance = len(tokenizer.encode(draft.prompt[end:] + draft.answer_prefix))
        yield Example(
            id=f"{name}/{seed}/{index}",
            prompt=draft.prompt,
            answer_prefix=draft.answer_prefix,
            answers=draft.answers,
            max_new_tokens=max_new_tokens,
            length=length,
            distance=distance,
            depth=depth,
            extra=draft.extra,
        )


def _fitted(
    draw: Callable[[int], tuple[Draft, int]], size: int, budget: int, smallest: int, step: int
) -> tuple[Draft, int]:
    """A draft and its tokens, grown where it is much shorter than wanted, shrunk until it fits."""
    draft, count = draw(size)
    for _ in range(2):  # the fillers of samples differ in density
        if count > 0.95 * budget:
            break
        larger = int(size * budget / count)
        grown, grown_count = draw(larger)
        if grown_count > budget:
            break
        size, draft, count = larger, grown, grown_count
    while count > budget and size > smallest:
        size = max(smallest, size - max(step, int((count - budget) * size / count) + 1))
        draft, count = draw(size)
    return draft, count


def _largest_size(tokens_of: Callable[[int], int], budget: int, smallest: int) -> int:
    """A size whose prompt fills the budget to half a percent; the smallest where none fits.

    Tokens grow about linearly with the size, so the next guess is on the line through the last
    two; every third one halves the bracket.
    """
    low, fitting = smallest, tokens_of(smallest)
    high: int | None = None
    guess = max(2 * smallest, 8)
    for turn in itertools.count(1):
        slack = budget - fitting
        if slack <= max(8, budget // 200) or (high is not None and high - low <= 1):
            return low
        count = tokens_of(guess)
        slope = max((count - fitting) / (guess - low), 0.1)
        if count <= budget:
            low, fitting = guess, count
        else:
            high = guess
        guess = min(low + max(int((budget - fitting) / slope), 1), 32 * low)
        if high is not None:
            guess = (low + high) // 2 if turn % 3 == 0 else min(guess, high - 1)
            guess = max(guess, low + 1)
    raise AssertionError("the loop above only returns")
