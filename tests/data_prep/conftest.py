"""A small tokenizer and filler made from the standard library's own source files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_prep.config import SourceConfig
from data_prep.documents import read_documents
from data_prep.filler import FillerBank
from data_prep.recall import recall_symbols
from data_prep.tokenizer import load_tokenizer, train_sentencepiece

TEXT_PACKAGE = "email"
HELD_OUT_PACKAGE = "json"


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of 1,024 ids in which recall words are single tokens."""
    config = SourceConfig(kind="python_packages", packages=(TEXT_PACKAGE,))
    texts = (document.text for document in read_documents(config))
    out = tmp_path_factory.mktemp("tokenizer") / "bpe"
    return train_sentencepiece(texts, 1024, out, user_symbols=recall_symbols())


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Any:
    """The tokenizer, loaded."""
    return load_tokenizer(tokenizer_dir)


@pytest.fixture(scope="session")
def filler(tokenizer: Any) -> FillerBank:
    """Filler from the standard library."""
    config = SourceConfig(kind="python_packages", packages=(TEXT_PACKAGE,))
    texts = (document.text for document in read_documents(config))
    return FillerBank.from_texts(texts, tokenizer, max_tokens=100_000)
