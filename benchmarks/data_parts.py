"""Speeds of the parts of data preparation on one core: readers, steps, packing.

`python -m benchmarks.data_parts '{"text": …}'` prints one line of JSON. Seconds are CPU seconds,
the least of some repeats: other programs can only add to them.
"""

from __future__ import annotations

import functools
import gzip
import json
import lzma
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from benchmarks.data_cases import SEQ_LENGTH, load_texts
from data_prep.config import SourceConfig
from data_prep.decontaminate import Decontaminator
from data_prep.dedup import Signer, find_duplicates
from data_prep.filters import Language, Normalise, Quality, WordCount
from data_prep.pack import WINDOW_PIECES, pack_pieces
from data_prep.readers import Document, UnitReport, list_units, read_unit
from data_prep.settings import DedupConfig

_SHORT = 2_000
"""Characters of a short document."""
_NUM_EVAL = 20_000
_NUM_ROWS = 100_000
_REPEATS = 3


def least(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of the fastest of some repeats, and what it gave."""
    best, result = float("inf"), None
    for _ in range(_REPEATS):
        start = time.process_time()
        result = work()
        best = min(best, time.process_time() - start)
    return best, result


def readers(texts: list[str], folder: Path) -> dict[str, dict[str, float]]:
    """Every format, the same documents; the file system's cache is warm."""
    records = [{"id": str(number), "text": text} for number, text in enumerate(texts)]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines, 6))
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(lines, 3))
    (folder / "a.jsonl.xz").write_bytes(lzma.compress(lines, preset=1))
    (folder / "a.json").write_text(json.dumps(records), "utf-8")
    pq.write_table(pa.Table.from_pylist(records), folder / "a.parquet", row_group_size=1000)
    datasets.Dataset.from_list(records).save_to_disk(str(folder / "saved"))
    texts_folder = folder / "files"
    texts_folder.mkdir()
    for number, text in enumerate(texts):
        (texts_folder / f"{number:07d}.txt").write_text(text, "utf-8")
    found = {}
    for kind, name in (
        ("jsonl", "a.jsonl"),
        ("jsonl", "a.jsonl.gz"),
        ("jsonl", "a.jsonl.zst"),
        ("jsonl", "a.jsonl.xz"),
        ("jsonl", "a.json"),
        ("parquet", "a.parquet"),
        ("dataset", "saved"),
        ("text", "files"),
    ):
        source = SourceConfig(kind=kind, path=str(folder / name))

        def read(source: SourceConfig = source) -> tuple[int, int]:
            number = characters = 0
            for unit in list_units(source, "train"):
                for document in read_unit(unit, UnitReport()):
                    number += 1
                    characters += len(document.text)
            return number, characters

        seconds, (number, characters) = least(read)
        if number != len(texts):
            raise SystemExit(f"{name}: {number} of {len(texts)} documents were read")
        found[name] = _rates(seconds, number, characters)
    return found


def steps(texts: list[str]) -> dict[str, dict[str, float]]:
    """Every step on documents as they are."""
    documents = [Document(text, str(number), "text") for number, text in enumerate(texts)]
    characters = sum(map(len, texts))
    rng = np.random.default_rng(0)
    items = []
    for number in range(_NUM_EVAL):
        text = texts[int(rng.integers(len(texts)))]
        start = int(rng.integers(max(len(text) - 600, 1)))
        items.append((str(number), " ".join(reversed(text[start : start + 600].split()))))
    signer = Signer(DedupConfig(mode="near"))
    chain: dict[str, Callable[[Document], Any]] = {
        "normalise": Normalise().apply,
        "count words": WordCount(1, None).apply,
        "letters, repeated lines": Quality(0.2, 0.9, 1_000_000).apply,
        "language": Language(("en",), 400, 0.0).apply,
        f"{_NUM_EVAL:,} evaluation items": Decontaminator(items).apply,
        "MinHash signature": signer.signature,
    }
    found = {}
    for name, step in chain.items():
        seconds, _ = least(functools.partial(_run, step, documents))
        found[name] = _rates(seconds, len(documents), characters)
    rows = _signatures(signer, rng)
    seconds, duplicates = least(lambda: find_duplicates(rows, signer.config))
    found["search of duplicates"] = {
        "documents_per_s": len(rows) / seconds,
        "share_found": float((duplicates.keeper >= 0).mean()),
    }
    return found


