"""Documents to score, taken out of packed samples, and put together in batches of equal length."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals.recall import Query


@dataclass(frozen=True, kw_only=True)
class EvalDocument:
    """One document to score, on its own in its row."""

    id: str
    kind: str
    """`text`, `recall` or `chat`."""
    tokens: NDArray[np.int32]
    """[T]."""
    targets: NDArray[np.bool_]
    """[T]; true where the token at this index counts in the loss."""
    queries: list[Query] = field(default_factory=list)


def documents_of(
    tokens: NDArray[np.int32],
    loss_mask: NDArray[np.uint8],
    borders: Sequence[int],
    meta: Mapping[str, Any],
) -> list[EvalDocument]:
    """The documents that a sample of a shard is packed from, its padding left out.

    The loss of a recall document counts its answers, whatever the loss mask of training says.

    Args:
        tokens: [T].
        loss_mask: [T]; 1 where the token at this index is a loss target.
        borders: `cu_seqlens`, from 0 to T.
        meta: the sample's `meta.json`.

    Raises:
        ValueError: a query lies outside the documents, or lacks a field.
    """
    queries = [Query.from_meta(query) for query in meta.get("queries", ())]
    end_of_text = len(tokens) - int(meta.get("num_padding", 0))
    ids = list(meta.get("ids", ())) or [str(meta.get("source", "document"))]
    documents, placed = [], 0
    for index, (start, end) in enumerate(itertools.pairwise(borders)):
        end = min(end, end_of_text)
        if end - start < 2:  # nothing is predicted in it
            continue
        inside = [_shifted(q, start) for q in queries if start <= q.evidence_start < end]
        inside = [q for q in inside if q.answer_end <= end - start]
        placed += len(inside)
        targets = loss_mask[start:end].astype(bool)
        if meta["kind"] == "recall" and inside:
            targets = np.zeros(end - start, dtype=bool)
            for query in inside:
                targets[query.answer_start : query.answer_end] = True
        targets[0] = False  # no position before it in the document
        documents.append(
            EvalDocument(
                id=f"{ids[index]}" if index < len(ids) else f"{ids[-1]}+{index}",
                kind=str(meta["kind"]),
                tokens=tokens[start:end],
                targets=targets,
                queries=inside,
            )
        )
    if placed != len(queries):
        raise ValueError(
            f"{len(queries) - placed} of {len(queries)} queries of sample {ids[0]} cross a "
            "document's border; prepare the shards again"
        )
    return documents


def _shifted(query: Query, start: int) -> Query:
    return Query(
        answer_start=query.answer_start - start,
        answer_end=query.answer_end - start,
        evidence_start=query.evidence_start - start,
        evidence_end=query.evidence_end - start,
    )


def select(
    sources: Sequence[Iterable[EvalDocument]],
    *,
    kind: str,
    max_documents: int,
    min_length: int,
    full_length: int,
) -> list[EvalDocument]:
    """The first documents of a kind, its sources in turn, full length before shorter ones.

    Reads no further than it must: it stops once it has enough documents of full length.

    Args:
        sources: documents of this kind in the order of each source's shards.
        kind: for the message.
        max_documents: how many to take; 0 takes all.
        min_length: shorter documents are left out.
        full_length: tokens of the longest document there can be.

    Raises:
        ValueError: no document is long enough.
    """
    found: list[EvalDocument] = []
    num_full = 0
    for turn in itertools.zip_longest(*sources):
        for document in turn:
            if document is not None and len(document.tokens) >= min_length:
                found.append(document)
                num_full += len(document.tokens) >= full_length
        if max_documents and num_full >= max_documents:
            break
    if not found:
        raise ValueError(
            f"no held-out {kind} document has {min_length} tokens or more; lower "
            f"eval.min_length, prepare longer documents, or leave {kind} out of eval.kinds"
        )
    return sorted(found, key=lambda d: -len(d.tokens))[: max_documents or None]


def batches_of(documents: Iterable[EvalDocument], batch_size: int) -> list[list[EvalDocument]]:
    """Batches of one kind and one length; no document is alone if another one fits it.

    Neighbours go to different batches, because consecutive windows of one long text stand side by
    side in the shards, and the state of every document is exchanged with that of the next one in
    its batch by the control `state_shuffled`.
    """
    groups: dict[tuple[str, int], list[EvalDocument]] = {}
    for document in documents:
        groups.setdefault((document.kind, len(document.tokens)), []).append(document)
    batches = []
    for group in groups.values():
        count = -(-len(group) // batch_size)
        if batch_size > 1 < count and len(group) // count < 2:  # a batch of one would be left
            count -= 1
        batches += [group[start::count] for start in range(count)]
    return batches
