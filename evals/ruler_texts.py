"""What RULER's prompts are made of: templates, words and haystacks."""

from __future__ import annotations

import ast
import functools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from evals import filler_text, upstream_prompts
from evals.example import PROMPTS_OWN, PROMPTS_UPSTREAM

_DIGESTS: dict[str, str] = {
    **{"niah.template": "b373c00e238df12b", "niah.prefix": "994f3a46e763414f"},
    **{"vt.template": "fcfaf2eab2bc3e35", "vt.prefix": "4a4e9010ec4141a3"},
    **{"cwe.template": "45fff5d17627b65a", "cwe.prefix": "8ee526599bbc7372"},
    **{"fwe.template": "a0c7b873cf500d6c", "fwe.prefix": "9a72271c5762c96d"},
    **{"qa.template": "18a659c9723f24f1", "qa.prefix": "255204f061d7e266"},
    **{"needle": "8b1728a938426e42", "noise": "c2fcf70de6081e6f", "document": "ce8bd2851618becf"},
}
"""Of NVIDIA/RULER c3f5e3b, `scripts/data/synthetic`."""

_OWN: dict[str, str] = {
    "niah.template": (
        "The text below states the secret {type_needle_v} of some things.\n{context}\n"
        "What are the secret {type_needle_v} of {query}?"
    ),
    "niah.prefix": " The secret {type_needle_v} of {query} are",
    "vt.template": (
        "The text below holds assignments to variables.\n\n{context}\n"
        "Which variables have the value {query}?"
    ),
    "vt.prefix": " The {num_v} variables with the value {query} are: ",
    "cwe.template": "A numbered list of words:\n{context}\nWhich 10 words occur most often?",
    "cwe.prefix": " The 10 most frequent words are:",
    "fwe.template": "{context}\nWhich three words above, dots aside, occur most often?",
    "fwe.prefix": " The three most frequent words are:",
    "qa.template": "{context}\n\nUse the documents above to answer briefly.\nQuestion: {query}",
    "qa.prefix": " Answer:",
    "needle": "The secret {type_needle_v} of {key} is: {value}.",
    "noise": "Rain fell on the roof. The road was wet. Nobody came by. The lamp stayed on.",
    "document": "[{i}]\n{document}",
}


@functools.cache
def templates() -> tuple[dict[str, str], str]:
    """Texts by name, and where they are from.

    Raises:
        ValueError: the installed harness has other texts than upstream.
    """
    if not upstream_prompts.lm_eval_installed():
        return _OWN, PROMPTS_OWN
    folder = upstream_prompts.lm_eval_folder() / "ruler"
    wanted = {digest: name for name, digest in _DIGESTS.items()}
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.py")):
        if path.name == "essays.py":
            continue
        for text in _strings(path):
            # the harness leaves out a space before some prefixes, and misspells one word
            for candidate in (text, " " + text, text.replace("assgined", "assigned")):
                name = wanted.get(upstream_prompts.digest(candidate))
                if name is not None:
                    found[name] = candidate
    upstream_prompts.check_prompts(
        found, _DIGESTS, source="lm-evaluation-harness", mend="install lm_eval==0.4.13"
    )
    return found, PROMPTS_UPSTREAM


def _strings(path: Path) -> Iterator[str]:
    """The texts in a Python file; those with fields as templates."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value)
                if isinstance(part, ast.Constant)
                else "{" + ast.unparse(part.value) + "}"
                for part in node.values
                if isinstance(part, ast.Constant | ast.FormattedValue)
            )


@functools.cache
def word_lists() -> dict[str, tuple[str, ...]]:
    """Nouns, adjectives and verbs of the package wonderwords, which upstream uses.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from wonderwords import assets
    except ModuleNotFoundError as error:
        raise ValueError(
            "RULER's words need the package wonderwords; pip install 'allmem[evals]'"
        ) from error
    folder = Path(assets.__path__[0])
    return {
        kind: tuple((folder / f"{kind}list.txt").read_text(encoding="utf-8").split("\n")[:-1])
        for kind in ("noun", "adjective", "verb")
    }


def compound(rng: random.Random) -> str:
    """One of the `adjective-noun`."""
    lists = word_lists()
    return f"{rng.choice(lists['adjective'])}-{rng.choice(lists['noun'])}"


@functools.cache
def single_words(seed: int) -> tuple[str, ...]:
    """All nouns, adjectives and verbs, each once, shuffled."""
    words = sorted({word for words in word_lists().values() for word in words})
    random.Random(seed).shuffle(words)
    return tuple(words)


@functools.cache
def haystack_words(folder: str, seed: int) -> tuple[str, ...]:
    """Words of the essays in a folder, or without one of prose made up here.

    Raises:
        ValueError: the folder has no text.
    """
    if not folder:
        prose = " ".join(filler_text.sentences(random.Random(f"{seed}/haystack"), 20000))
        return tuple(prose.split())
    root = Path(folder).expanduser()
    essays = root / "PaulGrahamEssays.json"
    if essays.is_file():
        text = json.loads(essays.read_text(encoding="utf-8"))["text"]
    else:
        files = sorted(root.glob("*.txt")) if root.is_dir() else []
        text = " ".join(path.read_text(encoding="utf-8") for path in files)
    words = tuple(re.sub(r"\s+", " ", text).split(" ")) if text.strip() else ()
    if not words:
        raise ValueError(
            f"{root} has neither PaulGrahamEssays.json nor *.txt for RULER's haystacks; "
            "put texts there or leave eval.suites.ruler_data empty"
        )
    return words


def split_sentences(text: str) -> list[str]:
    """Sentences by their closing mark; upstream asks NLTK's punkt, which needs a download."""
    return re.split(r"(?<=[.!?])\s+", text.strip())
