"""Steps between reading and tokenizing: each a pure function of one document.

A step gives the document, a changed copy of it, or a `Drop` with the reason. Steps are made once
for a process and source; nothing is downloaded.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from data_prep.config import PrepareConfig, SourceConfig
from data_prep.decontaminate import decontaminator
from data_prep.ngrams import find_words, letter_counts
from data_prep.readers.base import Document, Drop, UnitReport
from data_prep.settings import FilterConfig


class Step(Protocol):
    """What is done with a document."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    def apply(self, document: Document) -> Document | Drop:
        """The document as it goes on, or why it does not."""
        ...


def build_steps(config: PrepareConfig, source: SourceConfig) -> list[Step]:
    """The steps that a source's documents go through, in order; empty for generated sources.

    Token limits (`filters.min_tokens`, `max_tokens`) and duplicates are not among them.

    Raises:
        ValueError: an evaluation set that cannot be read, a language that is not known.
    """
    if source.generated:
        return []
    filters = source.filters
    code = source.kind == "python_packages"
    steps: list[Step] = []
    if filters.normalise_code if code else filters.normalise:
        steps.append(Normalise(strip_lines=source.kind != "markdown"))
    if filters.min_characters or filters.max_characters is not None:
        steps.append(Characters(filters.min_characters, filters.max_characters))
    if filters.min_words or filters.max_words is not None:
        steps.append(WordCount(filters.min_words, filters.max_words))
    quality = Quality.of(filters)
    if quality != Quality():
        steps.append(quality)
    if filters.languages:
        steps.append(
            Language(
                filters.languages, filters.language_characters, filters.min_language_confidence
            )
        )
    if config.decontaminate.sets:
        steps.append(decontaminator(config.decontaminate))
    return steps


def apply_steps(steps: Sequence[Step], document: Document) -> Document | Drop:
    """The document after all steps, or the first drop."""
    for step in steps:
        result = step.apply(document)
        if isinstance(result, Drop):
            return result
        document = result
    return document


def run_steps(steps: Sequence[Step], document: Document, report: UnitReport) -> Document | None:
    """The document after all steps; None, counted in the report, where one drops it."""
    result = apply_steps(steps, document)
    if isinstance(result, Drop):
        report.drop(result, document)
        return None
    for cut in result.cuts:
        report.cut(cut, result)
    return result


_LINE_END = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff]")


@dataclass(frozen=True)
class Normalise:
    """NFC, line ends as \\n, no control characters or BOM, no runs of empty lines."""

    strip_lines: bool = True
    """Take away spaces at line ends (in Markdown two of them mean a line break)."""
    name: str = "normalise"

    def apply(self, document: Document) -> Document | Drop:
        """The document with cleaner text; dropped where nothing is left of it."""
        changed = replace(
            document,
            text=self.clean(document.text),
            context=self.clean(document.context),
            messages=tuple(
                {**message, "content": self.clean(message["content"])}
                for message in document.messages
            ),
        )
        return changed if changed.num_characters else Drop("empty after normalising")

    def clean(self, text: str) -> str:
        """One text, normalised; doing it twice changes nothing more."""
        text = _CONTROL.sub("", _LINE_END.sub("\n", text))
        if not text.isascii():
            text = unicodedata.normalize("NFC", text)
        if self.strip_lines and (" \n" in text or "\t\n" in text or text.endswith((" ", "\t"))):
            text = "\n".join([line.rstrip(" \t") for line in text.split("\n")])
        while "\n\n\n\n" in text:
            text = text.replace("\n\n\n\n", "\n\n\n")
        return text


@dataclass(frozen=True)
class Characters:
    """Documents of a certain length only."""

    least: int
    most: int | None
    name: str = "characters"

    def apply(self, document: Document) -> Document | Drop:
        """The document, where its length is allowed."""
        return _between(document, document.num_characters, self.least, self.most, self.name)


