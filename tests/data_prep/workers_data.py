"""A small corpus for tests of processes and workers, its configuration and its files."""

from __future__ import annotations

import json
import lzma
import os
import random
from pathlib import Path
from typing import Any

from data_prep.config import PrepareConfig, RecallConfig, SourceConfig
from data_prep.documents import read_documents


def write_corpus(folder: Path) -> Path:
    """Texts of many lengths as JSONL, some twice, some chats, one broken line."""
    texts = [d.text for d in read_documents(SourceConfig(kind="text", path=os.__file__))]
    source, rng = texts[0], random.Random(0)
    lines = []
    for i in range(150):
        start = rng.randrange(len(source) - 4000)
        lines.append({"id": f"d{i}", "text": source[start : start + rng.randrange(1, 4000)]})
    lines += [{**line, "id": f"copy of {line['id']}"} for line in lines[10:20]]
    data = [json.dumps(line) for line in lines]
    more = [json.dumps({"text": f"{i} " + source[i * 900 : i * 1000]}) for i in range(1, 31)]
    data[33] = '{"text": 7}'
    (folder / "texts.jsonl").write_text("\n".join(data) + "\n", "utf-8")
    with lzma.open(folder / "packed.jsonl.xz", "wt", encoding="utf-8") as stream:
        stream.write("\n".join([*data[:60], *more]) + "\n")
    chats = [
        {"messages": [turn("user", t[:50]), turn("assistant", t[50:])]}
        for t in (line["text"][:400] for line in lines[:60])
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)) + "\n", "utf-8")
    return folder


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def make_config(corpus: Path, **changes: Any) -> PrepareConfig:
    recall = RecallConfig(min_distance=60, num_facts=(2, 3), num_queries=(1, 2))
    fields: dict[str, Any] = {
        "seq_length": 256,
        "sources": [
            SourceConfig(kind="jsonl", path=str(corpus / "texts.jsonl"), unit_bytes=16384),
            SourceConfig(kind="chat_jsonl", name="chats", path=str(corpus / "chats.jsonl")),
            SourceConfig(kind="jsonl", name="packed", path=str(corpus / "packed.jsonl.xz")),
        ],
        "eval_fraction": 0.1,
        "samples_per_shard": 16,
        "max_bad_fraction": 0.1,
        **changes,
    }
    if fields.get("train_samples") is not None:
        fields["sources"].append(
            SourceConfig(kind="recall", recall=recall, packages=("email",), eval_packages=("json",))
        )
    return PrepareConfig(**fields)


LIMITED: dict[str, Any] = {"train_samples": 40, "eval_samples": 12}


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }
