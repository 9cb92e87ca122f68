"""The documents that `stage=evaluate` measures on: the eval split of the prepared shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.shards import MANIFEST_NAME, Manifest, ShardRecord, read_samples
from data_prep.storage import Storage, shards_of
from evals.config import EvalConfig
from evals.documents import EvalDocument, documents_of, select
from pipeline.config import resolve_path


def documents_dir(settings: EvalConfig, data_dir: Path) -> Path:
    """The folder of shards whose eval split is measured: of `eval.documents`, or the run's own.

    Raises:
        ValueError: `eval.documents` is no run with shards.
    """
    if settings.documents is None:
        return data_dir
    folder = resolve_path(settings.documents) / "prepare"
    if not (folder / MANIFEST_NAME).is_file():
        raise ValueError(
            f"eval.documents={settings.documents} has no prepare/{MANIFEST_NAME}; name the run.dir "
            "of a finished stage=prepare, or leave it out to measure on this run's documents"
        )
    return folder


def read_documents(data_dir: Path, settings: EvalConfig) -> list[EvalDocument]:
    """Held-out documents of every kind asked for.

    Raises:
        ValueError: a shard is missing or not as the manifest says, or a kind has no documents.
    """
    manifest = Manifest.load(data_dir)
    storage = shards_of(manifest, data_dir)
    shards = manifest.splits.get("eval", ())
    documents: list[EvalDocument] = []
    for kind in settings.kinds:
        of_kind = [shard for shard in shards if shard.kind == kind]
        names = dict.fromkeys(shard.source for shard in of_kind)
        documents += select(
            [_documents(storage, [s for s in of_kind if s.source == name]) for name in names],
            kind=kind,
            max_documents=settings.max_samples,
            min_length=settings.min_length or settings.window_size + 1,
            full_length=manifest.seq_length,
        )
    return documents


def _documents(storage: Storage, shards: Sequence[ShardRecord]) -> Iterator[EvalDocument]:
    for shard in shards:
        try:
            stream = storage.open(shard.path)
        except FileNotFoundError:
            raise ValueError(f"shard {shard.path} is missing; run stage=prepare again") from None
        with stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != shard.sha256:
                raise ValueError(
                    f"shard {shard.path} is not as the manifest says; delete it and run "
                    "stage=prepare"
                )
            stream.seek(0)
            for sample in read_samples(stream, shard.path):
                yield from documents_of(
                    sample.tokens, sample.loss_mask, sample.cu_seqlens.tolist(), sample.meta
                )
