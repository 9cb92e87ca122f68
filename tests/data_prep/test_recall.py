"""Recall documents say what their meta data says, and can be learned only in context."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from data_prep.config import Layout, RecallConfig
from data_prep.filler import MAX_FILLER_LINE, FillerBank
from data_prep.recall import RecallGenerator
from data_prep.sample import Sample
from data_prep.tokenize import encode_text

T = 512
CONFIG = RecallConfig(min_distance=200, dense_facts=(2, 12))


def make(tokenizer: Any, filler: FillerBank, **changes: Any) -> RecallGenerator:
    config = RecallConfig(**{"min_distance": 200, "dense_facts": (2, 12), **changes})
    return RecallGenerator(config, tokenizer, filler, seq_length=T, seed=3)


def text_of(tokenizer: Any, sample: Sample, start: int, end: int) -> str:
    return str(tokenizer.decode(sample.tokens[start:end]))


@pytest.mark.parametrize("layout", get_args(Layout))
@pytest.mark.parametrize("separator", [" ->", ""])
def test_answers_are_what_was_stated(
    tokenizer: Any, filler: FillerBank, layout: Layout, separator: str
) -> None:
    generator = make(tokenizer, filler, separator=separator)
    for index in range(40):
        sample = generator.sample(index, layout=layout)
        assert sample.tokens.shape == (T,)
        assert sample.meta["queries"]
        spans = np.zeros(T, dtype=np.uint8)
        for query in sample.meta["queries"]:
            answer = text_of(tokenizer, sample, query["answer_start"], query["answer_end"])
            evidence = text_of(tokenizer, sample, query["evidence_start"], query["evidence_end"])
            assert answer == evidence
            ahead = 2 if separator else 1
            asked = text_of(tokenizer, sample, query["answer_start"] - ahead, query["answer_end"])
            stated = text_of(tokenizer, sample, query["fact_start"] - ahead, query["fact_start"])
            assert asked == stated + answer  # key and separator stand before both
            mark = query["fact_start"] - ahead - 1
            assert text_of(tokenizer, sample, mark, mark + 1) == "# note:"
            assert query["distance"] == query["answer_start"] - query["evidence_start"] > 0
            spans[query["answer_start"] : query["answer_end"]] = 1
        assert np.array_equal(sample.loss_mask, spans)


def test_far_keeps_its_distance_and_regions(tokenizer: Any, filler: FillerBank) -> None:
    generator = make(tokenizer, filler, num_facts=(3, 6), num_queries=(2, 9))
    counts: Counter[int] = Counter()
    for index in range(100):
        queries = generator.sample(index).meta["queries"]
        counts[len(queries)] += 1
        assert len({q["fact_start"] for q in queries}) == len(queries)  # each asked once
        for query in queries:
            assert query["distance"] >= 200
            assert query["evidence_start"] < 0.75 * T < query["answer_start"]
    assert set(counts) <= set(range(2, 7))
    assert len(counts) > 2


def test_documents_depend_on_seed_and_index_only(tokenizer: Any, filler: FillerBank) -> None:
    one, two = make(tokenizer, filler), make(tokenizer, filler)
    late, early = one.sample(7), [two.sample(i) for i in (3, 7)][1]
    assert np.array_equal(late.tokens, early.tokens)
    assert late.meta == early.meta
    other = RecallGenerator(CONFIG, tokenizer, filler, seq_length=T, seed=4)
    assert not np.array_equal(other.sample(7).tokens, late.tokens)
    assert not np.array_equal(one.sample(8).tokens, late.tokens)


def test_values_are_drawn_anew(tokenizer: Any, filler: FillerBank) -> None:
    generator = make(tokenizer, filler, num_facts=(8, 8))
    by_key: dict[str, set[str]] = {}
    for index in range(300):
        sample = generator.sample(index)
        for query in sample.meta["queries"]:
            start = query["answer_start"]
            key = text_of(tokenizer, sample, start - 2, start - 1)
            by_key.setdefault(key, set()).add(text_of(tokenizer, sample, start, start + 1))
    asked_often = [values for values in by_key.values() if len(values) > 1]
    assert len(asked_often) > 0.8 * len(by_key)


def test_the_whole_text_encodes_to_the_same_tokens(tokenizer: Any, filler: FillerBank) -> None:
    """Lines put in as tokens are what the tokenizer makes of the text: models may be prompted."""
    generator = make(tokenizer, filler)
    for layout in get_args(Layout):
        sample = generator.sample(1, layout=layout)
        start = int(np.flatnonzero(sample.tokens == encode_text(tokenizer, "\n")[0])[0]) + 1
        text = text_of(tokenizer, sample, start, T)
        assert encode_text(tokenizer, text) == sample.tokens[start:].tolist()


def test_layout_weights_and_loss_on_all(tokenizer: Any, filler: FillerBank) -> None:
    generator = make(tokenizer, filler, mixed_weight=1, dense_weight=2, loss_on="all")
    samples = [generator.sample(i) for i in range(400)]
    counts = Counter(sample.meta["layout"] for sample in samples)
    assert 150 < counts["dense"] < 250
    assert min(counts.values()) > 60
    assert all(s.loss_mask[0] == 0 and s.loss_mask[1:].all() for s in samples)


def test_words_of_several_tokens_work(filler: FillerBank, tokenizer_without_words: Any) -> None:
    bank = FillerBank.from_texts(["x = 1\ny = 2\n" * 400], tokenizer_without_words)
    generator = RecallGenerator(
        RecallConfig(min_distance=100, num_facts=(2, 4), dense_facts=(2, 4)),
        tokenizer_without_words,
        bank,
        seq_length=T,
        seed=0,
    )
    for layout in get_args(Layout):
        sample = generator.sample(0, layout=layout)
        assert len(sample.tokens) == T
        for query in sample.meta["queries"]:
            answer = sample.tokens[query["answer_start"] : query["answer_end"]]
            evidence = sample.tokens[query["evidence_start"] : query["evidence_end"]]
            assert len(answer) > 1
            assert np.array_equal(answer, evidence)


@pytest.fixture(scope="module")
def tokenizer_without_words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from data_prep.tokenizer import load_tokenizer, train_sentencepiece

    text = Path(__file__).read_text("utf-8")
    return load_tokenizer(
        train_sentencepiece([text], 400, tmp_path_factory.mktemp("plain") / "tok")
    )


def test_filler_lines_are_whole_and_short(tokenizer: Any) -> None:
    long_line = "value = [" + "1, " * 200 + "]\n"
    bank = FillerBank.from_texts(["a = 1\n" + long_line + "b = 2\nno newline"], tokenizer)
    assert tokenizer.decode(bank.tokens) == "a = 1\nb = 2\nno newline\n"
    assert max(np.diff(bank.borders)) <= MAX_FILLER_LINE
    stretch = bank.stretch(len(bank), np.random.default_rng(0))
    assert len(stretch.tokens) == stretch.borders[-1] == len(bank)


@pytest.fixture(scope="module")
def merging_tokenizer() -> Any:
    """Byte-level BPE as real models have it: newlines join indentation and punctuation."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([Path(__file__).read_text("utf-8")] * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def test_tokenizers_that_merge_newlines_keep_all_lines(merging_tokenizer: Any) -> None:
    text = Path(__file__).read_text("utf-8")
    assert any(
        merging_tokenizer.decode([token]).startswith("\n ")
        for token in encode_text(merging_tokenizer, text)
    )
    bank = FillerBank.from_texts([text] * 3, merging_tokenizer)
    assert len(bank) > 0.9 * 3 * len(encode_text(merging_tokenizer, text))
    assert merging_tokenizer.decode(bank.tokens).count("\n") > 0.95 * 3 * text.count("\n")
    generator = RecallGenerator(
        RecallConfig(min_distance=100, num_facts=(2, 4), dense_facts=(2, 4), separator=":"),
        merging_tokenizer,
        bank,
        seq_length=T,
        seed=0,
    )
    for layout in get_args(Layout):
        for index in range(10):
            sample = generator.sample(index, layout=layout)
            assert sample.tokens.shape == (T,)
            lines = merging_tokenizer.decode(sample.tokens).split("\n")
            stated = [line for line in lines if line.startswith(("# note:", "# recall:"))]
            assert len(stated) >= 2 * len(sample.meta["queries"]) or layout != "far"
            for query in sample.meta["queries"]:
                answer = text_of(
                    merging_tokenizer, sample, query["answer_start"], query["answer_end"]
                )
                assert any(line.endswith(":" + answer) for line in stated)  # nothing behind it


