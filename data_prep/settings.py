"""Settings of the steps between reading and tokenizing: filters, chats, duplicates, eval sets.

All are off unless asked for, so that a configuration without them gives the text as it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

LOSSES = ("auto", "all", "response", "beyond")
TOO_LONG = ("drop", "keep_head", "truncate_document")
DEDUP_MODES = ("none", "exact", "near")
CONTAMINATION_POLICIES = ("drop", "cut")


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """What a source's documents are brought to and must be like; in the order of the fields."""

    normalise: bool = False
    """Unicode NFC, line ends as \\n, no control characters (tab and line end stay), no BOM, no
    spaces at line ends, at most two empty lines in a row. Never in `python_packages`."""
    normalise_code: bool = False
    """The same in `python_packages`; set both false for a source of code in other files."""
    min_characters: int = 0
    """Shorter documents are dropped; of chats all messages count together, here and below."""
    max_characters: int | None = None
    """Longer documents are dropped."""
    min_words: int = 0
    """Documents of fewer words are dropped; an ideograph is a word."""
    max_words: int | None = None
    min_tokens: int = 0
    """Checked after tokenization, as the next one."""
    max_tokens: int | None = None
    min_letter_fraction: float = 0.0
    """Share of letters and digits among all characters but white space."""
    max_repeated_line_fraction: float = 1.0
    """Share of the characters that lie in lines which stood in the document before."""
    max_line_characters: int | None = None
    """Documents with a longer line are dropped."""
    languages: tuple[str, ...] = ()
    """ISO 639-1 codes to keep, such as [en, zh]; empty: all. Judged by `language_characters` of the
    begin, middle and end together."""
    language_characters: int = 400
    min_language_confidence: float = 0.5
    """The kept languages' share of the probability must be at least this."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "languages", tuple(self.languages))
        for low, high in (
            ("min_characters", "max_characters"),
            ("min_words", "max_words"),
            ("min_tokens", "max_tokens"),
        ):
            least, most = getattr(self, low), getattr(self, high)
            if least < 0 or (most is not None and most < max(least, 1)):
                raise ValueError(
                    f"filters.{low}={least} and filters.{high}={most} must be 0 <= min <= max "
                    f"(max above 0); correct one of them"
                )
        for name in ("min_letter_fraction", "max_repeated_line_fraction"):
            check_share(f"filters.{name}", getattr(self, name))
        check_share("filters.min_language_confidence", self.min_language_confidence)
        if self.language_characters < 20:
            raise ValueError(
                f"filters.language_characters={self.language_characters} must be at least 20; "
                "less text has no clear language"
            )
        if self.max_line_characters is not None and self.max_line_characters < 1:
            raise ValueError(
                f"filters.max_line_characters={self.max_line_characters} must be at least 1"
            )
        for code in self.languages:
            if len(code) != 2 or not code.isascii() or not code.islower():
                raise ValueError(
                    f"filters.languages: {code!r} is no ISO 639-1 code; write two small letters "
                    "such as en or zh"
                )


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """How conversations become samples."""

    too_long: str = "drop"
    """Conversations beyond seq_length: `drop` (counted); `keep_head`: the first seq_length tokens,
    dropped where no response is among them; `truncate_document`: the document part loses its end
    (a conversation without one: the longest message before the first response loses its middle)
    until all fits, questions and answers stay whole."""
    min_document_tokens: int = 64
    """`truncate_document`: dropped where less of the document would be left."""
    separator: str = "\n\n"
    """Between the document part and the first question."""

    def __post_init__(self) -> None:
        check_choice("chat.too_long", self.too_long, TOO_LONG)
        if self.min_document_tokens < 0:
            raise ValueError(
                f"chat.min_document_tokens={self.min_document_tokens} must be at least 0"
            )


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """Removal of duplicates, over all sources together; the first in order is kept."""

    mode: str = "none"
    """`none`; `exact`: the same words and signs (case and white space do not count); `near`: those,
    and documents whose sets of word n-grams are alike."""
    threshold: float = 0.8
    """`near`: Jaccard similarity of the n-gram sets from which a document is dropped."""
    num_perm: int = 128
    """`near`: numbers in a MinHash signature (4 bytes each); the similarity's standard error is
    at most 0.5/√num_perm."""
    shingle_size: int = 5
    """`near`: words of an n-gram; ideographs are words of their own."""
    seed: int = 1

    def __post_init__(self) -> None:
        check_choice("dedup.mode", self.mode, DEDUP_MODES)
        if not 0.1 <= self.threshold <= 1.0:
            raise ValueError(f"dedup.threshold={self.threshold} must lie in [0.1, 1]")
        if not 16 <= self.num_perm <= 1024:
            raise ValueError(f"dedup.num_perm={self.num_perm} must lie in [16, 1024]; 128 is usual")
        if not 1 <= self.shingle_size <= 50:
            raise ValueError(f"dedup.shingle_size={self.shingle_size} must lie in [1, 50]")
        if self.seed < 0:
            raise ValueError(f"dedup.seed={self.seed} must be at least 0")


@dataclass(frozen=True, kw_only=True)
class EvalSetConfig:
    """Texts that no training document may hold."""

    path: str
    """File, folder or glob: .jsonl (also .gz, .xz, .zst), .json, .parquet; others are plain text,
    an item a file."""
    fields: tuple[str, ...] = ()
    """Fields of a record to take, dotted where nested; empty: every text in it, however deep."""
    name: str = ""
    """Name in the report; the file's or folder's name where empty."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", tuple(self.fields))
        if not self.path:
            raise ValueError("data.decontaminate.sets[i].path is empty; name the evaluation's file")


@dataclass(frozen=True, kw_only=True)
class DecontaminateConfig:
    """Removal of text that stands in evaluation sets, from both splits."""

    sets: list[EvalSetConfig] = field(default_factory=list)
    """Evaluation sets; empty: no check."""
    ngram: int = 13
    """So many words in a row, case and punctuation aside, are a match."""
    min_words: int = 8
    """Items shorter than `ngram` match as a whole if they have at least so many words; shorter ones
    cannot be checked and are counted."""
    min_matches: int = 1
    """Different n-grams of one evaluation item that a document must hold."""
    policy: str = "drop"
    """`drop` the document, or `cut` the matching passages with `cut_characters` around them; a chat
    is always dropped."""
    cut_characters: int = 200
    max_cut_fraction: float = 0.5
    """`cut`: where more than this share would go, the document is dropped."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sets", list(self.sets))
        check_choice("decontaminate.policy", self.policy, CONTAMINATION_POLICIES)
        if not 1 <= self.min_words <= self.ngram <= 100:
            raise ValueError(
                f"decontaminate.min_words={self.min_words} and ngram={self.ngram} must be "
                "1 <= min_words <= ngram <= 100; 8 and 13 are usual"
            )
        if self.min_matches < 1:
            raise ValueError(f"decontaminate.min_matches={self.min_matches} must be at least 1")
        if self.cut_characters < 0:
            raise ValueError(
                f"decontaminate.cut_characters={self.cut_characters} must be at least 0"
            )
        check_share("decontaminate.max_cut_fraction", self.max_cut_fraction)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError for a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")


def check_share(name: str, value: float) -> None:
    """Raises ValueError for a share outside [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}={value} must lie in [0, 1]")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON types."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def config_hash(plain: dict[str, Any]) -> str:
    """SHA-256 (hex) of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
