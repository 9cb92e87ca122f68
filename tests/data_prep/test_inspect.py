"""`python -m data_prep.inspect`: shows samples, finds broken rules, refuses what is no shard."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pty
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.config import PrepareConfig, SourceConfig
from data_prep.inspect import main
from data_prep.prepare import prepare_shards
from data_prep.sample import Sample
from data_prep.shard_files import find_shards
from data_prep.shards import write_shard
from data_prep.view import check_sample, document_runs, document_views, excerpts, visible

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shards(tokenizer: Any, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats and texts of mixed lengths, packed."""
    folder = tmp_path_factory.mktemp("inspect")
    chats = [
        {
            "id": f"chat{i}",
            "messages": [
                {"role": "user", "content": f"Say {i} \x1b[31mred\x1b[0m"},
                {"role": "assistant", "content": f"yes {i} <b>bold</b>"},
            ],
        }
        for i in range(30)
    ]
    texts = [{"id": f"text{i}", "text": f"line {i}: é中 ok\n" * (3 * i + 1)} for i in range(30)]
    for name, records in (("chats", chats), ("texts", texts)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, "utf-8")
    config = PrepareConfig(
        tokenizer=str(tokenizer_dir),
        seq_length=256,
        samples_per_shard=4,
        eval_fraction=0.2,
        sources=[
            SourceConfig(kind="chat_jsonl", name="chats", path=str(folder / "chats.jsonl")),
            SourceConfig(kind="jsonl", name="texts", path=str(folder / "texts.jsonl")),
        ],
    )
    prepare_shards(config, folder / "out", tokenizer=tokenizer)
    return folder / "out"


