"""A mixed corpus through `python -m pipeline.run stage=prepare`: settings reach the shards."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep import inspect
from data_prep.sample import Sample
from data_prep.shards import Manifest, read_shard
from pipeline.run import main

ROOT = Path(__file__).resolve().parents[2]
WORDS = Path(os.__file__).read_text("utf-8").split()
GERMAN = "Der Wanderer ging durch den dunklen Wald und dachte an die Stadt seiner Jugend. "


def text(seed: int, words: int = 120) -> str:
    """Words of the standard library in an order of their own: no two texts are alike."""
    rng = random.Random(seed)
    return " ".join(rng.choices(WORDS, k=words))


def english(seed: int) -> str:
    rng = random.Random(seed)
    nouns = ("river", "house", "garden", "winter", "mother", "letter", "soldier", "window", "story")
    return " ".join(
        f"The {rng.choice(nouns)} was near the {rng.choice(nouns)} when they {verb} there."
        for verb in rng.choices(("walked", "slept", "waited", "talked", "stood"), k=15)
    )


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A corpus of every format, and the command line that prepares it."""
    folder = tmp_path_factory.mktemp("corpus")
    leaked = text(9000, 40)
    near = text(3).split()
    near[60] = "changed"
    lines = [
        *({"body": english(i), "meta": {"uid": f"good{i}"}} for i in range(30)),
        {"body": GERMAN * 8, "meta": {"uid": "german"}},
        {"body": english(1).upper(), "meta": {"uid": "copy"}},
        {"body": english(500) + " " + leaked, "meta": {"uid": "leak"}},
        {"body": "tiny", "meta": {"uid": "tiny"}},
    ]
    data = "\n".join(map(json.dumps, lines)).encode() + b'\n{"body": "caf\xe9"}\n{"body": 7}\n'
    (folder / "web.jsonl.zst").write_bytes(zstandard.compress(data))
    rows = [{"content": text(i), "key": i} for i in range(20)]
    rows.append({"content": " ".join(near), "key": 99})
    pq.write_table(pa.Table.from_pylist(rows), folder / "table.parquet")
    saved = [{"text": text(100 + i, 1000), "id": f"long{i}"} for i in range(9)]
    datasets.Dataset.from_list(saved).save_to_disk(str(folder / "saved"))
    chats: list[dict[str, Any]] = [
        {
            "id": "messages",
            "messages": [
                {"role": "user", "content": "How?"},
                {"role": "assistant", "content": "So, my friend."},
            ],
        },
        {
            "id": "sharegpt",
            "conversations": [
                {"from": "human", "value": "Why?"},
                {"from": "gpt", "value": "Because of that."},
            ],
        },
        {"id": "chatqa", "document": text(7, 900), "question": "Who?", "answer": "Somebody else."},
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)), "utf-8")
    (folder / "evals.jsonl").write_text(json.dumps({"input": leaked}) + "\n", "utf-8")
    sources = [
        f"{{kind: jsonl, name: web, path: '{folder}/web.jsonl.zst', fields: {{text: body, "
        "id: meta.uid}, filters: {languages: [en], min_characters: 20}, eval_weight: 0}",
        f"{{kind: parquet, name: table, path: '{folder}/*.parquet', "
        "fields: {text: content, id: key}}",
        f"{{kind: dataset, name: long, path: '{folder}/saved', loss: beyond, min_distance: 100, "
        "max_documents: 8, "
        "lengths: {256: 1, 512: 1}}",
        f"{{kind: chat_jsonl, name: chats, path: '{folder}/chats.jsonl', "
        "chat: {too_long: truncate_document}}",
    ]
    return [
        *("stage=prepare", "recipe=tiny", "model=demo", "data.tokenizer=''", "tracking=none"),
        *("data.seq_length=512", "data.packing=best_fit", "data.samples_per_shard=4"),
        *("data.train_samples=null", "data.eval_samples=null", "data.eval_fraction=0"),
        *("data.max_bad_fraction=0.1", "data.dedup.mode=near", "stages=[prepare]"),
        f"data.sources=[{', '.join(sources)}]",
        f"data.decontaminate.sets=[{{path: '{folder}/evals.jsonl'}}]",
    ]


@pytest.fixture(scope="module")
def run_dir(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert main([*words, f"run.dir={folder}"]) == 0
    return folder


def samples_of(folder: Path) -> list[Sample]:
    records = Manifest.load(folder).splits["train"]
    return [sample for record in records for sample in read_shard(folder / record.path)]


def shards_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.glob("*/shard-*.tar")}


