"""The tokenizer gives every text back and knows the words of recall documents."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.recall import recall_symbols, recall_words
from data_prep.tokenize import encode_text, end_of_text_id, pad_token_id
from data_prep.tokenizer import load_tokenizer, main, tokenizer_hash, train_sentencepiece
from data_prep.words import RECALL_KEYS, RECALL_VALUES

FIXTURE_ONCE = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TRICKY = [
    "",
    " ",
    "\n",
    "\r\n\t\v",
    "\0",
    "\u2581",
    "a\u2581 b",
    "<0x41><0xE2>",
    "<|im_end|>",
    " amber amberx  amber",
    "# note: amber -> falcon\n",
    "中文🎉e\u0301",
    "    def f(x):\n\n\n  return\t12345  ",
]


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_texts_round_trip(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(encode_text(tokenizer, text)) == text


@FIXTURE_ONCE
@given(text=st.text(max_size=60))
def test_any_text_round_trips(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(encode_text(tokenizer, text)) == text


def test_source_files_round_trip(tokenizer: Any) -> None:
    for file in sorted(Path(__file__).parent.glob("*.py")):
        text = file.read_text("utf-8")
        assert tokenizer.decode(encode_text(tokenizer, text)) == text


def test_recall_words_and_marks_are_single_tokens(tokenizer: Any) -> None:
    assert all(len(ids) == 1 for ids in encode_text(tokenizer, list(recall_symbols())))
    line = encode_text(tokenizer, "# note: amber -> falcon\n")
    assert tokenizer.convert_ids_to_tokens(line) == ["# note:", " amber", " ->", " falcon", "\n"]


def test_word_lists_are_distinct_and_no_word_begins_another() -> None:
    assert len(RECALL_KEYS) == len(RECALL_VALUES) == 256
    words = sorted(recall_words())
    assert len(set(words)) == 512
    assert not any(b.startswith(a) for a, b in itertools.pairwise(words))


def test_digits_are_split(tokenizer: Any) -> None:
    assert len(encode_text(tokenizer, "2024")) == 4


def test_control_tokens_in_text_stay_text_but_work_in_templates(tokenizer: Any) -> None:
    special = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert special not in encode_text(tokenizer, "a<|im_end|>b")
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(rendered)["input_ids"].count(special) == 1


def test_control_ids(tokenizer: Any) -> None:
    assert end_of_text_id(tokenizer) == pad_token_id(tokenizer) == 0
    assert tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer) == 1024


def test_auto_tokenizer_loads_without_this_project(tokenizer_dir: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from transformers import AutoTokenizer\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert 'data_prep' not in sys.modules\n"
        "s = ' \\u2581 # note: amber'\n"
        "assert t.is_fast and t.decode(t(s)['input_ids']) == s\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tokenizer_dir)], cwd=tmp_path, check=True)


def test_training_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    texts = [Path(__file__).read_text("utf-8")] * 3
    one = train_sentencepiece(texts, 400, tmp_path / "one")
    two = train_sentencepiece(iter(texts), 400, tmp_path / "two")
    assert (one / "tokenizer.json").read_bytes() == (two / "tokenizer.json").read_bytes()


def test_hash_depends_on_tokenizer_and_not_on_use(tokenizer: Any, tokenizer_dir: Path) -> None:
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)
    assert tokenizer_hash(tokenizer) == before == tokenizer_hash(load_tokenizer(tokenizer_dir))
    other = load_tokenizer(tokenizer_dir)
    other.chat_template = "{{ messages }}"
    assert tokenizer_hash(other) != before


def test_errors_name_the_mend(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="raise vocab_size to"):
        train_sentencepiece(["text"], 128, tmp_path / "a")
    with pytest.raises(ValueError, match="give more text or a smaller vocab_size"):
        train_sentencepiece(["text"], 5000, tmp_path / "a")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"set data\.tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        train_sentencepiece(["text"], 400, tmp_path / "b")


def test_command_line_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tok"
    main(["train", "--packages", "json", "--vocab-size", "900", "--out", str(out)])
    assert "900 ids" in capsys.readouterr().out
    assert len(load_tokenizer(out)) == 900
    with pytest.raises(SystemExit) as stop:
        main(["train", "--packages", "no_such_package", "--out", str(tmp_path / "x")])
    assert stop.value.code == 2
    assert "no_such_package" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "--vocab-size" in capsys.readouterr().out
