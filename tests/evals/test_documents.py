"""Documents come out of packed samples whole, and go into batches that the controls can use."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from evals.documents import EvalDocument, batches_of, documents_of, select
from evals.recall import Query


def sample_meta(**fields: Any) -> dict[str, Any]:
    return {"kind": "text", "ids": ["x", "y"], "source": "s", **fields}


def test_a_packed_sample_gives_its_documents_without_padding() -> None:
    tokens = np.arange(10, dtype=np.int32)
    documents = documents_of(
        tokens,
        np.ones(10, dtype=np.uint8),
        [0, 4, 7, 10],
        sample_meta(num_padding=3),
    )
    assert [d.id for d in documents] == ["x", "y"]
    assert [d.tokens.tolist() for d in documents] == [[0, 1, 2, 3], [4, 5, 6]]
    assert [d.targets.tolist() for d in documents] == [[False] + [True] * 3, [False] + [True] * 2]


def test_queries_move_with_their_document_and_set_the_targets_of_recall() -> None:
    spans = {"evidence_start": 4, "evidence_end": 5, "answer_start": 6, "answer_end": 8}
    (first, second) = documents_of(
        np.arange(9, dtype=np.int32),
        np.ones(9, dtype=np.uint8),
        [0, 3, 9],
        sample_meta(kind="recall", queries=[{**spans, "distance": 2}]),
    )
    assert first.queries == []
    assert second.queries == [Query(evidence_start=1, evidence_end=2, answer_start=3, answer_end=5)]
    assert second.targets.tolist() == [False, False, False, True, True, False]


def test_a_query_across_a_border_is_refused() -> None:
    spans = {"evidence_start": 1, "evidence_end": 2, "answer_start": 6, "answer_end": 8}
    with pytest.raises(ValueError, match="1 of 1 queries of sample x"):
        documents_of(
            np.arange(9, dtype=np.int32),
            np.ones(9, dtype=np.uint8),
            [0, 3, 9],
            sample_meta(queries=[spans]),
        )


def document(name: str, length: int, kind: str = "text") -> EvalDocument:
    return EvalDocument(
        id=name,
        kind=kind,
        tokens=np.zeros(length, dtype=np.int32),
        targets=np.ones(length, dtype=bool),
    )


def test_batches_hold_one_kind_and_length_and_leave_none_alone() -> None:
    documents = [document(str(i), 4) for i in range(5)]
    documents += [document("long", 6), document("recall", 4, "recall")]
    batches = batches_of(documents, 2)
    assert [[d.id for d in batch] for batch in batches] == [
        ["0", "2", "4"],
        ["1", "3"],
        ["long"],
        ["recall"],
    ]


@pytest.mark.parametrize("count", range(2, 20))
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_batches_hold_each_document_once(count: int, batch_size: int) -> None:
    documents = [document(str(i), 4) for i in range(count)]
    batches = batches_of(documents, batch_size)
    assert sorted(d.id for batch in batches for d in batch) == sorted(d.id for d in documents)
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= batch_size + (batch_size == 2)
    assert min(sizes) >= min(batch_size, 2)


def choose(*sources: list[EvalDocument], **changes: int) -> list[str]:
    settings = {"max_documents": 3, "min_length": 3, "full_length": 8, **changes}
    return [d.id for d in select([iter(s) for s in sources], kind="text", **settings)]


def test_sources_take_turns_and_full_documents_come_first() -> None:
    first = [document("a0", 5), document("a1", 8), document("a2", 2)]
    second = [document("b0", 8), document("b1", 6), document("b2", 8)]
    assert choose(first, second) == ["b0", "a1", "b2"]
    assert choose(first, second, max_documents=4) == ["b0", "a1", "b2", "b1"]
    assert choose(first, second, max_documents=0) == ["b0", "a1", "b2", "b1", "a0"]


def test_no_shard_is_read_after_enough_documents() -> None:
    def endless() -> Iterator[EvalDocument]:
        while True:
            yield document("x", 8)

    assert len(select([endless()], kind="text", max_documents=5, min_length=1, full_length=8)) == 5


def test_a_kind_without_long_documents_is_refused() -> None:
    with pytest.raises(ValueError, match="no held-out text document has 9 tokens"):
        choose([document("a", 8)], min_length=9)
