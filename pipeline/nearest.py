"""What a misspelt word was meant for: the nearest known ones, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

ALIASES: dict[str, tuple[str, ...]] = {
    "learning_rate": ("lr",),
    "epochs": ("steps",),
    "max_steps": ("steps",),
    "iterations": ("steps",),
    "batch": ("batch_size",),
    "max_length": ("seq_length",),
    "context_length": ("seq_length",),
    "warmup": ("warmup_fraction",),
    "warmup_steps": ("warmup_fraction",),
    "warmup_ratio": ("warmup_fraction",),
    "decay_steps": ("decay_fraction",),
    "window": ("window_size", "window_range"),
    "window_size": ("window_range",),
    "chunk": ("chunk_size", "chunk_range"),
    "chunk_size": ("chunk_range",),
    "sinks": ("num_sinks", "sink_range"),
    "num_sinks": ("sink_range",),
    "heads": ("num_heads",),
    "max_grad_norm": ("grad_clip",),
    "save_steps": ("checkpoint_every",),
    "gradient_checkpointing": ("recompute",),
    "output_dir": ("dir",),
}
"""What settings are called elsewhere, and what they, or the nearest to them, are called here."""


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean X?` for a misspelt word, or the list of all where none is near."""
    if found := _near(word, known):
        return f"; did you mean {' or '.join(found)}?"
    section = word.rpartition(".")[0] + "."
    shown = [key for key in known if key.startswith(section)]
    shown = shown or [key for key in known if "." not in key]
    more = ", …" if len(shown) > 24 else ""
    return f"; known: {', '.join(shown[:24])}{more}"


def _near(word: str, known: Sequence[str]) -> list[str]:
    """Known words that `word` may have been meant for; a key's section is taken as meant."""
    section, dot, name = word.rpartition(".")
    names = (name, *ALIASES.get(name, ()))
    if found := [key for key in (section + dot + other for other in names) if key in known]:
        return found[:1]
    elsewhere = [key for key in known if key.endswith(tuple("." + other for other in names))]
    if deeper := [key for key in elsewhere if dot and key.startswith(section + dot)]:
        return deeper
    inside = {key[len(section + dot) :]: key for key in known if key.startswith(section + dot)}
    if inside:
        close = difflib.get_close_matches(name, inside, n=1, cutoff=0.75)
        return [inside[key] for key in close] or elsewhere[:6]
    by_section = {key.rpartition(".")[0]: key for key in elsewhere}
    close = difflib.get_close_matches(section, by_section, n=1, cutoff=0.7)
    close = [by_section[key] for key in close]
    return close or elsewhere[:6] or difflib.get_close_matches(word, known, n=1, cutoff=0.75)