def _run(step: Callable[[Document], Any], documents: list[Document]) -> None:
    for document in documents:
        step(document)


def _signatures(signer: Signer, rng: np.random.Generator) -> np.ndarray:
    """Rows of documents, one in five nearly a copy of an earlier one."""
    rows = np.zeros(_NUM_ROWS, dtype=signer.dtype)
    copies = _NUM_ROWS // 5
    rows["id"] = np.arange(_NUM_ROWS)
    rows["exact"] = rng.integers(0, 2**63, (_NUM_ROWS, 2))
    numbers = rng.integers(0, 2**32 - 1, (_NUM_ROWS, signer.config.num_perm), dtype=np.uint32)
    originals = numbers[rng.integers(0, _NUM_ROWS - copies, copies)]
    same = rng.random(originals.shape) < 0.9
    numbers[-copies:] = np.where(same, originals, numbers[-copies:])
    rows["minhash"] = numbers
    return rows


def packing(lengths: np.ndarray) -> dict[str, dict[str, float]]:
    """Fill at 24K, and seconds a million pieces, for lengths of several kinds."""
    rng = np.random.default_rng(0)
    number = WINDOW_PIECES
    kinds = {
        "this text": lengths,
        "web (median 700)": rng.lognormal(np.log(700), 1.1, number),
        "mixed (median 2,000)": rng.lognormal(np.log(2_000), 1.5, number),
        "books and chats": np.concatenate(
            [rng.lognormal(np.log(120_000), 0.5, 2_000), rng.lognormal(np.log(900), 0.8, 60_000)]
        ),
        "all of 13,000": np.full(2_000, 13_000.0),
    }
    found = {}
    for name, drawn in kinds.items():
        whole = np.maximum(drawn.astype(np.int64), 1)
        pieces = np.concatenate(
            [np.full(int((whole // SEQ_LENGTH).sum()), SEQ_LENGTH), whole % SEQ_LENGTH]
        )
        pieces = pieces[pieces > 0]
        seconds, (_, sizes) = least(functools.partial(pack_pieces, pieces, SEQ_LENGTH))
        found[name] = {
            "pieces": len(pieces),
            "samples": len(sizes),
            "fill": float(pieces.sum() / (len(sizes) * SEQ_LENGTH)),
            "seconds_per_million_pieces": 1e6 * seconds / len(pieces),
        }
    return found


def _rates(seconds: float, documents: int, characters: int) -> dict[str, float]:
    return {
        "documents_per_s": documents / seconds,
        "mcharacters_per_s": characters / seconds / 1e6,
    }


def main() -> None:
    """The command."""
    work = json.loads(sys.argv[1])
    texts = load_texts(work["text"])
    whole, left = [], work["characters"]
    for text in texts:
        if left > 0:
            whole.append(text)
            left -= len(text)
    short = [text[i : i + _SHORT] for text in whole for i in range(0, len(text), _SHORT)]
    result: dict[str, Any] = {"packing": packing(np.asarray(work["lengths"]))}
    for name, documents in (("long", whole), ("short", short)):
        documents = [document for document in documents if document.strip()]
        with tempfile.TemporaryDirectory(dir=work["work"]) as folder:
            result[f"readers, {name} documents"] = readers(documents, Path(folder))
        result[f"steps, {name} documents"] = steps(documents)
    print(json.dumps(result))


if __name__ == "__main__":
    datasets.disable_progress_bars()
    main()
