"""The text of the data benchmark: what a user names, or Python sources that every machine has."""

from __future__ import annotations

import json
import math
import random
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.config import SourceConfig
from data_prep.documents import read_documents

NUM_FILES = 8
"""Files that a text is spread over, so that tools that share work by files can."""
PACKAGES = ("transformers", "torch", "numpy", "sympy", "deepspeed", "mlflow")
_MEDIAN, _SIGMA = 6_000, 1.4
"""Of the lengths of documents, in characters: half of them lie between 2,300 and 15,400."""


@dataclass(frozen=True)
class Text:
    """A text on disk: `text-0.jsonl` …, records with `id` and `text`."""

    folder: Path
    num_documents: int
    num_characters: int
    num_bytes: int
    description: str

    @property
    def files(self) -> list[Path]:
        """In order."""
        return sorted(self.folder.glob("text-*.jsonl"))

    def documents(self) -> Iterator[tuple[str, str]]:
        """Id and text of each."""
        for file in self.files:
            with open(file, encoding="utf-8") as lines:
                for line in lines:
                    record = json.loads(line)
                    yield record["id"], record["text"]


def make_text(folder: Path, path: str | None, num_characters: int, seed: int = 0) -> Text:
    """Writes a text, cut into documents of mixed lengths.

    Args:
        folder: made here.
        path: file, folder or glob of .jsonl (also compressed) or text files; None: Python sources.
        num_characters: where the source has less it comes again, its documents cut elsewhere.
        seed: of the lengths.

    Raises:
        ValueError: no text.
    """
    folder.mkdir(parents=True)
    names = [folder / f"text-{number}.jsonl" for number in range(NUM_FILES)]
    files = [open(name, "w", encoding="utf-8") for name in names]  # noqa: SIM115
    total = count = 0
    try:
        for count, text in enumerate(_documents(path, num_characters, seed), start=1):
            record = {"id": f"{count - 1:07d}", "text": text}
            files[(count - 1) % NUM_FILES].write(json.dumps(record, ensure_ascii=False) + "\n")
            total += len(text)
    finally:
        for file in files:
            file.close()
    if not total:
        raise ValueError(f"--text {path} holds no text; name .jsonl, .txt or .md files")
    size = sum(file.stat().st_size for file in folder.iterdir())
    words = f"{Path(path).name}" if path else "source files of Python's library and packages"
    return Text(folder, count, total, size, words)


def _documents(path: str | None, num_characters: int, seed: int) -> Iterator[str]:
    """Stretches of the source, their lengths log-normal."""
    rng = random.Random(seed)
    left = num_characters
    while left > 0:
        before = left
        for text in _source(path):
            at = 0
            while at < len(text) and left > 0:
                length = max(200, round(math.exp(rng.gauss(math.log(_MEDIAN), _SIGMA))))
                stretch = text[at : at + min(length, left)]
                at += length
                # Where a text spells a control token, tools differ in what they make of it.
                if stretch.strip() and "<|" not in stretch:
                    left -= len(stretch)
                    yield stretch
            if left <= 0:
                return
        if left == before:
            return


def _source(path: str | None) -> Iterable[str]:
    if path is None:
        yield from _python_sources()
        return
    kind = "jsonl" if ".json" in path else "text"
    pattern = "*.jsonl*" if Path(path).is_dir() and any(Path(path).glob("*.jsonl*")) else "*"
    kind = "jsonl" if pattern != "*" else kind
    for document in read_documents(SourceConfig(kind=kind, path=path, pattern=pattern)):
        yield document.text


def _python_sources() -> Iterator[str]:
    """Source files in a fixed order: the standard library, then packages that are installed."""
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    site = Path(sysconfig.get_paths()["purelib"])
    roots += [site / name for name in PACKAGES if (site / name).is_dir()]
    for root in roots:
        for file in sorted(root.rglob("*.py")):
            if "site-packages" in file.relative_to(root).parts:
                continue
            try:
                yield file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a few test files of the library are in other encodings on purpose
