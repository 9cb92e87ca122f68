"""Our own recall tasks: facts at controlled distances in filler text, asked for at the end.

| task | what is stated | what is asked |
|---|---|---|
| `single` | one code | it |
| `multi_key` | the codes of 8 things, near each other | one of them |
| `multi_hop` | in what a thing lies; elsewhere the code of that | the code, asked by the thing |
| `overwritten` | the code of a thing, then two more times a new one | the last one |
| `notes` | 8 lines `# note: amber -> falcon` | one, by `# recall: amber ->` |

The distance of the evidence runs evenly over the samples, from right before the question to the
start of the text, so that a score by distance has samples in every bin. `notes` has the form of
the recall documents that small models are trained on here. Prompts are our own and their scores
compare with no other suite.
"""

from __future__ import annotations

import bisect
import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from evals import filler_text
from evals.example import PROMPTS_OWN, Example, SuiteTask, Tokenizer
from evals.generated import Draft, generated_examples
from evals.infinitebench_scores import first_integer

MAX_NEW_TOKENS = 16
_NUM_KEYS = 8
_PREFACE = "Some codes are stated in the text below. Remember them.\n\n"


@dataclass(frozen=True, kw_only=True)
class _Question:
    """Facts and what is asked of them."""

    facts: Sequence[tuple[float, str]]
    """(distance from the end, 0 to 1; text); the first is the evidence, of two hops the farther."""
    question: str
    prefix: str
    answer: str
    decoys: tuple[str, ...]


def names(lengths: tuple[int, ...]) -> list[str]:
    """All `TASK_LENGTH`, task by task."""
    return [f"{task}_{length}" for task in TASKS for length in lengths]


def build(
    name: str,
    *,
    tokenizer: Tokenizer,
    samples: int,
    seed: int,
    max_examples: int,
    filler: str = "",
    separator: str = " ->",
) -> SuiteTask:
    """The task of a name at a length; arguments as in `evals.ruler.build`, and of `SuiteConfig`.

    Raises:
        ValueError: the folder of the filler has no text.
    """
    task, _, length = name.rpartition("_")
    lines = filler_text.folder_lines(filler) if filler else ()

    def load() -> Iterator[Example]:
        return generated_examples(
            partial(_draw, task, samples, lines, separator),
            tokenizer,
            name=name,
            length=int(length),
            max_new_tokens=MAX_NEW_TOKENS,
            samples=samples,
            seed=seed,
            smallest=2,
        )

    return SuiteTask(
        name=name,
        suite="recall",
        metric="exact_match",
        load=load,
        scorer=first_word if task == "notes" else first_code,
        prompts_source=PROMPTS_OWN,
        truncates=False,
        max_examples=max_examples,
    )


def first_code(prediction: str, example: Example) -> float:
    """1 where the first whole number of the prediction is the code."""
    return first_integer(prediction, example.answers[0])


def first_word(prediction: str, example: Example) -> float:
    """1 where the first word of the prediction is the noted one."""
    match = re.search("[A-Za-z]+", prediction)
    return float(match is not None and match.group(0) == example.answers[0])


def _draw(
    task: str,
    samples: int,
    lines: Sequence[str],
    separator: str,
    rng: random.Random,
    size: int,
    index: int,
) -> Draft:
    """Facts among `size` pieces of filler; sample `index` has its evidence at a set distance."""
    filler = filler_text.stretch(lines, rng, size) if lines else filler_text.sentences(rng, size)
    far = (index + 0.5) / samples
    if task == "notes":
        return _as_lines(filler, _notes(rng, far, separator))
    asked = _CODES[task](rng, far)
    if lines:
        return _as_lines(filler, asked, preface=_PREFACE)
    return _as_prose(filler, asked)


def _single(rng: random.Random, far: float) -> _Question:
    return _about_code(filler_text.keys(rng, 1)[0], filler_text.codes(rng, 1), [far])


def _multi_key(rng: random.Random, far: float) -> _Question:
    keys, codes = filler_text.keys(rng, _NUM_KEYS), filler_text.codes(rng, _NUM_KEYS)
    asked = _about_code(keys[0], codes, [far])
    others = [
        (min(max(far + rng.uniform(-0.05, 0.05), 0.0), 1.0), _fact(key, code))
        for key, code in zip(keys[1:], codes[1:], strict=True)
    ]
    return _with(asked, others)


