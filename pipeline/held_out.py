"""The documents that `stage=evaluate` measures on: the eval split of the prepared shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.shards import Manifest, ShardRecord, file_sha256, read_shard
from evals.config import EvalConfig
from evals.documents import EvalDocument, documents_of, select


def read_documents(data_dir: Path, settings: EvalConfig) -> list[EvalDocument]:
    """Held-out documents of every kind asked for.

    Raises:
        ValueError: a shard is missing or not as the manifest says, or a kind has no documents.
    """
    manifest = Manifest.load(data_dir)
    shards = manifest.splits.get("eval", ())
    documents: list[EvalDocument] = []
    for kind in settings.kinds:
        of_kind = [shard for shard in shards if shard.kind == kind]
        names = dict.fromkeys(shard.source for shard in of_kind)
        documents += select(
            [_documents(data_dir, [s for s in of_kind if s.source == name]) for name in names],
            kind=kind,
            max_documents=settings.max_samples,
            min_length=settings.min_length or settings.window_size + 1,
            full_length=manifest.seq_length,
        )
    return documents


def _documents(data_dir: Path, shards: Sequence[ShardRecord]) -> Iterator[EvalDocument]:
    for shard in shards:
        path = data_dir / shard.path
        if not path.is_file():
            raise ValueError(f"shard {shard.path} is missing; run stage=prepare again")
        if file_sha256(path) != shard.sha256:
            raise ValueError(
                f"shard {shard.path} is not as the manifest says; delete it and run stage=prepare"
            )
        for sample in read_shard(path):
            yield from documents_of(
                sample.tokens, sample.loss_mask, sample.cu_seqlens.tolist(), sample.meta
            )
