"""Repeated segments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data_prep.config import RecallConfig, SourceConfig
from data_prep.filler import FillerBank
from data_prep.recall import recall_words
from data_prep.repeats import RepeatGenerator


def generator(tokenizer: Any, filler: FillerBank, **changes: Any) -> RepeatGenerator:
    settings = {"seq_length": 64, "seed": 3, **changes}
    return RepeatGenerator(RecallConfig(repeat_length=(4, 9)), tokenizer, filler, **settings)


def test_every_target_repeats_what_followed_the_same_place(
    tokenizer: Any, filler: FillerBank
) -> None:
    lengths = set()
    for index in range(40):
        sample = generator(tokenizer, filler).sample(index)
        first = int(np.argmax(sample.loss_mask))
        period = first - 1
        lengths.add(period)
        assert sample.loss_mask[first:].all()
        assert not sample.loss_mask[:first].any()
        assert np.array_equal(sample.tokens[period:], sample.tokens[:-period])
        assert len(sample.tokens) == 64
    assert lengths == set(range(4, 10))


def test_half_the_segments_are_recall_words(tokenizer: Any, filler: FillerBank) -> None:
    words = {tokenizer.encode(word, add_special_tokens=False)[0] for word in recall_words()}
    made = [generator(tokenizer, filler).sample(i) for i in range(100)]
    of_words = sum(set(sample.tokens.tolist()) <= words for sample in made)
    assert 30 < of_words < 70


def test_numbers_and_seeds_decide_the_sample(tokenizer: Any, filler: FillerBank) -> None:
    one, again = generator(tokenizer, filler), generator(tokenizer, filler)
    assert np.array_equal(one.sample(5).tokens, again.sample(5).tokens)
    assert not np.array_equal(one.sample(5).tokens, one.sample(6).tokens)
    other = generator(tokenizer, filler, seed=4)
    assert not np.array_equal(one.sample(5).tokens, other.sample(5).tokens)


def test_a_segment_that_does_not_fit_is_refused(tokenizer: Any, filler: FillerBank) -> None:
    with pytest.raises(ValueError, match=r"repeat_length=\(4, 9\) does not fit twice"):
        generator(tokenizer, filler, seq_length=17)
    with pytest.raises(ValueError, match="repeat_length"):
        RecallConfig(repeat_length=(5, 4))


def test_the_source_kind_is_generated() -> None:
    source = SourceConfig(kind="repeats", packages=("numpy",))
    assert source.generated
    assert source.sample_kind == "repeat"
