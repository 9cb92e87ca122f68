"""Which source of ours decides what a model says, and a digest of it.

Answers of hours are kept under this digest. It takes in what reads the weights, computes tokens and
turns them into text, as a program: comments, docstrings and layout do not count. What comes before
(data, prompts, chat template) is in the digest of each question, and what comes after (scores,
tables, figures) is computed anew from the answers.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from pipeline.config import PROJECT_ROOT

ANSWERING: tuple[str, ...] = (
    "kernels",
    "allmem_hf",
    *(f"allmem_megatron/{name}.py" for name in ("base_files", "convert", "gguf_file")),
    *(f"pipeline/{name}.py" for name in ("decode_graph", "models")),
    *(f"pipeline/generation{part}.py" for part in ("", "_choice", "_models", "_open")),
    *(f"pipeline/evaluating/{name}.py" for name in ("foreign", "harness_model", "speaker")),
)
"""Files and folders between weights and text."""


@cache
def program_digest() -> str:
    """Of the program between weights and text, and of torch's version."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in answering_files(PROJECT_ROOT):
        digest.update(f"{path.relative_to(PROJECT_ROOT)}\n".encode())
        digest.update(meaning(path.read_text(encoding="utf-8")).encode())
    return digest.hexdigest()


def answering_files(root: Path) -> Iterator[Path]:
    """The Python files of `ANSWERING`, in a fixed order."""
    for name in ANSWERING:
        place = root / name
        yield from sorted(place.rglob("*.py")) if place.is_dir() else [place]


def meaning(source: str) -> str:
    """A Python program without its comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [line for line in node.body if not _is_text(line)]
    return ast.dump(tree)


def _is_text(line: ast.stmt) -> bool:
    return (
        isinstance(line, ast.Expr)
        and isinstance(line.value, ast.Constant)
        and isinstance(line.value.value, str)
    )