def shown(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == status
    return capsys.readouterr().out


def test_a_folder_shows_its_sources_and_a_sample(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, str(shards), "--tokens", "0", "--documents", "0")
    assert "train/shard-00000.tar   sample 0 of" in text
    assert "source chats, kind chat; 256 tokens" in text
    assert "cu_seqlens [0, " in text
    assert "as they must be" in text
    assert "<|im_start|>user\nSay " in text
    assert "\x1b" not in text  # what a text holds never reaches the terminal as a command
    assert "␛[31mred" in text
    assert "⟦yes " in text
    assert " <b>bold</b><|im_end|>⟧" in text
    assert "⟦<|im_start|>" not in text
    assert "padding [" in text


def test_samples_are_counted_over_shards(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = shown(capsys, str(shards), "--num", "1000")
    count = everything.count("as they must be")
    assert count > 6
    for index in range(count):
        block = shown(capsys, str(shards), "--index", str(index)).split("\n\n", 1)[1]
        assert block in everything
    assert main([str(shards), "--index", str(count)]) == 2
    assert f"there are {count} samples" in capsys.readouterr().err
    assert main([str(shards), "--num", "0"]) == 2
    one = shown(capsys, str(shards / "eval" / "shard-00000.tar"))
    assert one in shown(capsys, str(shards), "--split", "eval", "--num", "1000")


def test_colours_stand_for_loss_in_a_terminal(shards: Path) -> None:
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "data_prep.inspect", str(shards), "--documents", "1"]
    with subprocess.Popen(command, stdout=child, env=environment) as process:
        os.close(child)
        read = b""
        while True:
            try:
                data = os.read(parent, 65536)
            except OSError:  # Linux ends a terminal without writers so
                break
            if not data:
                break
            read += data
        assert process.wait() == 0
    os.close(parent)
    text = read.decode()
    assert "\x1b[32myes " in text
    assert "\x1b[2m<|im_start|>user" in text
    assert "\x1b[31m" not in text
    assert "⟦" not in text


def test_another_tokenizer_is_refused_and_none_shows_ids(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ROOT / "models" / "demo_base"
    assert main([str(shards), "--tokenizer", str(other)]) == 2
    assert "the shards were made with" in capsys.readouterr().err
    lonely = tmp_path / "shard-00000.tar"
    lonely.write_bytes((shards / "train" / "shard-00000.tar").read_bytes())
    text = shown(capsys, str(lonely))
    assert "give --tokenizer DIR for text" in text
    assert "⟦" in text
    assert "im_start" not in text


def test_check_finds_every_broken_rule(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "all as they must be" in shown(capsys, str(shards), "--check")
    file = shards / "train" / "shard-00000.tar"
    data = bytearray(file.read_bytes())
    place = data.index(b"\x93NUMPY") + 130
    try:
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        text = shown(capsys, str(shards), "--check", status=1)
        assert "train/shard-00000.tar: SHA-256 is not the manifest's" in text
    finally:
        file.write_bytes(data)
    good = Sample(
        tokens=np.arange(16, dtype=np.int32),
        loss_mask=np.array([0, *[1] * 7, 0, *[1] * 3, *[0] * 4], dtype=np.uint8),
        cu_seqlens=np.array([0, 8, 12, 16], dtype=np.int32),
        meta={"kind": "text", "source": "s", "ids": ["a", "b"], "num_padding": 4},
    )
    assert check_sample(good, seq_length=16, vocab_size=16) == []
    mask = good.loss_mask.copy()
    mask[8] = 1
    padded = good.loss_mask.copy()
    padded[-1] = 1
    double = good.loss_mask * 2
    for changes, words in (
        ({"loss_mask": mask}, "first token of document 1 is a loss target"),
        ({"loss_mask": padded}, "padding carries loss"),
        ({"loss_mask": double}, "loss_mask holds 2"),
        ({"tokens": good.tokens - 1}, "token ids -1 to 14"),
        ({"tokens": good.tokens + 1}, "token ids 1 to 16, the vocabulary has 16"),
        ({"meta": {**good.meta, "num_padding": 3}}, "num_padding=3"),
        ({"meta": {**good.meta, "ids": ["a"]}}, "1 ids for 2 documents"),
    ):
        sample = dataclasses.replace(good, **changes)
        assert any(words in p for p in check_sample(sample, seq_length=16, vocab_size=16)), words
        path = tmp_path / "shard.tar"
        write_shard(path, [sample], first_key=0, source="s", kind="text")
        if "token" not in words or "first" in words:  # those need the manifest's vocabulary
            assert "problems" in shown(capsys, str(path), "--check", status=1)
            assert "broken rule" in shown(capsys, str(path), status=1)
    assert check_sample(good, seq_length=32) == ["16 tokens, the manifest says seq_length=32"]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("../../evil.tokens.npy", {}),
        ("/etc/000000000.tokens.npy", {}),
        ("000000000.tokens.npy", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ("000000000.tokens.npy", {"type": tarfile.LNKTYPE, "linkname": "../x"}),
    ],
)
def test_a_tar_with_links_or_paths_is_refused_and_nothing_unpacked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, fields: dict[str, Any]
) -> None:
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo(name)
        for key, value in fields.items():
            setattr(info, key, value)
        archive.addfile(info, io.BytesIO())
    assert main([str(path)]) == 2
    assert "is no member of a sample" in capsys.readouterr().err
    assert main([str(path), "--check"]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["evil.tar"]


def test_what_is_no_shard_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar")
    (tmp_path / "empty").mkdir()
    for path, words in (
        (tmp_path / "a.tar", "is no whole tar file"),
        (tmp_path / "empty", "holds neither manifest.json nor .tar files"),
        (tmp_path / "gone", "is not there"),
    ):
        assert main([str(path)]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


def test_runs_of_a_document_give_its_text_back(shards: Path, tokenizer: Any) -> None:
    found = find_shards(str(shards), "train")
    for shard in found.shards:
        with shard.samples() as samples:
            for number in range(len(samples)):
                sample = samples[number]
                for document in document_views(sample):
                    runs = list(document_runs(sample, document, tokenizer))
                    ids = sample.tokens[document.start : document.end].tolist()
                    text = "".join(run.text for run in runs).replace("\ufffd", "")
                    assert text == visible(tokenizer.decode(ids)).replace("\ufffd", "")
                    assert sum(r.length for r in runs if r.loss) == document.num_loss


def test_excerpts_show_begin_end_and_where_loss_begins() -> None:
    mask = np.zeros(1000, dtype=np.uint8)
    assert excerpts(mask, None) == [(0, 1000)]
    assert excerpts(mask, 30) == [(0, 20), (990, 1000)]
    mask[600:] = 1
    assert excerpts(mask, 30) == [(0, 10), (595, 605), (990, 1000)]
    mask[:] = 0
    mask[995:] = 1
    assert excerpts(mask, 30) == [(0, 20), (990, 1000)]
    for length in range(1, 40):
        for start in range(length):
            mask = np.zeros(length, dtype=np.uint8)
            mask[start:] = 1
            parts = excerpts(mask, 9)
            flat = [i for a, b in parts for i in range(a, b)]
            assert flat == sorted(set(flat))
            assert 0 < len(flat) <= max(9, length if length <= 9 else 9)
            assert (flat[0], flat[-1]) == (0, length - 1)
