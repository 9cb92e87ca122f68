"""RULER's 13 tasks, generated as `scripts/data/synthetic` of NVIDIA/RULER c3f5e3b does.

Construction, parameters and prompts are upstream's; the random draws are not, so examples are of
the same kind but not the same ones. Each sample is independent of how many are drawn.
"""

from __future__ import annotations

import itertools
import math
import random
import string
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from evals import ruler_texts
from evals.example import PROMPTS_OWN, Example, SuiteTask, Tokenizer
from evals.generated import Draft, Make, generated_examples
from evals.ruler_qa import qa_make
from evals.ruler_scores import any_found, share_found


@dataclass(frozen=True)
class _Needle:
    """Parameters of a needle task, as in upstream's `synthetic.yaml`."""

    haystack: str
    key: str
    value: str
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


_NEEDLES: dict[str, _Needle] = {
    "niah_single_1": _Needle("noise", "words", "numbers"),
    "niah_single_2": _Needle("essay", "words", "numbers"),
    "niah_single_3": _Needle("essay", "words", "uuids"),
    "niah_multikey_1": _Needle("essay", "words", "numbers", num_keys=4),
    "niah_multikey_2": _Needle("needle", "words", "numbers"),
    "niah_multikey_3": _Needle("needle", "uuids", "uuids"),
    "niah_multivalue": _Needle("essay", "words", "numbers", num_values=4),
    "niah_multiquery": _Needle("essay", "words", "numbers", num_keys=4, num_queries=4),
}
_MAX_NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
_QA = {"qa_1": "squad", "qa_2": "hotpotqa"}
TASKS: tuple[str, ...] = (*_NEEDLES, "vt", "cwe", "fwe", *_QA)


def names(lengths: tuple[int, ...]) -> list[str]:
    """All `TASK_LENGTH`, task by task."""
    return [f"{task}_{length}" for task in TASKS for length in lengths]


def build(
    name: str, *, data: str, tokenizer: Tokenizer, samples: int, seed: int, max_examples: int
) -> SuiteTask:
    """The task of a name at a length.

    Args:
        name: one of `names()`.
        data: folder of essays and question files, or empty.
        tokenizer: the model's, which measures the length.
        samples: how many examples.
        seed: of the draws.
        max_examples: 0 takes all.

    Raises:
        ValueError: questions are asked for without a folder, or a package is missing.
    """
    task, _, length = name.rpartition("_")
    kind = task.split("_")[0]
    texts, source = ruler_texts.templates()
    make, smallest, step = _maker(task, int(length), texts, data, seed)
    if task in _NEEDLES and _NEEDLES[task].haystack == "essay" and not data:
        source = PROMPTS_OWN  # the haystack is

    def load() -> Iterator[Example]:
        return generated_examples(
            make,
            tokenizer,
            name=name,
            length=int(length),
            max_new_tokens=_MAX_NEW_TOKENS[kind],
            samples=samples,
            seed=seed,
            smallest=smallest,
            step=step,
        )

    return SuiteTask(
        name=name,
        suite="ruler",
        metric="found",
        load=load,
        scorer=_any if kind == "qa" else _share,
        prompts_source=source,
        truncates=False,
        mean_first=True,
        max_examples=max_examples,
    )


def _share(prediction: str, example: Example) -> float:
    return share_found(prediction, example.answers)


def _any(prediction: str, example: Example) -> float:
    return any_found(prediction, example.answers)


