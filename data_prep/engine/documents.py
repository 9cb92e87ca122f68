"""From a document to tokens: what every process does with a batch."""

from __future__ import annotations

import functools
import hashlib
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.chat import RefusedChatError, render_document
from data_prep.config import PrepareConfig, SourceConfig
from data_prep.dedup import Signer
from data_prep.engine.parts import Encoded, mask_spans
from data_prep.filters import build_steps, run_steps
from data_prep.loss import document_mask
from data_prep.readers import Document, Drop, UnitReport
from data_prep.tokenize import TextEncoder, TokenizerLike, end_of_text_id, pad_token_id


class PortableTokenizer:
    """A tokenizer for other processes, where each part is unpacked only if it is needed.

    Args:
        tokenizer: a fast tokenizer.
    """

    def __init__(self, tokenizer: TokenizerLike) -> None:
        self._parts: dict[str, Any] = {"full": tokenizer, "backend": tokenizer.backend_tokenizer}
        self._pickled: dict[str, bytes] = {}
        self.end_id = end_of_text_id(tokenizer)
        self.pad_id = pad_token_id(tokenizer)
        self.vocab_size = len(tokenizer)

    @property
    def full(self) -> TokenizerLike:
        """The `PreTrainedTokenizerFast`."""
        return self._part("full")

    @property
    def backend(self) -> Any:
        """Its `tokenizers.Tokenizer`, without importing `transformers`."""
        return self._part("backend")

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest type that holds all ids."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    def _part(self, name: str) -> Any:
        if name not in self._parts:
            self._parts[name] = pickle.loads(self._pickled[name])  # noqa: S301 - the parent's own
        return self._parts[name]

    def __getstate__(self) -> dict[str, Any]:
        for name, part in self._parts.items():
            if name not in self._pickled:
                self._pickled[name] = pickle.dumps(part)
        return {**vars(self), "_parts": {}}


@dataclass(frozen=True)
class Task:
    """Documents to encode, of one source."""

    source: int
    """Number of the source in the configuration."""
    documents: Sequence[Document]


@dataclass(frozen=True)
class Result:
    """Encoded documents and what the steps did."""

    documents: list[Encoded]
    report: UnitReport
    """Drops, cuts and refused conversations; nothing of the reader."""


def setup(config: PrepareConfig, tokenizer: PortableTokenizer) -> DocumentEncoder:
    """What a process of the pool calls first."""
    return DocumentEncoder(config, tokenizer)


class DocumentEncoder:
    """Steps, tokens, loss spans, hashes and signatures of documents.

    Args:
        config: the configuration.
        tokenizer: of the run.
    """

    def __init__(self, config: PrepareConfig, tokenizer: PortableTokenizer) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._encode = TextEncoder(tokenizer.backend, tokenizer.dtype)
        self._steps = functools.cache(lambda number: build_steps(config, config.sources[number]))
        self._signer = None if config.dedup.mode == "none" else Signer(config.dedup)

    def __call__(self, task: Task) -> Result:
        """The documents of a batch that are kept, in order."""
        report = UnitReport()
        source, steps = self._config.sources[task.source], self._steps(task.source)
        documents = list(task.documents)
        if steps:
            passed = (run_steps(steps, document, report) for document in documents)
            documents = [document for document in passed if document is not None]
        plain = iter(self._encode([d.text for d in documents if d.kind != "chat"]))
        encoded = []
        for document in documents:
            mask = None
            if document.kind == "chat":
                chat = self._chat(document, source, report)
                if chat is None:
                    continue
                tokens, mask = chat
            else:
                tokens = np.append(next(plain), self._encode_end())
                if source.loss == "response":
                    mask = document_mask(source, len(tokens))
            if self._within(len(tokens), source, document, report):
                encoded.append(self._finish(document, tokens, mask))
        return Result(encoded, report)

    def _encode_end(self) -> NDArray[Any]:
        return np.array([self._tokenizer.end_id], dtype=self._tokenizer.dtype)

    def _chat(
        self, document: Document, source: SourceConfig, report: UnitReport
    ) -> tuple[NDArray[Any], NDArray[np.uint8]] | None:
        try:
            chat = render_document(
                document,
                self._tokenizer.full,
                config=source.chat,
                seq_length=self._config.seq_length,
            )
        except RefusedChatError as error:
            report.num_documents -= 1  # the reader has counted it
            report.bad(str(error), document.id)
            return None
        if isinstance(chat, Drop):
            report.drop(chat, document)
            return None
        if chat.num_cut_tokens:
            report.cut(Drop("conversation too long", f"{chat.num_cut_tokens} tokens"), document)
        tokens = chat.tokens.astype(self._tokenizer.dtype)
        return tokens, document_mask(source, len(tokens), chat.loss_mask)

    def _within(
        self, length: int, source: SourceConfig, document: Document, report: UnitReport
    ) -> bool:
        low, high = source.filters.min_tokens, source.filters.max_tokens
        if length < low:
            report.drop(Drop("too few tokens", f"{length} of {low}"), document)
        elif high is not None and length > high:
            report.drop(Drop("too many tokens", f"{length}, at most {high}"), document)
        else:
            return True
        return False

    def _finish(
        self, document: Document, tokens: NDArray[Any], mask: NDArray[np.uint8] | None
    ) -> Encoded:
        signature = b""
        if self._signer is not None:
            signature = self._signer.signature(document).tobytes()
        digest = hashlib.blake2b(document.content.encode(), digest_size=16)
        return Encoded(
            id=document.id,
            tokens=tokens,
            spans=None if mask is None else mask_spans(mask),
            characters=document.num_characters,
            hash=digest.digest(),
            signature=signature,
        )
