"""Units cover every record once, whatever the format and wherever a file is cut."""

from __future__ import annotations

import gzip
import itertools
import json
import pickle
import uuid
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.config import SourceConfig
from data_prep.readers import Document, Unit, UnitReport, list_units, read_unit
from data_prep.readers.base import MAX_EXAMPLES, BadRecord, Drop
from data_prep.readers.lines import read_lines

RECORDS = [{"id": f"doc{i}", "text": f"text number {i} " * (i % 7 + 1)} for i in range(200)]


def copied(unit: Unit) -> Unit:
    """As it comes out of a queue between processes."""
    return pickle.loads(pickle.dumps(unit))  # noqa: S301 - our own bytes


def read(split: str = "train", report: UnitReport | None = None, **fields: Any) -> list[Document]:
    """All documents, each unit read from a copy as another process would."""
    report = UnitReport() if report is None else report
    units = list_units(SourceConfig(**fields), split, seed=3, eval_fraction=0.25)
    return [d for unit in units for d in read_unit(copied(unit), report)]


def everything(**fields: Any) -> list[Document]:
    return read("both", **fields)


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def same_text(documents: list[Document], records: list[dict[str, str]] = RECORDS) -> bool:
    return [(d.id, d.text) for d in documents] == [(r["id"], r["text"]) for r in records]


@pytest.mark.parametrize("unit_bytes", [1024, 3000, 2**20])
def test_units_of_a_cut_file_give_every_line_once(tmp_path: Path, unit_bytes: int) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    source = SourceConfig(kind="jsonl", path=str(file), unit_bytes=unit_bytes)
    units = list_units(source, "train")
    assert (len(units) == 1) == (unit_bytes > file.stat().st_size)
    assert sum(unit.num_bytes for unit in units) == file.stat().st_size
    assert same_text(everything(kind="jsonl", path=str(file), unit_bytes=unit_bytes))


