"""Local files of short tasks: what a line is, and where a wrong one stands."""

import json
from pathlib import Path

import pytest

from pipeline.evaluating.short_data import read_rows

PIQA = {"goal": "open\u2028it", "sol1": "pull", "sol2": "push", "label": 0}


def test_only_a_newline_ends_a_record(tmp_path: Path) -> None:
    file = tmp_path / "piqa.jsonl"
    lines = [json.dumps(PIQA, ensure_ascii=False)] * 2
    file.write_text("\n".join([*lines, ""]), encoding="utf-8")
    rows = read_rows(file, "piqa")
    assert [row["goal"] for row in rows] == ["open\u2028it"] * 2


def test_hellaswag_blocks_end_with_or_without_a_newline(tmp_path: Path) -> None:
    file = tmp_path / "hellaswag_val_full.txt"
    block = "Roofing: A man is on a roof. he\n2\nfalls\u2028down\nsits\nsings\nsleeps"
    for end in ("", "\n"):
        file.write_text(block + end, encoding="utf-8")
        (row,) = read_rows(file, "hellaswag")
        assert row["endings"][0] == "falls\u2028down"
    file.write_text(block + "\nmore\n", encoding="utf-8")
    with pytest.raises(ValueError, match="7 lines, no multiple of 6"):
        read_rows(file, "hellaswag")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("piqa.jsonl", json.dumps(PIQA) + "\n{broken\n", r"piqa\.jsonl record 2 is none of piqa"),
        ("piqa.jsonl", "\n\n", "holds no record"),
        ("math500_test.json", "[{", r"math500_test\.json is not JSON"),
        ("math500_test.json", "{}", "holds no record"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / name, "piqa" if name.startswith("piqa") else "math_500")
