"""Steps keep, change or drop a document, and say why."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.config import PrepareConfig, SourceConfig
from data_prep.filters import (
    Normalise,
    build_steps,
    repeated_line_fraction,
    run_steps,
    sample_text,
)
from data_prep.ngrams import letter_counts
from data_prep.readers import Document, UnitReport
from data_prep.settings import FilterConfig

ENGLISH = "The committee will meet again on Thursday to discuss the budget for the coming year. "
GERMAN = "Der Ausschuss trifft sich am Donnerstag wieder, um den Haushalt zu besprechen. "
CHINESE = "委员会将于星期四再次开会，讨论明年的预算。"


def after(document: Document | str, kind: str = "jsonl", **filters: Any) -> tuple[Any, UnitReport]:
    """The document after the steps of these filters, and what they counted."""
    if isinstance(document, str):
        document = Document(document, "d", "s")
    where: dict[str, Any] = {"path": "x"}
    if kind == "python_packages":
        where = {"packages": ("json",)}
    source = SourceConfig(kind=kind, filters=FilterConfig(**filters), **where)
    report = UnitReport()
    steps = build_steps(PrepareConfig(sources=[source]), source)
    return run_steps(steps, document, report), report


def test_without_filters_nothing_is_done() -> None:
    text = "a\r\nb\0 \n\n\n\n\n"
    kept, report = after(text)
    assert kept == Document(text, "d", "s")
    assert report == UnitReport()


def test_normalising_brings_text_to_one_form() -> None:
    text = "\ufeffe\u0301te\u0301 \t\r\n a\rb\x0cc\x00\x1b[0m\td\u2028e\u0085f\n\n\n\n\n\ng"
    kept, _ = after(text, normalise=True)
    assert kept.text == "été\n a\nb\nc[0m\td\ne\nf\n\n\ng"
    markdown, _ = after("break  \nhere", kind="markdown", normalise=True)
    assert markdown.text == "break  \nhere"


@given(
    st.text(alphabet=st.sampled_from("a \t\n\r\x0b\x0c\x85\0\ufeffé\u0301\u2028中"), max_size=40)
)
def test_normalising_twice_is_normalising_once(text: str) -> None:
    clean = Normalise().clean(text)
    assert Normalise().clean(clean) == clean
    assert unicodedata.is_normalized("NFC", clean)
    assert not set(clean) & set("\r\x0b\x0c\x85\0\ufeff\u2028")
    letters = [c for c in text if c in "aé中"]
    assert sum(map(clean.count, "aé中")) + clean.count("á") >= len(letters)


def test_code_is_left_alone_unless_asked_for() -> None:
    kept, _ = after("x = 1  \r\n", kind="python_packages", normalise=True)
    assert kept.text == "x = 1  \r\n"
    kept, _ = after("x = 1  \r\n", kind="python_packages", normalise_code=True)
    assert kept.text == "x = 1\n"


def test_every_message_of_a_chat_is_normalised() -> None:
    turns = ({"role": "user", "content": "a\r\n?"}, {"role": "assistant", "content": "b\0"})
    kept, _ = after(Document("", "d", "s", "chat", turns, "doc\r"), normalise=True)
    assert [m["content"] for m in kept.messages] == ["a\n?", "b"]
    assert kept.context == "doc\n"


@pytest.mark.parametrize(
    ("filters", "text", "reason"),
    [
        ({"min_characters": 10}, "short", "fewer than 10 characters"),
        ({"max_characters": 3}, "four", "more than 3 characters"),
        ({"min_words": 3}, "two, words!", "fewer than 3 words"),
        ({"max_words": 2}, "三个字", "more than 2 words"),
        ({"min_letter_fraction": 0.6}, "1.) --- ... | ||| $$$", "less than 0.6 letters"),
        ({"max_line_characters": 5}, "ok\nnot ok\n", "a line of more than 5 characters"),
        (
            {"max_repeated_line_fraction": 0.3},
            "menu\nmenu\n menu\ntext",
            "more than 0.3 in repeated lines",
        ),
        ({"normalise": True}, "\0\r", None),
        ({"normalise": True}, "\0", "empty after normalising"),
        ({"languages": ("en",)}, GERMAN * 3, "language de"),
        ({"languages": ("de", "fr")}, ENGLISH * 3, "language en"),
        ({"languages": ("zh",)}, CHINESE, None),
        ({"languages": ("en", "zh")}, CHINESE + "\n" + ENGLISH, None),
    ],
)
def test_each_filter_drops_with_its_reason(
    filters: dict[str, Any], text: str, reason: str | None
) -> None:
    kept, report = after(text, **filters)
    assert (kept is None) == (reason is not None)
    assert report.dropped == ({reason: 1} if reason else {})
    if reason:
        assert report.dropped_characters == {reason: len(text)}
        assert report.dropped_samples[0].where == "d"


def test_language_is_judged_by_begin_middle_and_end() -> None:
    assert sample_text("short", 300) == "short"
    parts = sample_text("a" * 1000 + "b" * 1000 + "c" * 1000, 300).split("\n")
    assert parts == ["a" * 100, "b" * 100, "c" * 100]
    title_in_english = "Chapter One " + GERMAN * 50
    assert after(title_in_english, languages=("de",))[0] is not None


def test_letters_and_repeated_lines_are_counted() -> None:
    assert letter_counts("ab1 ü中-\n𠀀!") == (6, 8)
    assert letter_counts("x" * 200_000 + " ." * 10) == (200_000, 200_010)
    assert repeated_line_fraction("a\nb\n\n a \nb") == 0.5
    assert repeated_line_fraction("") == 0.0


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"min_characters": 5, "max_characters": 4}, "must be 0 <= min <= max"),
        ({"min_tokens": -1}, "must be 0 <= min <= max"),
        ({"languages": ("english",)}, "no ISO 639-1 code"),
        ({"min_letter_fraction": 1.5}, "must lie in"),
        ({"language_characters": 3}, "must be at least 20"),
    ],
)
def test_wrong_filters_are_refused(filters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FilterConfig(**filters)


def test_an_unknown_language_is_refused_with_those_known() -> None:
    with pytest.raises(ValueError, match=r"xx not known to py3langid; it knows .*en"):
        after("text", languages=("en", "xx"))


def test_generated_sources_take_no_filters() -> None:
    with pytest.raises(ValueError, match="is generated, leave them out"):
        SourceConfig(kind="recall", packages=("json",), filters=FilterConfig(min_words=3))
