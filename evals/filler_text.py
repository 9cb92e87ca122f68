"""Filler prose and names made up from word lists, for haystacks without a download."""

from __future__ import annotations

import random
from collections.abc import Sequence

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


def join(parts: Sequence[str], per_paragraph: int = 8) -> str:
    """Sentences as paragraphs."""
    groups = [parts[i : i + per_paragraph] for i in range(0, len(parts), per_paragraph)]
    return "\n".join(" ".join(group) for group in groups)
