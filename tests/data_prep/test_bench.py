"""`make bench`: what it compares is compared honestly, and other tokens are never reported."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.data import main, ratios
from benchmarks.data_cases import SEQ_LENGTH
from benchmarks.data_checks import CheckError, check_ours, make_reference
from benchmarks.data_text import make_text
from data_prep.config import PrepareConfig, SourceConfig
from data_prep.prepare import prepare_shards
from data_prep.shards import Manifest, read_shard, write_shard


def test_the_text_has_mixed_lengths_and_is_the_same_every_time(tmp_path: Path) -> None:
    texts = [make_text(tmp_path / name, None, 300_000) for name in ("a", "b")]
    rows = [list(text.documents()) for text in texts]
    assert rows[0] == rows[1]
    assert sum(len(text) for _, text in rows[0]) == texts[0].num_characters == 300_000
    lengths = [len(text) for _, text in rows[0]]
    assert min(lengths) < 2_000 < 20_000 < max(lengths)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="holds no text"):
        make_text(tmp_path / "c", str(tmp_path / "empty.txt"), 1000)


def test_shards_with_other_tokens_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    text = make_text(tmp_path / "text", None, 60_000)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    reference = make_reference(text, tokenizer, end)
    source = SourceConfig(kind="jsonl", path=str(text.folder), pattern="*.jsonl")
    config = PrepareConfig(
        sources=[source], seq_length=512, eval_fraction=0.0, eval_samples=0, samples_per_shard=1000
    )
    out = tmp_path / "out"
    prepare_shards(config, out, tokenizer=tokenizer)
    check_ours(out, reference)
    (record,) = Manifest.load(out).splits["train"]
    samples = list(read_shard(out / record.path))
    longest = max(range(len(samples)), key=lambda i: max(np.diff(samples[i].cu_seqlens)))
    for change in ("token", "lost", "twice"):
        changed = list(samples)
        if change == "token":
            sample = samples[longest]
            start, stop = max(pairwise(sample.cu_seqlens), key=lambda pair: pair[1] - pair[0])
            sample.tokens[(start + stop) // 2] ^= 1
        elif change == "lost":
            changed.pop()
        else:
            changed.append(samples[0])
        write_shard(out / record.path, changed, first_key=0, source="jsonl", kind="text")
        with pytest.raises(CheckError, match=r"tokens"):
            check_ours(out, reference)
        if change == "token":
            sample.tokens[(start + stop) // 2] ^= 1


def test_ratios_are_taken_within_a_round() -> None:
    rounds = [
        {"tokenizer/1": {"cpu_s": 1.0, "wall_s": 2.0}, "ours/1": {"cpu_s": 2.0, "wall_s": 4.0}},
        {"tokenizer/1": {"cpu_s": 9.0, "wall_s": 9.0}, "ours/1": {"cpu_s": 10.0, "wall_s": 9.0}},
        {"tokenizer/1": {"cpu_s": 4.0, "wall_s": 4.0}, "ours/1": {"cpu_s": 5.0, "wall_s": 5.0}},
    ]
    found = ratios(rounds)["ours/1"]["cpu_s"]["of_the_tokenizer"]
    assert found == {"median": 0.8, "least": 0.5, "most": 0.9}


@pytest.mark.slow
def test_the_benchmark_runs_and_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        *("--characters", "200000", "--rounds", "1", "--processes", "1", "2", "--tools"),
        *("--only", "compare", "loader", "--out", str(tmp_path), "--name", "quick"),
    ]
    assert main(words) == 0
    assert "ours" in capsys.readouterr().out
    result = json.loads((tmp_path / "quick.json").read_text("utf-8"))
    assert set(result["ratios"]) >= {"tokenizer/1", "ours/1", "tokenizer/2", "ours/2"}
    assert result["seq_length"] == SEQ_LENGTH
    assert result["loader"]["times_the_need"] > 1
    assert (tmp_path / "quick.png").read_bytes().startswith(b"\x89PNG")
