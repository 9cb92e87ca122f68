"""Evaluation text is found in documents, named, and dropped or cut out."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.config import PrepareConfig, SourceConfig
from data_prep.decontaminate import CONTAMINATED, Decontaminator, decontaminator
from data_prep.evalsets import read_items
from data_prep.filters import build_steps, run_steps
from data_prep.readers import Document, UnitReport
from data_prep.readers.base import Drop
from data_prep.settings import DecontaminateConfig, EvalSetConfig


def words(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [f"w{draw.randrange(10**6)}" for _ in range(count)]


ITEM = words(0, 40)


def holding(passage: list[str]) -> str:
    return " ".join([*words(1, 200), *passage, *words(2, 200)])


def check(text: str, **fields: Any) -> Document | Drop:
    items = [("other:1", " ".join(words(9, 50))), ("mine:1", " ".join(ITEM))]
    return Decontaminator(items, DecontaminateConfig(**fields)).apply(Document(text, "d", "s"))


@pytest.mark.parametrize(("count", "found"), [(12, False), (13, True), (40, True)])
def test_thirteen_words_in_a_row_are_a_match(count: int, found: bool) -> None:
    result = check(holding(ITEM[5 : 5 + count]))
    assert isinstance(result, Drop) == found
    if found:
        num_ngrams = min(count, 35) - 12
        assert result == Drop(CONTAMINATED, f"mine:1, {num_ngrams} n-grams")


def test_case_punctuation_and_spaces_do_not_hide_a_match() -> None:
    spelt = "--\n".join(word.upper() + "," for word in ITEM[:20])
    assert isinstance(check(spelt), Drop)
    other = [*ITEM[:12], "word", *ITEM[12:24]]
    assert isinstance(check(" ".join(other)), Document)


def test_several_ngrams_may_be_asked_for() -> None:
    assert isinstance(check(holding(ITEM[:15]), min_matches=4), Document)
    assert isinstance(check(holding(ITEM[:16]), min_matches=4), Drop)


def test_short_items_match_as_a_whole_and_shorter_ones_are_counted() -> None:
    items = [("short:1", " ".join(ITEM[:9])), ("short:2", "only four words here")]
    index = Decontaminator(items)
    assert (index.num_items, index.num_too_short) == (1, 1)
    found = index.apply(Document(holding(ITEM[:9]), "d", "s"))
    assert found == Drop(CONTAMINATED, "short:1, 1 n-grams")
    assert isinstance(index.apply(Document(holding(ITEM[:8]), "d", "s")), Document)
    assert isinstance(index.apply(Document("only four words here", "d", "s")), Document)


def test_chinese_is_matched_by_characters() -> None:
    text = "委员会将于星期四再次开会讨论明年的预算"
    index = Decontaminator([("zh:1", text)])
    assert isinstance(index.apply(Document("他说：" + text[:13] + "。", "d", "s")), Drop)
    assert isinstance(index.apply(Document("他说：" + text[:12] + "。", "d", "s")), Document)


def test_passages_are_cut_out_with_their_surroundings() -> None:
    text = holding(ITEM)
    passage = " ".join(ITEM)
    result = check(text, policy="cut", cut_characters=30)
    assert isinstance(result, Document)
    place = text.index(passage)
    assert result.text == text[: place - 30] + "\n" + text[place + len(passage) + 30 :]
    assert result.cuts == (Drop(CONTAMINATED, "mine:1, 28 n-grams"),)
    assert check(result.text) == Document(result.text, "d", "s")
    most = check(passage + " few others", policy="cut")
    assert isinstance(most, Drop)


def test_chats_are_dropped_whole_wherever_the_text_stands() -> None:
    turns = ({"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Yes."})
    passage = " ".join(ITEM)
    index = Decontaminator([("mine:1", passage)], DecontaminateConfig(policy="cut"))
    clean = Document("", "d", "s", "chat", turns, "a document")
    assert index.apply(clean) == clean
    assert isinstance(index.apply(Document("", "d", "s", "chat", turns, passage)), Drop)
    asked = ({"role": "user", "content": passage}, turns[1])
    assert isinstance(index.apply(Document("", "d", "s", "chat", asked)), Drop)


def test_evaluation_sets_of_every_form_are_read(tmp_path: Path) -> None:
    records = [{"question": "q1", "meta": {"answers": ["a1", "b1"]}}, {"question": "q2"}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines, "utf-8")
    (tmp_path / "b.json").write_text(json.dumps({"version": "1", "data": records}), "utf-8")
    (tmp_path / "c.txt").write_text("plain text", "utf-8")
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "d.parquet")

    def items(name: str, *fields: str, called: str = "") -> list[tuple[str, str]]:
        return list(
            read_items(EvalSetConfig(path=str(tmp_path / name), fields=fields, name=called))
        )

    for name in ("a.jsonl", "b.json", "d.parquet"):
        assert items(name) == [(f"{name}:1", "q1\na1\nb1"), (f"{name}:2", "q2")]
        assert items(name, "meta.answers", called="mine") == [("mine:1", "a1\nb1")]
    assert items("c.txt") == [("c.txt:1", "plain text")]
    assert len(items("", called="all")) == 7
    with pytest.raises(ValueError, match="has no item with the fields body"):
        items("a.jsonl", "body")
    (tmp_path / "a.jsonl").write_text(lines + "{broken")
    with pytest.raises(ValueError, match=r"a.jsonl cannot be read .*mend the file"):
        items("a.jsonl")
    with pytest.raises(ValueError, match="names no file"):
        items("nothing.jsonl")


def test_the_step_is_built_once_and_reports_the_item(tmp_path: Path) -> None:
    (tmp_path / "bench.jsonl").write_text(json.dumps({"text": " ".join(ITEM)}), "utf-8")
    source = SourceConfig(kind="jsonl", path="x")
    chosen = DecontaminateConfig(sets=[EvalSetConfig(path=str(tmp_path / "bench.jsonl"))])
    config = PrepareConfig(sources=[source], decontaminate=chosen)
    steps = build_steps(config, source)
    assert steps == [decontaminator(chosen)] == build_steps(config, source)
    report = UnitReport()
    assert run_steps(steps, Document(holding(ITEM), "d7", "s"), report) is None
    assert report.dropped == {CONTAMINATED: 1}
    assert str(report.dropped_samples[0]) == f"d7: {CONTAMINATED} (bench.jsonl:1, 28 n-grams)"
    cut = DecontaminateConfig(sets=chosen.sets, policy="cut", cut_characters=0)
    steps = build_steps(PrepareConfig(sources=[source], decontaminate=cut), source)
    kept = run_steps(steps, Document(holding(ITEM), "d8", "s"), report)
    assert kept is not None
    assert ITEM[20] not in kept.text
    assert report.cuts == {CONTAMINATED: 1}


def test_a_large_index_finds_what_is_there_and_nothing_else() -> None:
    items = [(f"e:{i}", " ".join(words(100 + i, 200))) for i in range(300)]
    index = Decontaminator(items)
    assert index.num_ngrams == 300 * 188
    for number in (0, 150, 299):
        part = words(100 + number, 200)[100:113]
        assert index.apply(Document(holding(part), "d", "s")) == Drop(
            CONTAMINATED, f"e:{number}, 1 n-grams"
        )
    clean = Document(" ".join(words(10**6, 100_000)), "d", "s")
    assert index.apply(clean) == clean


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ngram": 5}, "1 <= min_words <= ngram"),
        ({"policy": "hide"}, "is not one of drop, cut"),
        ({"min_matches": 0}, "at least 1"),
    ],
)
def test_wrong_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecontaminateConfig(**fields)
