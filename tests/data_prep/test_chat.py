"""Chat masks cover responses and nothing else, checked by decoding them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data_prep.chat import parse_template, render_chat
from data_prep.config import RecallConfig
from data_prep.demo_chat import DemoChatGenerator
from data_prep.filler import FillerBank
from data_prep.tokenizer import load_tokenizer

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Two colours?"},
    {"role": "assistant", "content": "red, blue\n"},
    {"role": "user", "content": "one <|im_end|> more"},
    {"role": "assistant", "content": " green"},
]


def masked(tokenizer: Any, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """Runs of tokens with loss, decoded."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    return [tokenizer.decode(tokens[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def test_only_responses_and_their_ends_carry_loss(tokenizer: Any) -> None:
    tokens, mask = render_chat(MESSAGES, tokenizer)
    assert masked(tokenizer, tokens, mask) == ["red, blue\n<|im_end|>", " green<|im_end|>"]
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert tokenizer.decode(tokens) == rendered


def test_control_tokens_in_messages_stay_text(tokenizer: Any) -> None:
    tokens, _ = render_chat(MESSAGES, tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert int((tokens == end).sum()) == len(MESSAGES)


def test_other_templates_work_or_are_refused(tokenizer_dir: Any) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.chat_template = (
        "You help.\n{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}"
        "<|endoftext|>{% endfor %}"
    )
    tokens, mask = render_chat(MESSAGES[1:3], tokenizer)
    assert masked(tokenizer, tokens, mask) == ["red, blue\n<|endoftext|>"]
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match=r"shows response 1 .* 0 times"):
        parse_template(["user", "assistant"], tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        parse_template(["user", "assistant"], tokenizer)


def test_demo_conversations_ask_for_stated_facts(tokenizer: Any, filler: FillerBank) -> None:
    config = RecallConfig(min_distance=150)
    generator = DemoChatGenerator(config, tokenizer, filler, seq_length=512, seed=0)
    for index in range(40):
        sample = generator.sample(index)
        assert sample.tokens.shape == sample.loss_mask.shape == (512,)
        responses = masked(tokenizer, sample.tokens, sample.loss_mask)
        queries = sample.meta["queries"]
        assert len(responses) == len(queries) >= 1
        text = tokenizer.decode(sample.tokens)
        for response, query in zip(responses, queries, strict=True):
            line = response.removesuffix("<|im_end|>")
            assert line.startswith("# recall: ")
            assert line.replace("recall", "note", 1) + "\n" in text
            assert query["distance"] >= 150
            answer = sample.tokens[query["answer_start"] : query["answer_end"]]
            evidence = sample.tokens[query["evidence_start"] : query["evidence_end"]]
            assert np.array_equal(answer, evidence)
            assert line.endswith(tokenizer.decode(answer))
    assert np.array_equal(sample.tokens, generator.sample(index).tokens)
    wide = RecallConfig(min_distance=300, far_weight=0.0, mixed_weight=1.0)
    late = DemoChatGenerator(wide, tokenizer, filler, seq_length=400, seed=0)
    with pytest.raises(ValueError, match="leaves no room"):
        late.sample(0)
