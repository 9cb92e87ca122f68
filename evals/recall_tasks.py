"""Our own recall tasks: facts at controlled distances in made-up prose, asked for at the end.

| task | what is stated | what is asked |
|---|---|---|
| `single` | one code | it |
| `multi_key` | the codes of 8 things, near each other | one of them |
| `multi_hop` | in what a thing lies; elsewhere the code of that | the code, asked by the thing |
| `overwritten` | the code of a thing, then two more times a new one | the last one |

The distance of the evidence runs evenly over the samples, from right before the question to the
start of the text, so that a score by distance has samples in every bin. Prompts are our own and
their scores compare with no other suite.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

from evals import filler_text
from evals.example import PROMPTS_OWN, Example, SuiteTask, Tokenizer
from evals.generated import Draft, generated_examples
from evals.infinitebench_scores import first_integer

TASKS: tuple[str, ...] = ("single", "multi_key", "multi_hop", "overwritten")
MAX_NEW_TOKENS = 16
_NUM_KEYS = 8
_PREFACE = "Some codes are stated in the text below. Remember them.\n\n"


def names(lengths: tuple[int, ...]) -> list[str]:
    """All `TASK_LENGTH`, task by task."""
    return [f"{task}_{length}" for task in TASKS for length in lengths]


def build(
    name: str, *, tokenizer: Tokenizer, samples: int, seed: int, max_examples: int
) -> SuiteTask:
    """The task of a name at a length; arguments as in `evals.ruler.build`."""
    task, _, length = name.rpartition("_")

    def load() -> Iterator[Example]:
        return generated_examples(
            partial(_draw, task, samples),
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
        scorer=score,
        prompts_source=PROMPTS_OWN,
        truncates=False,
        max_examples=max_examples,
    )


def score(prediction: str, example: Example) -> float:
    """1 where the first whole number of the prediction is the code."""
    return first_integer(prediction, example.answers[0])


def _draw(task: str, samples: int, rng: random.Random, size: int, index: int) -> Draft:
    """Facts among `size` sentences; sample `index` has its evidence at (index + 1/2) / samples."""
    text = filler_text.sentences(rng, size)
    far = (index + 0.5) / samples
    keys = filler_text.keys(rng, _NUM_KEYS)
    codes = filler_text.codes(rng, _NUM_KEYS)
    answer, decoys = codes[0], codes[1:]
    key = keys[0]
    facts: list[tuple[float, str]]
    if task == "single":
        facts = [(far, _fact(key, answer))]
    elif task == "multi_key":
        near = [min(max(far + rng.uniform(-0.05, 0.05), 0.0), 1.0) for _ in decoys]
        others = zip(near, keys[1:], decoys, strict=True)
        facts = [(far, _fact(key, answer)), *((at, _fact(k, c)) for at, k, c in others)]
    elif task == "multi_hop":
        facts = [
            (far, f"The {key} lies inside the {keys[1]}."),
            (rng.uniform(0, far), _fact(keys[1], answer)),
            (rng.random(), _fact(keys[2], decoys[0])),
        ]
    else:
        earlier = sorted(rng.uniform(far, 1.0) for _ in range(2))
        facts = [
            (far, f"From now on the code of the {key} is {answer}."),
            (earlier[0], f"From now on the code of the {key} is {decoys[0]}."),
            (earlier[1], _fact(key, decoys[1])),
        ]
    return _put_together(text, facts, task, key, answer, decoys)


def _fact(key: str, code: str) -> str:
    return f"The code of the {key} is {code}."


def _put_together(
    text: list[str],
    facts: list[tuple[float, str]],
    task: str,
    key: str,
    answer: str,
    decoys: list[str],
) -> Draft:
    """The first fact is the evidence (of two hops the farther one); facts never swap places."""
    lines = list(text)
    inserted = sorted(facts, key=lambda fact: -fact[0])
    for shift, (distance, fact) in enumerate(inserted):
        lines.insert(round((1 - distance) * len(text)) + shift, fact)
    if task == "multi_hop":
        question = f"What is the code of the thing that the {key} lies inside?"
        prefix = " The code is"
    else:
        question = f"What is the code of the {key}?"
        prefix = f" The code of the {key} is"
    prompt = f"{_PREFACE}{filler_text.join(lines)}\n\n{question} Answer with the code only."
    evidence = facts[0][1]
    start = prompt.rindex(evidence)
    return Draft(
        prompt=prompt,
        answer_prefix=prefix,
        answers=(answer,),
        evidence=(start, start + len(evidence)),
        extra={"decoys": tuple(decoys)},
    )