def _multi_hop(rng: random.Random, far: float) -> _Question:
    keys, codes = filler_text.keys(rng, 3), filler_text.codes(rng, 2)
    return _Question(
        facts=(
            (far, f"The {keys[0]} lies inside the {keys[1]}."),
            (rng.uniform(0, far), _fact(keys[1], codes[0])),
            (rng.random(), _fact(keys[2], codes[1])),
        ),
        question=f"What is the code of the thing that the {keys[0]} lies inside?",
        prefix=" The code is",
        answer=codes[0],
        decoys=tuple(codes[1:]),
    )


def _overwritten(rng: random.Random, far: float) -> _Question:
    key, codes = filler_text.keys(rng, 1)[0], filler_text.codes(rng, 3)
    first, second = sorted((rng.uniform(far, 1.0) for _ in range(2)), reverse=True)
    asked = _about_code(key, codes, [])
    stated = [
        (far, f"From now on the code of the {key} is {codes[0]}."),
        (second, f"From now on the code of the {key} is {codes[1]}."),
        (first, _fact(key, codes[2])),
    ]
    return _with(asked, stated)


_CODES: dict[str, Callable[[random.Random, float], _Question]] = {
    "single": _single,
    "multi_key": _multi_key,
    "multi_hop": _multi_hop,
    "overwritten": _overwritten,
}
TASKS: tuple[str, ...] = (*_CODES, "notes")


def _fact(key: str, code: str) -> str:
    return f"The code of the {key} is {code}."


def _about_code(key: str, codes: Sequence[str], places: Sequence[float]) -> _Question:
    """The key's code is the first; the others are decoys."""
    return _Question(
        facts=[(place, _fact(key, codes[0])) for place in places],
        question=f"What is the code of the {key}?",
        prefix=f" The code of the {key} is",
        answer=codes[0],
        decoys=tuple(codes[1:]),
    )


def _with(asked: _Question, facts: Sequence[tuple[float, str]]) -> _Question:
    return _Question(
        facts=(*asked.facts, *facts),
        question=asked.question,
        prefix=asked.prefix,
        answer=asked.answer,
        decoys=asked.decoys,
    )


def _notes(rng: random.Random, far: float, separator: str) -> _Question:
    pairs = filler_text.notes(rng, _NUM_KEYS)
    places = [far, *(rng.random() for _ in pairs[1:])]
    return _Question(
        facts=[
            (place, f"# note: {thing}{separator} {animal}")
            for place, (thing, animal) in zip(places, pairs, strict=True)
        ],
        question="",
        prefix=f"\n# recall: {pairs[0][0]}{separator}",
        answer=pairs[0][1],
        decoys=tuple(animal for _, animal in pairs[1:]),
    )


def _inserted(filler: Sequence[str], facts: Sequence[tuple[float, str]]) -> list[str]:
    """Filler with the facts put in at their distances, by characters; they never swap places."""
    ends = list(itertools.accumulate(len(part) + 1 for part in filler))
    parts = list(filler)
    for shift, (distance, fact) in enumerate(sorted(facts, key=lambda fact: -fact[0])):
        parts.insert(bisect.bisect_left(ends, (1 - distance) * ends[-1]) + shift, fact)
    return parts


def _as_prose(filler: Sequence[str], asked: _Question) -> Draft:
    return _draft(_PREFACE + filler_text.join(_inserted(filler, asked.facts)), asked)


def _as_lines(filler: Sequence[str], asked: _Question, preface: str = "") -> Draft:
    return _draft(preface + "\n".join(_inserted(filler, asked.facts)), asked)


def _draft(text: str, asked: _Question) -> Draft:
    prompt = text
    if asked.question:
        prompt += f"\n\n{asked.question} Answer with the code only."
    evidence = asked.facts[0][1]
    start = prompt.rindex(evidence)
    return Draft(
        prompt=prompt,
        answer_prefix=asked.prefix,
        answers=(asked.answer,),
        evidence=(start, start + len(evidence)),
        extra={"decoys": asked.decoys},
    )
