"""prepare_shards: the same bytes whatever happened in between, and no text in two splits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.config import PrepareConfig, RecallConfig, SourceConfig
from data_prep.prepare import prepare_shards, summary, what_is_missing
from data_prep.shards import Manifest, read_shard
from data_prep.tokenize import encode_text
from data_prep.tokenizer import load_tokenizer

RECALL = RecallConfig(min_distance=60, num_facts=(2, 3), num_queries=(1, 2))
ROOT = Path(__file__).parents[2]


def demo_config(tokenizer_dir: Path, **changes: Any) -> PrepareConfig:
    packages: dict[str, Any] = {"packages": ("email",), "eval_packages": ("json",)}
    fields: dict[str, Any] = {
        "tokenizer": str(tokenizer_dir),
        "seq_length": 256,
        "sources": [
            SourceConfig(kind="python_packages", name="code", **packages),
            SourceConfig(kind="recall", recall=RECALL, weight=2, **packages),
            SourceConfig(kind="demo_chat", recall=RECALL, **packages),
        ],
        "train_samples": 60,
        "eval_samples": 12,
        "samples_per_shard": 8,
        **changes,
    }
    return PrepareConfig(**fields)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_splits_shares_and_manifest(tokenizer: Any, tokenizer_dir: Path, tmp_path: Path) -> None:
    config = demo_config(tokenizer_dir)
    seen: list[tuple[str, int, int]] = []
    manifest = prepare_shards(
        config, tmp_path, tokenizer=tokenizer, progress=lambda *step: seen.append(step)
    )
    assert manifest == Manifest.load(tmp_path)
    assert (manifest.num_samples("train"), manifest.num_samples("eval")) == (60, 12)
    rows = {(r["split"], r["source"]): r["num_samples"] for r in summary(manifest)}
    assert rows == {
        ("train", "code"): 15,
        ("train", "recall"): 30,
        ("train", "demo_chat"): 15,
        ("eval", "code"): 3,
        ("eval", "recall"): 6,
        ("eval", "demo_chat"): 3,
    }
    assert seen[-1][0] == "eval shards"
    assert seen[-1][1] == seen[-1][2] == len(manifest.splits["eval"])
    assert manifest.vocab_size == len(tokenizer)
    assert all(
        max(s.tokens) < manifest.vocab_size for s in read_shard(tmp_path / "train/shard-00000.tar")
    )
    for split, package in (("train", "email/"), ("eval", "json/")):
        for record in manifest.splits[split]:
            for sample in read_shard(tmp_path / record.path):
                assert sample.kind == record.kind
                assert sample.meta["source"] == record.source
                if record.kind == "text":
                    assert all(name.startswith(package) for name in sample.meta["ids"])


def test_a_second_call_reads_and_writes_nothing(
    tokenizer: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    config = demo_config(tokenizer_dir)
    first = prepare_shards(config, tmp_path, tokenizer=tokenizer)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    started = time.perf_counter()
    assert prepare_shards(config, tmp_path, tokenizer=tokenizer) == first
    assert time.perf_counter() - started < 1
    assert stamps == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}


def test_two_folders_hold_the_same_bytes(
    tokenizer: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    config = demo_config(tokenizer_dir)
    for name in ("one", "two"):
        prepare_shards(config, tmp_path / name, tokenizer=tokenizer)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    other = demo_config(tokenizer_dir, seed=1)
    prepare_shards(other, tmp_path / "three", tokenizer=tokenizer)
    assert files_of(tmp_path / "three") != files_of(tmp_path / "one")


RUN = """
import sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from test_prepare import demo_config
from data_prep.prepare import prepare_shards
from data_prep.tokenizer import load_tokenizer
folder = Path(sys.argv[1])
prepare_shards(demo_config(folder), sys.argv[2], tokenizer=load_tokenizer(folder))
"""


def test_bytes_after_sigkill_are_those_of_a_whole_run(
    tokenizer: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    prepare_shards(demo_config(tokenizer_dir), whole, tokenizer=tokenizer)
    words = [str(tokenizer_dir), str(killed), str(Path(__file__).parent)]
    command = [sys.executable, "-c", RUN, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for wanted in (1, 4):
        process = subprocess.Popen(command, env=environment)
        while len(list(killed.glob("*/*.tar"))) < wanted and process.poll() is None:
            time.sleep(0.0005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (killed / "manifest.json").exists()
    recorded = [p.with_suffix("") for p in killed.glob("*/*.tar.json")]
    assert len(recorded) >= 3  # at most the last shard of a run lacks its record
    kept = {p: p.stat().st_mtime_ns for p in recorded}
    (killed / "train" / "shard-00007.tar.partial").write_bytes(b"half")
    prepare_shards(demo_config(tokenizer_dir), killed, tokenizer=tokenizer)
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in kept.items())
    assert files_of(killed) == files_of(whole)


def flip_byte(file: Path) -> None:
    """Change a token of the first sample: still a whole tar file with as many samples."""
    data = bytearray(file.read_bytes())
    data[512 + 128 + 4] ^= 1
    file.write_bytes(data)
    assert len(list(read_shard(file))) > 0


def test_what_is_missing_is_named(tokenizer: Any, tokenizer_dir: Path, tmp_path: Path) -> None:
    config = demo_config(tokenizer_dir)

    def missing(verify: bool) -> str | None:
        return what_is_missing(config, tmp_path, tokenizer=tokenizer, verify=verify)

    assert missing(False) == "manifest.json is missing"
    prepare_shards(config, tmp_path, tokenizer=tokenizer)
    assert missing(True) is None
    shard = tmp_path / "train" / "shard-00001.tar"
    flip_byte(shard)
    assert missing(False) is None
    assert missing(True) == "train/shard-00001.tar is damaged"
    shard.write_bytes(b"")
    assert missing(False) == "train/shard-00001.tar has another size"
    shard.unlink()
    assert missing(False) == "train/shard-00001.tar is missing"


@pytest.mark.parametrize("finished", [True, False])
def test_lost_and_damaged_shards_are_written_again(
    tokenizer: Any, tokenizer_dir: Path, tmp_path: Path, finished: bool
) -> None:
    config = demo_config(tokenizer_dir)
    manifest = prepare_shards(config, tmp_path, tokenizer=tokenizer)
    before = files_of(tmp_path)
    shards = [tmp_path / record.path for record in manifest.splits["train"]]
    flip_byte(shards[0])
    flip_byte(shards[1])
    shards[1].with_name(shards[1].name + ".json").unlink()  # killed between shard and record
    shards[2].unlink()
    shards[3].write_bytes(shards[3].read_bytes()[:3000])
    (tmp_path / "eval" / "shard-00000.tar.json").write_bytes(b"{")
    if not finished:
        (tmp_path / "manifest.json").unlink()
    assert prepare_shards(config, tmp_path, tokenizer=tokenizer) == manifest
    assert files_of(tmp_path) == before


def test_another_configuration_or_tokenizer_is_refused(
    tokenizer: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    config = demo_config(tokenizer_dir)
    prepare_shards(config, tmp_path, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="another configuration"):
        prepare_shards(demo_config(tokenizer_dir, seed=5), tmp_path, tokenizer=tokenizer)
    other = load_tokenizer(tokenizer_dir)
    other.chat_template = "x" + other.chat_template
    with pytest.raises(ValueError, match="another configuration, tokenizer or text"):
        prepare_shards(config, tmp_path, tokenizer=other)
    (tmp_path / "manifest.json").unlink()  # as a killed run leaves it
    with pytest.raises(ValueError, match="another configuration"):
        prepare_shards(demo_config(tokenizer_dir, seed=5), tmp_path, tokenizer=tokenizer)


def test_text_that_changed_meanwhile_is_noticed(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"text": "one " * 300}) + "\n", "utf-8")
    source = SourceConfig(kind="jsonl", path=str(file), eval_path=str(file))
    config = PrepareConfig(sources=[source], seq_length=64)
    prepare_shards(config, tmp_path / "out", tokenizer=tokenizer)
    (tmp_path / "out" / "manifest.json").unlink()
    file.write_text(json.dumps({"text": "two " * 300}) + "\n", "utf-8")
    with pytest.raises(ValueError, match="or text"):
        prepare_shards(config, tmp_path / "out", tokenizer=tokenizer)


def test_no_token_of_the_text_is_lost(tokenizer: Any, tmp_path: Path) -> None:
    texts = {f"d{i}": f"document {i} " * (3 * i + 1) + "\n" for i in range(40)}
    with open(tmp_path / "data.jsonl", "w", encoding="utf-8") as stream:
        for name, text in texts.items():
            stream.write(json.dumps({"id": name, "text": text}) + "\n")
    source = SourceConfig(kind="jsonl", path=str(tmp_path / "data.jsonl"))
    config = PrepareConfig(sources=[source], seq_length=64, eval_fraction=0.3)
    manifest = prepare_shards(config, tmp_path / "out", tokenizer=tokenizer)
    pieces: dict[str, dict[int, list[int]]] = {}
    splits: dict[str, set[str]] = {"train": set(), "eval": set()}
    for split, records in manifest.splits.items():
        for record in records:
            for sample in read_shard(tmp_path / "out" / record.path):
                borders = sample.cu_seqlens.tolist()
                meta = sample.meta
                parts = zip(meta["ids"], meta["offsets"], borders, borders[1:], strict=False)
                for name, offset, start, end in parts:
                    pieces.setdefault(name, {})[offset] = sample.tokens[start:end].tolist()
                    assert sample.loss_mask[start] == 0
                    assert sample.loss_mask[start + 1 : end].all()
                    splits[split].add(name)
                end = borders[len(meta["ids"])]
                assert meta["num_padding"] == 64 - end
                assert not sample.loss_mask[end:].any()
    assert not splits["train"] & splits["eval"]
    assert min(map(len, splits.values())) > 4
    for name, text in texts.items():
        tokens = [token for _, part in sorted(pieces[name].items()) for token in part]
        assert tokens == [*encode_text(tokenizer, text), 0]


def test_bad_records_are_reported_or_stop_the_job(tokenizer: Any, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"text {i} " * 50}).encode() for i in range(30)]
    lines[7] = b'{"text": "\xff"}'
    (tmp_path / "data.jsonl").write_bytes(b"\n".join(lines))
    source = SourceConfig(kind="jsonl", path=str(tmp_path / "data.jsonl"))
    config = PrepareConfig(sources=[source], seq_length=64, max_bad_fraction=0.1, eval_samples=0)
    manifest = prepare_shards(config, tmp_path / "out", tokenizer=tokenizer)
    report = manifest.reports["train/jsonl"]
    assert report["num_bad"] == 1
    assert report["bad"] == ["data.jsonl:8: invalid UTF-8 (byte 10)"]
    strict = PrepareConfig(sources=[source], seq_length=64, max_bad_fraction=0.0)
    with pytest.raises(ValueError, match="max_bad_fraction"):
        prepare_shards(strict, tmp_path / "strict", tokenizer=tokenizer)
    assert not {"manifest.json", "plan.json", "train"} & {p.name for p in tmp_path.glob("strict/*")}


def test_chats_that_are_too_long_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    def chat(words: int) -> str:
        turns = [("user", "say it"), ("assistant", "word " * words)]
        return json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]})

    (tmp_path / "c.jsonl").write_text("\n".join(chat(n) for n in (3, 500, 8, 5)), "utf-8")
    source = SourceConfig(kind="chat_jsonl", path=str(tmp_path / "c.jsonl"))
    for packing, possible in (("best_fit", (1, 2)), ("none", (3,))):
        config = PrepareConfig(
            sources=[source],
            seq_length=160,
            eval_fraction=0.0,
            packing=packing,
            samples_per_shard=2,
        )
        out = tmp_path / packing
        manifest = prepare_shards(config, out, tokenizer=tokenizer)
        assert manifest.reports["train/chat_jsonl"]["num_dropped_too_long"] == 1
        assert manifest.num_samples("train") in possible
        read = [s for r in manifest.splits["train"] for s in read_shard(out / r.path)]
        answers = sorted(
            tokenizer.decode(s.tokens[a:b][s.loss_mask[a:b] == 1]).count("word")
            for s in read
            for a, b in zip(s.cu_seqlens[:-1], s.cu_seqlens[1:], strict=True)
        )
        assert [n for n in answers if n] == [3, 5, 8]


def test_chats_that_the_template_refuses_are_counted(tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tokenizer.chat_template
    )
    end = {"role": "assistant", "content": "yes"}
    chats = [[{"role": role, "content": "Well?"}, end] for role in ("user", "system", "user")]
    lines = [json.dumps({"id": f"chat{i}", "messages": m}) for i, m in enumerate(chats)]
    (tmp_path / "c.jsonl").write_text("\n".join(lines), "utf-8")
    source = SourceConfig(kind="chat_jsonl", path=str(tmp_path / "c.jsonl"))
    config = PrepareConfig(
        sources=[source], seq_length=64, eval_fraction=0.0, packing="none", max_bad_fraction=0.5
    )
    manifest = prepare_shards(config, tmp_path / "out", tokenizer=tokenizer)
    assert manifest.num_samples("train") == 2
    report = manifest.reports["train/chat_jsonl"]
    assert report["num_bad"] == 1
    assert report["bad"][0].startswith("chat1: the chat template refuses roles")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_samples": 100_000}, r"source code has \d+ train samples, 25000 are wanted"),
        ({"train_samples": None}, "generated without end; set data.train_samples"),
        ({"sources": []}, "give at least one entry"),
    ],
)
def test_what_cannot_be_prepared_is_refused(
    tokenizer: Any, tokenizer_dir: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = demo_config(tokenizer_dir, **changes)
    with pytest.raises(ValueError, match=message):
        prepare_shards(config, tmp_path / "out", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_length": 4}, "seq_length"),
        ({"packing": "worst_fit"}, "is not one of best_fit, none"),
        ({"eval_fraction": 1.0}, "eval_fraction"),
        ({"samples_per_shard": 0}, "samples_per_shard"),
        ({"seed": -1}, "seed"),
        ({"train_samples": -1}, "train_samples"),
        ({"sources": [SourceConfig(path="a"), SourceConfig(path="b")]}, "must differ"),
    ],
)
def test_wrong_configurations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**changes)


def test_packages_are_held_out_whole(tokenizer: Any, tmp_path: Path) -> None:
    source = SourceConfig(kind="python_packages", packages=("json", "logging", "wsgiref"))
    config = PrepareConfig(sources=[source], seq_length=256)
    manifest = prepare_shards(config, tmp_path, tokenizer=tokenizer)
    found: dict[str, set[str]] = {}
    for split, records in manifest.splits.items():
        found[split] = {
            name.split("/")[0]
            for record in records
            for sample in read_shard(tmp_path / record.path)
            for name in sample.meta["ids"]
        }
    assert len(found["eval"]) == 1
    assert found["train"] | found["eval"] == {"json", "logging", "wsgiref"}
    assert not found["train"] & found["eval"]


def test_no_more_text_is_read_than_needed(tokenizer: Any, tmp_path: Path) -> None:
    source = SourceConfig(kind="python_packages", packages=("email",), eval_packages=("json",))
    for packing in ("best_fit", "none"):
        fields: dict[str, Any] = {"sources": [source], "seq_length": 256, "packing": packing}
        whole = prepare_shards(PrepareConfig(**fields), tmp_path / packing, tokenizer=tokenizer)
        few = prepare_shards(
            PrepareConfig(**fields, train_samples=10, eval_samples=0),
            tmp_path / f"{packing}_few",
            tokenizer=tokenizer,
        )
        assert few.num_samples("train") == 10
        read, total = (m.reports["train/python_packages"]["num_documents"] for m in (few, whole))
        assert read < total / 2


def test_three_thousand_documents_take_seconds(
    tokenizer: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    source = SourceConfig(kind="recall", packages=("email",), eval_packages=("json",))
    config = demo_config(
        tokenizer_dir,
        seq_length=1024,
        train_samples=3000,
        eval_samples=0,
        sources=[source],
        samples_per_shard=512,
    )
    started = time.perf_counter()
    manifest = prepare_shards(config, tmp_path, tokenizer=tokenizer)
    assert time.perf_counter() - started < 20
    assert manifest.num_tokens("train") == 3000 * 1024
    shares = np.asarray([r.num_samples for r in manifest.splits["train"]])
    assert shares.tolist() == [512] * 5 + [440]
