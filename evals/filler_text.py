"""Filler prose and names made up from word lists, for haystacks without a download."""

from __future__ import annotations

import functools
import importlib.util
import random
from collections.abc import Sequence
from pathlib import Path

_NAMES = (
    *("Anna", "Boris", "Clara", "Daniel", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas"),
    *("Katya", "Leo", "Marta", "Nils", "Olga", "Paul", "Rosa", "Stefan", "Tilda", "Viktor"),
)
_NOUNS = (
    *("bridge", "garden", "harbour", "kitchen", "ladder", "market", "orchard", "piano", "river"),
    *("school", "tower", "valley", "window", "bakery", "cellar", "drawer", "engine", "ferry"),
    *("gallery", "hammer", "island", "jacket", "kettle", "lantern", "mirror", "notebook"),
    *("office", "pocket", "quarry", "station", "teapot", "umbrella", "village", "wagon"),
)
_ADJECTIVES = (
    *("amber", "broken", "copper", "distant", "empty", "faded", "green", "hollow", "iron"),
    *("little", "marble", "narrow", "old", "painted", "quiet", "round", "silver", "tall"),
    *("velvet", "wooden", "yellow", "striped", "crooked", "polished", "scarlet", "frozen"),
)
_VERBS = (
    *("cleaned", "described", "drew", "found", "kept", "left", "liked", "missed", "moved"),
    *("opened", "passed", "praised", "remembered", "repaired", "saw", "sketched", "visited"),
)
_ENDINGS = (
    *("before noon", "in the rain", "after supper", "on the way home", "without a word"),
    *("for the second time", "late in autumn", "by candlelight", "as the bells rang"),
    *("while the others slept", "with some regret", "to everyone's surprise"),
)


_THINGS = (
    *("almond", "amber", "anvil", "banjo", "beacon", "bottle", "cabin", "candle", "canvas"),
    *("carpet", "castle", "cedar", "cello", "chalk", "cherry", "clover", "compass", "copper"),
    *("cotton", "crystal", "daisy", "diamond", "drawer", "elbow", "emerald", "feather"),
    *("fiddle", "flannel", "flour", "fountain", "galaxy", "garlic", "ginger", "glacier"),
    *("granite", "guitar", "hammer", "harbor", "helmet", "honey", "indigo", "ivory", "kettle"),
)
_ANIMALS = (
    *("albatross", "alpaca", "badger", "beaver", "bison", "buffalo", "cobra"),
    *("condor", "coyote", "crane", "dolphin", "donkey", "eagle", "falcon", "ferret", "finch"),
    *("gazelle", "gecko", "giraffe", "gorilla", "hamster", "hedgehog", "heron", "iguana"),
    *("jackal", "jaguar", "kangaroo", "koala", "leopard", "lizard", "lobster", "mallard"),
)


def notes(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Different things, each with another animal: pairs of recall documents' own words."""
    things, animals = rng.sample(_THINGS, count), rng.sample(_ANIMALS, count)
    return list(zip(things, animals, strict=True))


def sentence(rng: random.Random) -> str:
    """One sentence of about 12 words that states nothing a question asks for."""
    return (
        f"{rng.choice(_NAMES)} {rng.choice(_VERBS)} the {rng.choice(_ADJECTIVES)} "
        f"{rng.choice(_NOUNS)} near the {rng.choice(_NOUNS)} {rng.choice(_ENDINGS)}."
    )


def sentences(rng: random.Random, count: int) -> list[str]:
    """Sentences, drawn independently."""
    return [sentence(rng) for _ in range(count)]


def keys(rng: random.Random, count: int) -> list[str]:
    """Different names of things, as `amber lantern of Olga`."""
    found: dict[str, None] = {}
    while len(found) < count:
        thing = f"{rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}"
        found[f"{thing} of {rng.choice(_NAMES)}"] = None
    return list(found)


def places(rng: random.Random, count: int) -> list[str]:
    """Different places, as `narrow cellar of Hugo`."""
    return keys(rng, count)


def codes(rng: random.Random, count: int, digits: int = 6) -> list[str]:
    """Different numbers of that many digits."""
    return [str(x) for x in rng.sample(range(10 ** (digits - 1), 10**digits), count)]


@functools.cache
def folder_lines(place: str) -> tuple[str, ...]:
    """Lines of the texts in a folder or an installed package, by file name, at most 64 MiB.

    Raises:
        ValueError: there is no text.
    """
    root = Path(place).expanduser()
    if not root.is_dir() and place.isidentifier():
        spec = importlib.util.find_spec(place)
        if spec is not None and spec.submodule_search_locations:
            root = Path(spec.submodule_search_locations[0])
    found: list[str] = []
    left = 64 * 2**20
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".md", ".txt")):
        if left <= 0:
            break
        text = path.read_text(encoding="utf-8", errors="replace")[:left]
        left -= len(text)
        found += text.splitlines()
    if not any(line.strip() for line in found):
        raise ValueError(
            f"{root} has no text in *.py, *.md or *.txt for eval.suites.recall_filler; "
            "name a folder or an installed package that has, or leave it empty"
        )
    return tuple(found)


def stretch(lines: Sequence[str], rng: random.Random, size: int) -> list[str]:
    """Lines of about `80 * size` characters, from a random place on, round the end to the start."""
    place = rng.randrange(len(lines))
    found: list[str] = []
    left = 80 * size
    while left > 0:
        found.append(lines[place % len(lines)][:400])
        left -= len(found[-1]) + 1
        place += 1
    return found


def join(parts: Sequence[str], per_paragraph: int = 8) -> str:
    """Sentences as paragraphs."""
    groups = [parts[i : i + per_paragraph] for i in range(0, len(parts), per_paragraph)]
    return "\n".join(" ".join(group) for group in groups)