def test_gaps_in_filler_get_their_newline(merging_tokenizer: Any) -> None:
    long_line = "    value = [" + "1, " * 200 + "]"
    text = f"if a:\n    b = 2\n{long_line}\nc = 3\n"
    bank = FillerBank.from_texts([text], merging_tokenizer)
    assert merging_tokenizer.decode(bank.tokens) == "if a:\n    b = 2\nc = 3\n"


def test_what_does_not_fit_is_refused(tokenizer: Any, filler: FillerBank) -> None:
    with pytest.raises(ValueError, match="min_distance=480 with 12 lines"):
        make(tokenizer, filler, min_distance=480)
    with pytest.raises(ValueError, match="dense_facts"):
        make(tokenizer, filler, dense_weight=1, dense_facts=(1, 200))
    with pytest.raises(ValueError, match="filler_fraction"):
        make(tokenizer, filler, mixed_weight=1, num_facts=(8, 8), filler_fraction=(0.9, 0.95))
    small = make(tokenizer, FillerBank.from_texts(["a = 1\n"], tokenizer))
    with pytest.raises(ValueError, match="fewer than"):
        small.sample(0)
    with pytest.raises(ValueError, match="name packages or a path"):
        FillerBank.from_texts([], tokenizer)
    for wrong in (
        {"num_facts": (5, 2)},
        {"num_facts": (0, 2)},
        {"filler_fraction": (0.1, 1.0)},
        {"loss_on": "answer"},
        {"far_weight": 0.0},
        {"min_distance": 0},
        {"query_region": 0.0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[0]):
            RecallConfig(**wrong)  # type: ignore[arg-type]
