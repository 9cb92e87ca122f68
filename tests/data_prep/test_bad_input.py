"""What is broken is counted with its place, in bounded memory, and what is whole is read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep.config import PrepareConfig, SourceConfig
from data_prep.prepare import prepare_shards
from data_prep.readers import Document, UnitReport, list_units, read_unit

ROOT = Path(__file__).parents[2]
GOOD = b'{"text": "good"}\n'


def read(report: UnitReport, **fields: Any) -> list[Document]:
    units = list_units(SourceConfig(**fields), "train")
    return [document for unit in units for document in read_unit(unit, report)]


def noise(count: int) -> bytes:
    """Lines that do not compress well."""
    draw = random.Random(0)
    return b"".join(
        json.dumps({"text": f"{i} {draw.getrandbits(256):x}"}).encode() + b"\n"
        for i in range(count)
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff\xfe"}', "invalid UTF-8"),
        ('{"text": "ü"}'.encode("utf-16"), "invalid UTF-8"),
        (b'{"text": "open', "invalid JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", "invalid JSON"),
        (b'{"text": ' + b"[" * 100_000, "invalid JSON"),
        (b"\x00" * 4096, "invalid JSON"),
        (b"null", "record is no JSON object"),
        (b'"text"', "record is no JSON object"),
        (b"[1, 2]", "record is no JSON object"),
        (b'{"body": "x"}', "field 'text' is missing"),
        (b'{"text": null}', "field 'text' is no text"),
        (b'{"text": 3.5}', "field 'text' is no text"),
        (b'{"text": {"de": "x"}}', "field 'text' is no text"),
        (b'{"text": "\\ud83d"}', "field 'text' is no text"),
    ],
)
def test_a_bad_line_is_counted_and_its_neighbours_read(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + line.replace(b"\n", b"") + b"\n" + GOOD)
    report = UnitReport()
    documents = read(report, kind="jsonl", path=str(tmp_path))
    assert [d.id for d in documents] == ["a.jsonl:1", "a.jsonl:3"]
    assert report.reasons == {reason: 1}
    assert report.samples[0].where == "a.jsonl:2"
    assert 0 < len(report.samples[0].excerpt) <= 200


def test_bom_crlf_and_nul_are_no_errors(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}).encode() for text in ("a", "b\u0000c", "d\r\ne")]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    report = UnitReport()
    documents = read(report, kind="jsonl", path=str(tmp_path))
    assert [d.text for d in documents] == ["a", "b\0c", "d\r\ne"]
    assert report.num_bad == 0


def test_empty_files_and_texts_are_counted_apart(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": ""}\n\n  \n')
    (tmp_path / "b.jsonl").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes(b"")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b""))
    report = UnitReport()
    assert read(report, kind="jsonl", path=str(tmp_path)) == []
    assert (report.num_bad, report.num_empty) == (0, 1)
    report = UnitReport()
    assert read(report, kind="text", path=str(tmp_path / "c.txt")) == []
    assert (report.num_bad, report.num_empty) == (0, 1)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "not an archive"])
def test_damaged_archives_give_what_is_whole_and_are_counted(
    tmp_path: Path, suffix: str, damage: str
) -> None:
    zstd = zstandard.ZstdCompressor(write_checksum=True).compress
    compress = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}[suffix]
    data = bytearray(compress(noise(8000)))
    if damage == "truncated":
        del data[len(data) // 2 :]
    elif damage == "flipped":
        for place in range(len(data) // 2, len(data) // 2 + 64):
            data[place] ^= 0x55
    else:
        data = bytearray(bz2.compress(noise(10)))
    (tmp_path / f"a.jsonl{suffix}").write_bytes(data)
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    report = UnitReport()
    documents = read(report, kind="jsonl", path=str(tmp_path))
    assert documents[-1].text == "good"
    if damage == "truncated":
        assert 1000 < len(documents) < 8000
    assert report.num_broken_files == 1
    assert report.reasons["truncated or corrupt archive"] == 1
    if damage != "flipped":  # gzip and zstd find that out at the end of the archive only
        assert report.num_bad <= 2


@pytest.mark.parametrize("damage", ["truncated", "page", "empty", "not parquet"])
def test_damaged_parquet_is_counted(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "a.parquet"
    texts = [line.decode() for line in noise(3000).splitlines()]
    pq.write_table(pa.table({"text": texts}), file, row_group_size=300, write_page_checksum=True)
    data = bytearray(file.read_bytes())
    if damage == "truncated":
        del data[len(data) // 2 :]
    elif damage == "page":
        data[len(data) // 2 : len(data) // 2 + 3000] = b"\xff" * 3000
    elif damage == "empty":
        data = bytearray()
    else:
        data = bytearray(GOOD * 10)
    file.write_bytes(data)
    pq.write_table(pa.table({"text": ["good"]}), tmp_path / "b.parquet")
    report = UnitReport()
    documents = read(report, kind="parquet", path=str(tmp_path), unit_bytes=1024)
    assert documents[-1].text == "good"
    assert (len(documents) > 1000) == (damage == "page")
    assert len(documents) < 3000
    assert report.num_broken_files >= 1
    assert "truncated or corrupt parquet file" in report.reasons


def test_bad_rows_of_parquet_are_counted_one_by_one(tmp_path: Path) -> None:
    binary = pa.array([b"good", b"\xff", None, b"x" * 50], type=pa.binary())
    pq.write_table(pa.table({"text": binary}), tmp_path / "a.parquet")
    report = UnitReport()
    documents = read(report, kind="parquet", path=str(tmp_path), max_record_bytes=40)
    assert [d.text for d in documents] == ["good"]
    assert report.examples == [
        "a.parquet:2: invalid UTF-8 (byte 0)",
        "a.parquet:3: field 'text' is no text (null)",
        "a.parquet:4: record longer than 40 bytes",
    ]
    buffers = pa.array(["good", "bad!", "good"]).buffers()
    spoilt = pa.py_buffer(b"good\xff\xfe\xfd\xfcgood")
    text = pa.Array.from_buffers(pa.string(), 3, [None, buffers[1], spoilt])
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    report = UnitReport()
    assert [d.text for d in read(report, kind="parquet", path=str(tmp_path))] == ["good", "good"]
    assert report.examples == ["a.parquet:2: invalid UTF-8"]


@pytest.mark.parametrize(
    ("tail", "detail"),
    [
        (b"", "not whole"),
        (b'{"text": "open', "not whole"),
        (b'{"text": 1 2}]', "no JSON"),
        (b'{"text": "\xff"}]', "invalid UTF-8"),
        (b'{"text": "next"} {"text": "no comma"}]', "no comma"),
    ],
)
def test_broken_json_arrays_end_early_and_are_counted(
    tmp_path: Path, tail: bytes, detail: str
) -> None:
    filler = b'{"text": "' + b"x" * 2_000_000 + b'"}, '
    (tmp_path / "a.json").write_bytes(b'[{"text": "good"}, ' + filler + tail)
    report = UnitReport()
    documents = read(report, kind="jsonl", path=str(tmp_path / "a.json"))
    assert documents[0].text == "good"
    assert report.num_broken_files == 1
    assert detail in report.examples[0]


MEMORY = """
import resource, sys
from data_prep.config import PrepareConfig, SourceConfig
from data_prep.prepare import prepare_shards
from data_prep.readers import UnitReport, list_units, read_unit
kind, path = sys.argv[1:]
source = SourceConfig(kind=kind, path=path, max_record_bytes=2**20)
report = UnitReport()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
units = list_units(source, "train")
texts = [d.text for unit in units for d in read_unit(unit, report)]
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(len(units), texts == ["good"] * len(texts), len(texts), report.num_bad, after - before)
"""


@pytest.mark.parametrize("form", ["jsonl", "jsonl.zst", "json", "text"])
def test_a_record_of_a_gigabyte_is_counted_without_being_held(tmp_path: Path, form: str) -> None:
    size = 2**30
    file = tmp_path / f"a.{form}"
    if form == "jsonl":  # a hole in the file: no gigabyte is written
        with open(file, "wb") as stream:
            stream.write(GOOD + b'{"text": "')
            stream.seek(size, os.SEEK_CUR)
            stream.write(b'"}\n' + GOOD)
    elif form == "jsonl.zst":
        chunk = b"x" * 2**24
        with open(file, "wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as stream:
            stream.write(GOOD + b'{"text": "')
            for _ in range(size // len(chunk)):
                stream.write(chunk)
            stream.write(b'"}\n' + GOOD)
    else:
        with open(file, "wb") as stream:
            stream.write(b'[{"text": "good"}, {"text": "')
            stream.seek(size, os.SEEK_CUR)
            stream.write(b'"}]')
    kind = "text" if form == "text" else "jsonl"
    command = [sys.executable, "-c", MEMORY, kind, str(file)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    units, same, count, num_bad, kilobytes = done.stdout.split()
    good = {"jsonl": 2, "jsonl.zst": 2, "json": 1, "text": 0}[form]
    assert (same, int(count), int(num_bad)) == ("True", good, 1)
    assert int(units) == (17 if form == "jsonl" else 1)
    assert int(kilobytes) < 120 * 1024


def test_duplicate_ids_are_read_each(tmp_path: Path) -> None:
    lines = [json.dumps({"id": "same", "text": f"text {i}"}) for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), "utf-8")
    report = UnitReport()
    assert [d.text for d in read(report, kind="jsonl", path=str(tmp_path))] == [
        "text 0",
        "text 1",
        "text 2",
    ]
    assert report.num_bad == 0


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_that_is_gone_since_it_was_listed_is_an_error(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"a.{kind}"
    file.write_bytes(GOOD)
    (unit,) = list_units(SourceConfig(kind=kind, path=str(tmp_path)), "train")
    file.unlink()
    with pytest.raises(ValueError, match="is gone since it was listed"):
        list(read_unit(unit, UnitReport()))


def test_a_job_that_is_bound_to_fail_ends_after_a_small_part_of_the_text(
    tmp_path: Path, tokenizer: Any
) -> None:
    """A wrong field's name is told before all is read; a damaged begin ends nothing."""
    bad = b"".join(json.dumps({"body": f"text {i} " * 20}).encode() + b"\n" for i in range(400))
    good = bad.replace(b"body", b"text")
    for name, data in (("all", bad), ("begin", bad[: len(bad) // 50] + b"\n" + good)):
        (tmp_path / f"{name}.jsonl").write_bytes(data)
    many = len(bad) // 40
    sources = {
        name: SourceConfig(kind="jsonl", path=str(tmp_path / f"{name}.jsonl"), unit_bytes=many)
        for name in ("all", "begin")
    }
    config = {"seq_length": 64, "max_bad_fraction": 0.05, "eval_samples": 0}
    wrong = PrepareConfig(sources=[sources["all"]], **config)
    with pytest.raises(ValueError, match=r"(4|5)\d of .* are unreadable, more than"):
        prepare_shards(wrong, tmp_path / "wrong", tokenizer=tokenizer)
    assert 4 <= len(list((tmp_path / "wrong").rglob("unit-*.json"))) <= 6
    mended = PrepareConfig(sources=[sources["begin"]], **config)
    manifest = prepare_shards(mended, tmp_path / "mended", tokenizer=tokenizer)
    assert manifest.reports["train/jsonl"]["num_bad"] == 10