def _maker(
    task: str, length: int, texts: dict[str, str], data: str, seed: int
) -> tuple[Make, int, int]:
    """How a task is drawn, its smallest size, and by how much sizes are lowered."""
    if task in _NEEDLES:
        needle = _NEEDLES[task]
        if needle.haystack == "essay":
            words = ruler_texts.haystack_words(data, seed)
            return partial(_essay_needles, needle, texts, words), 60, 20
        return partial(_line_needles, needle, texts), needle.num_keys, 1
    if task == "vt":
        return partial(_variables, texts, 12 if length >= 1024 else 5), 6, 1
    if task == "cwe":
        return partial(_common_words, texts, length < 4096, seed), 11, 2
    if task == "fwe":
        vocabulary = max((length - _MAX_NEW_TOKENS["fwe"]) // 50, 8)
        return partial(_frequent_words, texts, vocabulary), 24, max(length // 500, 1)
    return qa_make(_QA[task], data, texts), 1, 1


def _random(kind: str, rng: random.Random) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "words":
        return ruler_texts.compound(rng)
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


@dataclass(frozen=True)
class _Questions:
    needles: list[str]
    asked: list[str]
    """The needles that hold an answer."""
    template: str
    prefix: str
    fields: dict[str, str]
    answers: tuple[str, ...]

    def draft(self, context: str) -> Draft:
        prompt = self.template.format(context=context, **self.fields)
        starts = [(prompt.index(needle), len(needle)) for needle in self.asked]
        start, size = min(starts)
        return Draft(
            prompt=prompt,
            answer_prefix=self.prefix.format(**self.fields),
            answers=self.answers,
            evidence=(start, start + size),
        )


def _questions(needle: _Needle, texts: dict[str, str], rng: random.Random) -> _Questions:
    stated: dict[str, list[str]] = {}
    needles: list[str] = []
    by_key: dict[str, list[str]] = {}
    while len(stated) < needle.num_keys:
        key = _random(needle.key, rng)
        if key in stated:
            continue
        stated[key] = [_random(needle.value, rng) for _ in range(needle.num_values)]
        by_key[key] = [
            texts["needle"].format(type_needle_v=needle.value, key=key, value=value)
            for value in stated[key]
        ]
        needles += by_key[key]
    rng.shuffle(needles)
    queries = rng.sample(list(stated), needle.num_queries)
    template, prefix, kind = texts["niah.template"], texts["niah.prefix"], needle.value
    if needle.num_queries * needle.num_values == 1:
        template, prefix, kind = _singular(template), _singular(prefix), kind.removesuffix("s")
    query = queries[0]
    if len(queries) > 1:
        query = ", ".join(queries[:-1]) + ", and " + queries[-1]
    return _Questions(
        needles=needles,
        asked=[text for key in queries for text in by_key[key]],
        template=template,
        prefix=prefix,
        fields={"type_needle_v": kind, "query": query},
        answers=tuple(value for key in queries for value in stated[key]),
    )


def _singular(text: str) -> str:
    for many, one in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        text = text.replace(many, one)
    return text


def _essay_needles(
    needle: _Needle,
    texts: dict[str, str],
    words: tuple[str, ...],
    rng: random.Random,
    size: int,
    index: int,
) -> Draft:
    """Needles between the sentences of the first `size` words of an essay, at 40 depths."""
    questions = _questions(needle, texts, rng)
    repeats = -(-size // len(words))
    sentences = ruler_texts.split_sentences(" ".join((words * repeats)[:size]))
    depths = sorted(rng.sample(range(40), len(questions.needles)))
    parts: list[str] = []
    last = 0
    for depth, text in zip(depths, questions.needles, strict=True):
        place = int(len(sentences) * round(depth * 100 / 39) / 100)
        parts += [" ".join(sentences[last:place]), text]
        last = place
    parts.append(" ".join(sentences[last:]))
    return questions.draft(" ".join(parts))


def _line_needles(
    needle: _Needle, texts: dict[str, str], rng: random.Random, size: int, index: int
) -> Draft:
    """Needles between `size` lines of noise, or of other needles."""
    questions = _questions(needle, texts, rng)
    if needle.haystack == "noise":
        lines = [texts["noise"]] * size
    else:
        lines = [
            texts["needle"].format(
                type_needle_v=needle.value,
                key=_random(needle.key, rng),
                value=_random(needle.value, rng),
            )
            for _ in range(size)
        ]
    places = sorted(rng.sample(range(size), len(questions.needles)), reverse=True)
    for place, text in zip(places, questions.needles, strict=True):
        lines.insert(place, text)
    return questions.draft("\n".join(lines))


_HOPS = 4


def _variables(
    texts: dict[str, str], shown_size: int, rng: random.Random, size: int, index: int
) -> Draft:
    """One chain of assignments among lines of noise, after a worked example of fewer lines."""
    example, prefix, names, _ = _chain(texts, rng, shown_size, letters=3)
    prompt, answer_prefix, answers, first = _chain(texts, rng, size, letters=5)
    shown = f"{example}{prefix} {' '.join(names)}\n\n"
    start = prompt.index(first)
    evidence = (len(shown) + start, len(shown) + start + len(first))
    return Draft(
        prompt=shown + prompt,
        answer_prefix=answer_prefix,
        answers=tuple(answers),
        evidence=evidence,
    )


def _chain(
    texts: dict[str, str], rng: random.Random, size: int, *, letters: int
) -> tuple[str, str, list[str], str]:
    """Prompt, answer prefix, the variables, and the first assignment."""
    names: dict[str, None] = {}
    while len(names) < _HOPS + 1:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    chain = list(names)
    value = str(rng.randint(10000, 99998))
    lines = [f"VAR {chain[0]} = {value}"]
    lines += [f"VAR {new} = VAR {old} " for old, new in itertools.pairwise(chain)]
    context = [texts["noise"]] * size
    for shift, place in enumerate(sorted(rng.sample(range(size), len(lines)))):
        context.insert(place + shift, lines[shift])
    fields = {"query": value, "num_v": str(len(chain))}
    prompt = texts["vt.template"].format(context="\n".join(context), **fields)
    return prompt, texts["vt.prefix"].format(**fields), chain, lines[0]


def _common_words(
    texts: dict[str, str], short: bool, seed: int, rng: random.Random, size: int, index: int
) -> Draft:
    """A shuffled list in which 10 of `size` words stand more often, after a worked example."""
    shown, shown_answers = _word_list(rng, seed, *((20, 3, 1) if short else (40, 10, 3)))
    context, answers = _word_list(rng, seed, size, *((6, 1) if short else (30, 3)))
    template, prefix = texts["cwe.template"], texts["cwe.prefix"]
    example = f"{template.format(context=shown)}{prefix} {_numbered(shown_answers)}"
    return Draft(
        prompt=f"{example}\n{template.format(context=context)}",
        answer_prefix=prefix,
        answers=tuple(answers),
    )


def _word_list(
    rng: random.Random, seed: int, size: int, often: int, seldom: int
) -> tuple[str, list[str]]:
    pool = ruler_texts.single_words(seed)
    if size <= len(pool):
        chosen = rng.sample(pool, size)
    else:  # upstream has a longer list of English words for this
        distinct: dict[str, None] = {}
        while len(distinct) < size:
            distinct[ruler_texts.compound(rng)] = None
        chosen = list(distinct)
    words = chosen[:10] * often + chosen[10:] * seldom
    rng.shuffle(words)
    return _numbered(words), chosen[:10]


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


def _frequent_words(
    texts: dict[str, str], vocabulary: int, rng: random.Random, size: int, index: int
) -> Draft:
    """`size` coded words, the k-th most frequent with share k^-2 / zeta(2); the first is noise."""
    coded: dict[str, None] = {}
    while len(coded) < vocabulary:
        coded["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    ranked = ["...", *list(coded)[1:]]
    total = math.pi**2 / 6
    words = [w for k, w in enumerate(ranked, 1) for _ in range(int(size / k**2 / total))]
    rng.shuffle(words)
    return Draft(
        prompt=texts["fwe.template"].format(context=" ".join(words)),
        answer_prefix=texts["fwe.prefix"],
        answers=tuple(ranked[1:4]),
    )