@dataclass(frozen=True)
class WordCount:
    """Documents of a certain number of words only."""

    least: int
    most: int | None
    name: str = "words"

    def apply(self, document: Document) -> Document | Drop:
        """The document, where its number of words is allowed."""
        count = len(find_words(document.content))
        return _between(document, count, self.least, self.most, self.name)


def _between(
    document: Document, count: int, least: int, most: int | None, name: str
) -> Document | Drop:
    if count < least:
        return Drop(f"fewer than {least} {name}", str(count))
    if most is not None and count > most:
        return Drop(f"more than {most} {name}", str(count))
    return document


@dataclass(frozen=True)
class Quality:
    """A few rules that leave out tables of numbers, menus and minified files."""

    min_letter_fraction: float = 0.0
    max_repeated_line_fraction: float = 1.0
    max_line_characters: int | None = None
    name: str = "quality"

    @classmethod
    def of(cls, filters: FilterConfig) -> Quality:
        """The rules of a configuration."""
        return cls(
            filters.min_letter_fraction,
            filters.max_repeated_line_fraction,
            filters.max_line_characters,
        )

    def apply(self, document: Document) -> Document | Drop:
        """The document, where it keeps all rules."""
        text = document.content
        if self.max_line_characters is not None:
            longest = max(map(len, text.split("\n")))
            if longest > self.max_line_characters:
                return Drop(
                    f"a line of more than {self.max_line_characters} characters", str(longest)
                )
        if self.min_letter_fraction > 0.0:
            letters, characters = letter_counts(text)
            share = letters / max(characters, 1)
            if share < self.min_letter_fraction:
                return Drop(f"less than {self.min_letter_fraction:g} letters", f"{share:.3f}")
        if self.max_repeated_line_fraction < 1.0:
            share = repeated_line_fraction(text)
            if share > self.max_repeated_line_fraction:
                return Drop(
                    f"more than {self.max_repeated_line_fraction:g} in repeated lines",
                    f"{share:.3f}",
                )
        return document


def repeated_line_fraction(text: str) -> float:
    """Share of the characters in lines that stood in the text before; margins do not count."""
    seen: set[str] = set()
    total = repeated = 0
    for line in text.split("\n"):
        plain = line.strip()
        if not plain:
            continue
        total += len(plain)
        if plain in seen:
            repeated += len(plain)
        seen.add(plain)
    return repeated / max(total, 1)


class Language:
    """Documents in certain languages only, judged by samples; the model comes with py3langid."""

    name = "language"

    def __init__(
        self, languages: Sequence[str], num_characters: int, min_confidence: float
    ) -> None:
        self._identifier = _identifier()
        unknown = sorted(set(languages) - set(self._identifier.nb_classes))
        if unknown:
            known = ", ".join(sorted(set(self._identifier.nb_classes)))
            raise ValueError(
                f"filters.languages: {', '.join(unknown)} not known to py3langid; it knows {known}"
            )
        self._languages = frozenset(languages)
        self._num_characters = num_characters
        self._min_confidence = min_confidence

    def apply(self, document: Document) -> Document | Drop:
        """The document, where the languages have enough of the probability."""
        sample = sample_text(document.content, self._num_characters)
        ranked: list[tuple[str, float]] = self._identifier.rank(sample)
        share = sum(value for language, value in ranked if language in self._languages)
        if share >= self._min_confidence:
            return document
        best, value = ranked[0]
        return Drop(f"language {best}", f"{value:.2f}")


def sample_text(text: str, num_characters: int) -> str:
    """Begin, middle and end of a text, `num_characters` together, joined by line ends."""
    if len(text) <= num_characters:
        return text
    part = num_characters // 3
    starts = (0, (len(text) - part) // 2, len(text) - part)
    return "\n".join(text[start : start + part] for start in starts)


@functools.cache
def _identifier() -> Any:
    """The model of 140 languages, 5 MB, read from the installed package."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
