"""Readers lose nothing in silence: what is bad is counted and named."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import zstandard

from data_prep.config import SourceConfig
from data_prep.documents import Document, ReadReport, package_files, read_documents
from data_prep.readers import list_units, read_unit

RECORDS = [{"id": f"doc{i}", "text": f"text number {i}\n"} for i in range(5)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def read(report: ReadReport | None = None, **fields: Any) -> list[Document]:
    return list(read_documents(SourceConfig(**fields), report=report))


def compress(suffix: str, data: bytes) -> bytes:
    match suffix:
        case ".gz":
            return gzip.compress(data)
        case ".xz":
            return lzma.compress(data)
        case ".zst":
            return zstandard.compress(data)
    return data


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_jsonl_of_every_compression(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"data.jsonl{suffix}"
    file.write_bytes(compress(suffix, LINES[:40]) + compress(suffix, LINES[40:]))
    documents = read(kind="jsonl", path=str(file), name="mine")
    assert [(d.id, d.text) for d in documents] == [(r["id"], r["text"]) for r in RECORDS]
    assert {d.source for d in documents} == {"mine"}


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_truncated_archives_are_counted(tmp_path: Path, suffix: str) -> None:
    lines = b"".join(
        json.dumps({"text": hashlib.sha256(str(i).encode()).hexdigest()}).encode() + b"\n"
        for i in range(3000)
    )
    data = compress(suffix, lines)
    (tmp_path / f"data.jsonl{suffix}").write_bytes(data[: len(data) // 2])
    report = ReadReport()
    documents = read(report, kind="jsonl", path=str(tmp_path))
    assert len(documents) < 3000
    assert report.num_bad >= 1
    assert "truncated or corrupt archive" in report.examples[-1]


def test_bad_records_are_counted_with_their_place(tmp_path: Path) -> None:
    bad = [
        b'{"text": "ok"}',
        b'{"text": "\xff"}',
        b"{not json",
        b"[1]",
        b'{"body": "no text"}',
        b'{"text": "\\ud800"}',
        b"",
        b'{"text": ""}',
        b'{"text": "ok too"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(bad))
    report = ReadReport()
    documents = read(report, kind="jsonl", path=str(tmp_path))
    assert [(d.id, d.text) for d in documents] == [("a.jsonl:1", "ok"), ("a.jsonl:9", "ok too")]
    assert report.num_bad == 5
    assert report.num_documents == 2
    assert report.examples[0] == "a.jsonl:2: invalid UTF-8 (byte 10)"
    assert sum(report.reasons.values()) == 5
    with pytest.raises(ValueError, match=r"5 of 7 records .*a\.jsonl:2.*max_bad_fraction"):
        report.check("mine", 0.5)
    report.check("mine", 0.8)


def test_the_share_of_bad_records_counts_documents_of_the_other_split_too(tmp_path: Path) -> None:
    lines = [b'{"text": "t"}'] * 200
    lines[17] = b"no record"
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    source = SourceConfig(kind="jsonl", path=str(tmp_path))
    reports = {}
    for split in ("train", "eval"):
        reports[split] = ReadReport()
        for unit in list_units(source, split, eval_fraction=0.02):
            list(read_unit(unit, reports[split]))
        reports[split].check("mine", 0.01)
    assert reports["eval"].num_documents < 10
    assert reports["eval"].num_documents == reports["train"].num_other


def test_text_folder_is_sorted_and_bad_utf8_counted(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_text("# B\n", "utf-8")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfA\r\n")
    (tmp_path / "sub" / "c.txt").write_text("C", "utf-8")
    (tmp_path / "bad.txt").write_bytes(b"ok \xff no")
    (tmp_path / "empty.txt").write_bytes(b"")
    report = ReadReport()
    documents = read(report, kind="text", path=str(tmp_path), file_order="sorted")
    assert [(d.id, d.text) for d in documents] == [
        ("a.txt", "A\r\n"),
        ("b.md", "# B\n"),
        ("sub/c.txt", "C"),
    ]
    assert report.examples == ["bad.txt: invalid UTF-8 (byte 3)"]
    only = read(kind="text", path=str(tmp_path), pattern="*.md")
    assert [d.id for d in only] == ["b.md"]
    assert [d.id for d in read(kind="text", path=str(tmp_path / "*.md"))] == ["b.md"]
    with pytest.raises(ValueError, match="names no file"):
        read(kind="text", path=str(tmp_path / "nothing"))


def test_package_sources_are_sorted_and_complete() -> None:
    files = package_files("json")
    names = [name for name, _ in files]
    assert names == sorted(names)
    assert "json/decoder.py" in names
    documents = read(kind="python_packages", packages=("json", "string"), file_order="sorted")
    assert [d.id for d in documents][: len(names)] == names
    assert documents[-1].id == "string.py"
    mixed = read(kind="python_packages", packages=("string", "json"))
    assert sorted(d.id for d in mixed) == sorted(d.id for d in documents)
    assert [d.id for d in mixed] != [d.id for d in documents]
    with pytest.raises(ValueError, match="not installed here"):
        read(kind="python_packages", packages=("no_such_package",))
    with pytest.raises(ValueError, match="not installed here"):
        read(kind="python_packages", packages=("../etc",))


def test_limits_on_documents_and_characters(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    path = str(tmp_path)
    assert len(read(kind="jsonl", path=path, max_documents=2)) == 2
    size = len(RECORDS[0]["text"])
    assert len(read(kind="jsonl", path=path, max_characters=size + 1)) == 2
    assert len(read(kind="jsonl", path=path, max_characters=2 * size)) == 2


def test_chat_records(tmp_path: Path) -> None:
    good = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    bad: list[Any] = [None, [], [{"role": "user", "content": "alone"}], ["text"]]
    bad += [[{"role": "robot", "content": "x"}], [{"role": "assistant", "content": 3}]]
    lines = [json.dumps({"messages": m}) for m in [good, *bad]]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines), "utf-8")
    report = ReadReport()
    documents = read(report, kind="chat_jsonl", path=str(tmp_path))
    assert [list(d.messages) for d in documents] == [good]
    assert documents[0].kind == "chat"
    assert report.num_bad == len(bad)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "csv", "path": "x"}, "is not one of"),
        ({"kind": "text"}, "path is missing"),
        ({"kind": "python_packages"}, "packages is empty"),
        ({"kind": "recall", "filler": "text"}, "path is missing"),
        ({"kind": "text", "path": "x", "weight": 0.0}, "weight"),
        ({"kind": "text", "path": "x", "max_documents": 0}, "max_documents"),
        (
            {"kind": "python_packages", "packages": ("json",), "eval_packages": ("json",)},
            "held-out text must not be trained on",
        ),
    ],
)
def test_wrong_sources_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceConfig(**fields)