def test_documents_without_id_are_named_by_line_or_offset(tmp_path: Path) -> None:
    records = [{"text": record["text"]} for record in RECORDS]
    file = write_jsonl(tmp_path / "a.jsonl", records)
    whole = everything(kind="jsonl", path=str(file))
    assert [d.id for d in whole] == [f"a.jsonl:{i}" for i in range(1, 201)]
    cut = everything(kind="jsonl", path=str(file), unit_bytes=2048)
    data = file.read_bytes()
    for document, expected in zip(cut, whole, strict=True):
        assert document.text == expected.text
        offset = int(document.id.removeprefix("a.jsonl@"))
        assert json.loads(data[offset:].splitlines()[0])["text"] == document.text


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")), max_size=12),
    ends_open=st.booleans(),
    count=st.integers(1, 9),
    limit=st.integers(5, 40),
)
def test_byte_ranges_split_lines_anywhere(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[bytes],
    ends_open: bool,
    count: int,
    limit: int,
) -> None:
    data = b"\n".join(lines) + (b"" if ends_open or not lines else b"\n")
    file = tmp_path_factory.mktemp("lines") / "x"
    file.write_bytes(data)
    with open(file, "rb") as stream:
        whole = [(x.offset, x.data, x.too_long) for x in read_lines(stream, limit)]
    borders = [len(data) * i // count for i in range(count + 1)]
    parts = []
    for start, stop in itertools.pairwise(borders):
        with open(file, "rb") as stream:
            found = read_lines(stream, limit, start=start, stop=stop)
            parts += [(x.offset, x.data, x.too_long) for x in found]
    assert parts == whole
    expected = [*(line + b"\n" for line in data.split(b"\n")[:-1]), data.split(b"\n")[-1]]
    expected = [line for line in expected if line]
    assert len(whole) == len(expected)
    for (offset, line, too_long), full in zip(whole, expected, strict=True):
        assert too_long == (len(full.removesuffix(b"\n")) > limit)
        assert line == (full[: limit + 1] if too_long else full)
        assert data[offset:].startswith(full)


def test_splits_are_disjoint_and_both_gives_them_at_once(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    for fields in (
        {"kind": "jsonl", "path": str(file), "unit_bytes": 2048},
        {"kind": "python_packages", "packages": ("json", "email", "logging")},
        {"kind": "jsonl", "path": str(file), "eval_path": str(file)},
    ):
        both = everything(**fields)
        for split in ("train", "eval"):
            own = read(split, **fields)
            assert own == [d for d in both if d.split == split]
            assert len(own) > 2
        if "eval_path" not in fields:
            assert len({d.id for d in both}) == len(both)
    assert {
        d.id.split("/")[0] for d in read("eval", kind="python_packages", packages=("json", "email"))
    } < {"json", "email"}


def test_small_files_share_a_unit_and_keep_their_order(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_text(f"text {i} " * 20)
    fields: dict[str, Any] = {"kind": "text", "path": str(tmp_path), "unit_bytes": 1024}
    units = list_units(SourceConfig(**fields), "train")
    assert 4 < len(units) < 10
    assert [unit.number for unit in units] == list(range(len(units)))
    one = [d.id for d in read(**{**fields, "unit_bytes": 2**20}, file_order="hashed")]
    assert [d.id for d in read(**fields)] == one != sorted(one)


def test_json_array_files_are_read_item_by_item(tmp_path: Path) -> None:
    big = {"id": "big", "text": "x" * 3_000_000}
    records = [*RECORDS[:50], big, *RECORDS[50:]]
    text = json.dumps(records, indent=1)
    (tmp_path / "a.json").write_text(text, "utf-8")
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(("\ufeff" + text).encode()))
    assert same_text(everything(kind="jsonl", path=str(tmp_path / "a.json")), records)
    assert same_text(everything(kind="jsonl", path=str(tmp_path / "b.json.gz")), records)
    (tmp_path / "empty.json").write_text(" [ ] ")
    assert everything(kind="jsonl", path=str(tmp_path / "empty.json")) == []
    assert len(everything(kind="jsonl", path=str(tmp_path), pattern="*.json*")) == 402


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no records")
    for kind, suffix in (("jsonl", ".jsonl"), ("parquet", ".parquet"), ("markdown", ".md")):
        with pytest.raises(ValueError, match=f"none that ends in {suffix}"):
            everything(kind=kind, path=str(tmp_path))


def test_markdown_takes_markdown_files_only(tmp_path: Path) -> None:
    for name in ("a.md", "b.txt", "c.markdown"):
        (tmp_path / name).write_text("# Title\n")
    found = everything(kind="markdown", path=str(tmp_path), file_order="sorted")
    assert [d.id for d in found] == ["a.md", "c.markdown"]


@pytest.mark.parametrize("unit_bytes", [1024, 2**20])
def test_parquet_by_row_groups(tmp_path: Path, unit_bytes: int) -> None:
    table = pa.table({name: [r[name] for r in RECORDS] for name in ("id", "text")})
    table = table.append_column("other", pa.array(range(200)))
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=17)
    fields: dict[str, Any] = {"kind": "parquet", "path": str(tmp_path), "unit_bytes": unit_bytes}
    units = list_units(SourceConfig(**fields), "train")
    assert (len(units) > 3) == (unit_bytes == 1024)
    assert same_text(everything(**fields))
    unnamed = everything(**fields, id_field="nothing")
    assert [d.id for d in unnamed] == [f"a.parquet:{i}" for i in range(1, 201)]
    with pytest.raises(ValueError, match=r"a.parquet has no column 'body'; it has id, text, other"):
        everything(**fields, fields={"text": "body"})


def test_data_sets_saved_or_of_files_are_read_without_a_network(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(RECORDS).save_to_disk(str(saved))
    split = {
        "train": datasets.Dataset.from_list(RECORDS),
        "held": datasets.Dataset.from_list(RECORDS[:9]),
    }
    datasets.DatasetDict(split).save_to_disk(str(tmp_path / "splits"))
    folder = tmp_path / "files"
    folder.mkdir()
    write_jsonl(folder / "train-0.jsonl", RECORDS[:120])
    write_jsonl(folder / "train-1.jsonl", RECORDS[120:])
    for path in (saved, tmp_path / "splits", folder):
        for unit_bytes in (1024, 2**26):
            fields: dict[str, Any] = {
                "kind": "dataset",
                "path": str(path),
                "unit_bytes": unit_bytes,
            }
            assert same_text(everything(**fields)), path
    held = read("eval", kind="dataset", path=str(tmp_path / "splits"), eval_dataset_split="held")
    assert same_text(held, RECORDS[:9])
    assert read(kind="dataset", path=str(saved), id_field="no")[0].id.startswith("saved[train]:")
    with pytest.raises(ValueError, match="has no column 'body'"):
        everything(kind="dataset", path=str(saved), text_field="body")
    with pytest.raises(ValueError, match="it has the splits train, held"):
        everything(kind="dataset", path=str(tmp_path / "splits"), dataset_split="test")


def test_a_data_set_out_of_reach_names_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"some/corpus.*hf download .* some/corpus.*set path=DIR"):
        everything(kind="dataset", path="some/corpus")


def test_fsspec_urls_are_read_like_local_files(tmp_path: Path) -> None:
    base = f"memory://{uuid.uuid4().hex}"
    system = fsspec.filesystem("memory")
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
    system.pipe(f"{base}/sub/a.jsonl", lines)
    system.pipe(f"{base}/sub/b.jsonl.zst", zstandard.compress(lines))
    for path in (f"{base}/sub/a.jsonl", f"{base}/sub/b.jsonl.zst", f"{base}/*/a.jsonl"):
        assert same_text(everything(kind="jsonl", path=path, unit_bytes=2048)), path
    assert len(everything(kind="jsonl", path=base)) == 400
    with pytest.raises(ValueError, match="names no file"):
        everything(kind="jsonl", path=f"{base}/nothing")


def test_field_maps_reach_nested_records(tmp_path: Path) -> None:
    record = {"meta": {"uid": 7}, "parts": [{"body": "first"}, {"body": "second"}], "a.b": "dotted"}
    file = write_jsonl(tmp_path / "a.jsonl", [record])
    for where, text in (("parts.1.body", "second"), ("a.b", "dotted")):
        fields = {"text": where, "id": "meta.uid"}
        assert [
            (d.id, d.text) for d in everything(kind="jsonl", path=str(file), fields=fields)
        ] == [("7", text)]
    with pytest.raises(ValueError, match=r"fields {body: text} is not known; jsonl has text, id"):
        SourceConfig(kind="jsonl", path="x", fields={"body": "text"})


def test_reports_add_up_and_survive_json() -> None:
    first, second = UnitReport(), UnitReport()
    first.bad("invalid JSON", "a:1", excerpt=b"\xff{" * 300)
    for i in range(30):
        second.bad("invalid JSON", f"b:{i}", detail="odd")
        second.drop(Drop("too short", str(i)), Document("hello", f"d{i}", "s"))
    first.merge(UnitReport.from_dict(json.loads(json.dumps(second.to_dict()))))
    assert first.num_bad == first.reasons["invalid JSON"] == 31
    assert len(first.samples) == len(first.dropped_samples) == MAX_EXAMPLES
    assert len(first.samples[0].excerpt) == 200
    assert first.examples[1] == "b:0: invalid JSON (odd)"
    assert first.dropped == {"too short": 30}
    assert first.dropped_characters == {"too short": 150}
    assert first.dropped_samples[0] == BadRecord("d0", "too short (0)", "hello")
    for i in range(1000):
        first.bad(f"reason {i}", "c")
    assert len(first.reasons) <= 101
    assert sum(first.reasons.values()) == first.num_bad