def test_every_step_takes_effect_through_the_command_line(run_dir: Path) -> None:
    manifest = Manifest.load(run_dir / "prepare")
    samples = samples_of(run_dir / "prepare")
    by_source: dict[str, list[str]] = {}
    for sample in samples:
        by_source.setdefault(sample.meta["source"], []).extend(sample.meta["ids"])
    assert set(by_source["web"]) == {f"good{i}" for i in range(30)}
    assert set(by_source["table"]) == {str(i) for i in range(20)}
    assert set(by_source["long"]) == {f"long{i}" for i in range(8)}
    assert set(by_source["chats"]) == {"messages", "sharegpt", "chatqa"}
    web, table, long, chats = (manifest.reports[f"train/{name}"] for name in by_source)
    assert {reason: drop["documents"] for reason, drop in web["dropped"].items()} == {
        "language de": 1,
        "exact duplicate": 1,
        "in an evaluation set": 1,
        "fewer than 20 characters": 1,
    }
    assert web["bad_reasons"] == {"invalid UTF-8": 1, "field 'body' is no text": 1}
    assert {reason: drop["documents"] for reason, drop in table["dropped"].items()} == {
        "near duplicate": 1
    }
    assert "99: near duplicate of 3" in table["duplicate_examples"]
    assert [report["num_read"] for report in (web, table, long, chats)] == [34, 21, 8, 3]
    assert chats["cuts"] == {"conversation too long": 1}


def test_loss_and_lengths_are_as_configured(run_dir: Path) -> None:
    lengths = set()
    for sample in samples_of(run_dir / "prepare"):
        spans = [slice(a, b) for a, b in pairwise(sample.cu_seqlens.tolist())]
        spans = spans[: len(sample.meta["ids"])]  # the last may be padding
        for span in spans if sample.meta["source"] == "long" else []:
            mask = sample.loss_mask[span]
            assert not mask[:100].any()
            assert mask[100:].all()
            lengths.add(len(mask))
        for span in spans if sample.meta["source"] == "chats" else []:
            tokens, mask = sample.tokens[span], sample.loss_mask[span]
            assert 0 < mask.sum() < 40
            edges = np.flatnonzero(np.diff(mask.astype(np.int8)))
            assert len(edges) == 2  # one response
            assert len(tokens) > mask.sum() + 5
    assert {256, 512} <= lengths
    assert max(lengths) == 512


def test_inspect_finds_the_models_tokenizer(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    chats = next(
        record.path
        for record in Manifest.load(run_dir / "prepare").splits["train"]
        if record.source == "chats"
    )
    assert inspect.main([str(run_dir / "prepare" / chats), "--num", "2", "--documents", "0"]) == 0
    shown = capsys.readouterr().out
    assert "⟦So, my friend.<|im_end|>⟧" in shown
    assert "⟦Because of that.<|im_end|>⟧" in shown
    assert inspect.main([str(run_dir / "prepare"), "--check"]) == 0


def test_workers_at_a_url_after_sigkill_give_the_same_bytes(
    words: list[str], run_dir: Path, tmp_path: Path
) -> None:
    """Two processes of the command line, one of them killed while it works."""
    place = tmp_path / "place"
    both = [*words, f"run.dir={tmp_path}/run", f"data.dir=local://{place}", "data.num_workers=2"]

    def start(rank: int) -> subprocess.Popen[bytes]:
        call = [sys.executable, "-m", "pipeline.run", *both, f"data.worker_rank={rank}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(call, cwd=ROOT, env=environment, stderr=subprocess.PIPE)

    first = start(0)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").rglob("unit-*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not (tmp_path / "run" / "prepare" / "manifest.json").exists()
    workers = [start(rank) for rank in (1, 0)]
    for worker in workers:
        _, said = worker.communicate(timeout=240)
        assert worker.returncode == 0, said.decode()
    assert shards_of(place) == shards_of(run_dir / "prepare")
    assert Manifest.load(f"local://{place}").splits == Manifest.load(run_dir / "prepare").splits


def test_finished_work_is_kept_when_more_bad_records_are_allowed(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = [*words, f"run.dir={tmp_path}", "data.keep_work=true", "data.max_bad_fraction=0.03"]
    assert main(strict) == 2
    error = capsys.readouterr().err
    assert "2 of 36 records are unreadable, more than max_bad_fraction=0.03" in error
    assert "raise data.max_bad_fraction" in error
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("unit-*.bin")}
    assert times
    assert main([*strict[:-1], "data.max_bad_fraction=0.06"]) == 0
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("unit-*.bin")}
