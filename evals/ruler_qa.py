"""RULER's two question tasks: SQuAD 2.0 and HotpotQA questions among distracting documents."""

from __future__ import annotations

import functools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.generated import Draft, Make


@dataclass(frozen=True)
class Question:
    """A question, its references, and which documents hold or surround the answer."""

    query: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    near: tuple[int, ...] = ()
    """Other documents of the same article."""


def qa_make(kind: str, folder: str, texts: dict[str, str]) -> Make:
    """How a question with `size` documents is drawn; the index says which question.

    Raises:
        ValueError: the folder or its file is not there.
    """
    file = f"{kind}.json"
    path = Path(folder).expanduser() / file
    if not folder or not path.is_file():
        where = str(path) if folder else "eval.suites.ruler_data, which is empty,"
        source = (
            "SQuAD 2.0's dev-v2.0.json" if kind == "squad" else "HotpotQA's dev distractor file"
        )
        raise ValueError(
            f"RULER's qa tasks need {file} in {where}; put {source} there under that name, or "
            "leave qa_1 and qa_2 out of eval.suites.tasks"
        )

    def make(rng: random.Random, size: int, index: int) -> Draft:
        questions, documents = _read(kind, path)
        question = questions[index % len(questions)]
        chosen = _documents(question, len(documents), size, rng)
        rng.shuffle(chosen)
        parts = [
            texts["document"].format(i=number, document=documents[document])
            for number, document in enumerate(chosen, start=1)
        ]
        prompt = texts["qa.template"].format(context="\n\n".join(parts), query=question.query)
        gold = parts[min(chosen.index(document) for document in question.gold)]
        start = prompt.index(gold)
        return Draft(
            prompt=prompt,
            answer_prefix=texts["qa.prefix"],
            answers=question.answers,
            evidence=(start, start + len(gold)),
        )

    return make


def _documents(question: Question, available: int, size: int, rng: random.Random) -> list[int]:
    """Gold documents, then those of the same article, then any others, up to `size`."""
    chosen = list(question.gold)
    wanted = max(size - len(chosen), 0)
    if wanted <= len(question.near):
        return chosen + rng.sample(question.near, wanted)
    chosen += question.near
    taken = set(chosen)
    others = [i for i in range(available) if i not in taken]
    missing = size - len(chosen)
    if missing <= len(others):
        return chosen + rng.sample(others, missing)
    return chosen + [rng.choice(others or chosen) for _ in range(missing)]


@functools.lru_cache(maxsize=2)
def _read(kind: str, path: Path) -> tuple[list[Question], list[str]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        questions, documents = _squad(data) if kind == "squad" else _hotpotqa(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not {kind}'s own file ({type(error).__name__}: {error}); "
            "download it again from its authors"
        ) from error
    if not questions:
        raise ValueError(f"{path} has no answerable question; download it again")
    return questions, documents


def _squad(data: Any) -> tuple[list[Question], list[str]]:
    articles = data["data"]
    documents = sorted({p["context"] for article in articles for p in article["paragraphs"]})
    number = {text: i for i, text in enumerate(documents)}
    questions = []
    for article in articles:
        members = [number[p["context"]] for p in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            gold = number[paragraph["context"]]
            near = tuple(dict.fromkeys(i for i in members if i != gold))
            questions += [
                Question(qa["question"], tuple(a["text"] for a in qa["answers"]), (gold,), near)
                for qa in paragraph["qas"]
                if not qa["is_impossible"]
            ]
    return questions, documents


def _hotpotqa(data: Any) -> tuple[list[Question], list[str]]:
    def text(title: str, sentences: list[str]) -> str:
        return f"{title}\n{''.join(sentences)}"

    documents = sorted({text(*part) for record in data for part in record["context"]})
    number = {document: i for i, document in enumerate(documents)}
    questions = [
        Question(
            record["question"],
            (record["answer"],),
            tuple(dict.fromkeys(number[text(*part)] for part in record["context"])),
        )
        for record in data
    ]
    return questions, documents
