"""Answers survive a killed process, torn lines and another number of ranks; stale ones do not."""

from pathlib import Path

import pytest

from pipeline.evaluating.journal import Answer, Journal, Question, digest_of
from pipeline.evaluating.work import shares


def answer(number: int, value: str = "yes", asked: str = "q") -> Answer:
    question = Question(id=f"example-{number}", sample=0, digest=digest_of(asked))
    return Answer(question=question, value=value)


def test_what_was_appended_is_read_by_any_rank(tmp_path: Path) -> None:
    for rank in (0, 1):
        journal = Journal(tmp_path, "allmem", "longbench/qasper", "k" * 64, rank=rank)
        journal.append([answer(rank, "Ünï\ud800code\n")])
        journal.close()
    found = Journal(tmp_path, "allmem", "longbench/qasper", "k" * 64, rank=5).read()
    assert found == {answer(0).question: "Ünï\ud800code\n", answer(1).question: "Ünï\ud800code\n"}


def test_a_torn_last_line_is_dropped_and_written_over(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "allmem", "task", "key", rank=0)
    journal.append([answer(0), answer(1)])
    journal.close()
    journal.path.write_bytes(journal.path.read_bytes()[:-9])
    assert list(journal.read()) == [answer(0).question]
    journal.append([answer(2)])
    assert list(journal.read()) == [answer(0).question, answer(2).question]


def test_another_key_question_or_sample_finds_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "allmem", "task", "key", rank=0)
    journal.append([answer(0)])
    assert Journal(tmp_path, "allmem", "task", "other", rank=0).read() == {}
    assert Journal(tmp_path, "swa", "task", "key", rank=0).read() == {}
    asked_anew = answer(0, asked="another prompt").question
    assert asked_anew not in journal.read()
    assert Question(id="example-0", sample=1, digest=digest_of("q")) not in journal.read()


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "allmem", "task", "key", rank=0)
    journal.append([answer(0)])
    journal.path.write_bytes(b"{broken}\n" + journal.path.read_bytes())
    with pytest.raises(ValueError, match=r"rank_00000\.jsonl line 1 is no answer .*remove"):
        journal.read()


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_each_question_goes_to_one_rank_and_the_load_is_even(num_ranks: int) -> None:
    costs = [(7 * i) % 23 + 1 for i in range(40)]
    parts = shares(costs, num_ranks, batch_size=3)
    batches = [batch for part in parts for batch in part]
    assert sorted(i for batch in batches for i in batch) == list(range(40))
    assert all(len(batch) <= 3 for batch in batches)
    loads = [sum(costs[i] for batch in part for i in batch) for part in parts]
    assert max(loads) - min(loads) <= 3 * max(costs)


def test_few_questions_are_spread_over_all_ranks() -> None:
    assert [sum(map(len, part)) for part in shares([5] * 8, 2, batch_size=8)] == [4, 4]
    assert shares([], 2, batch_size=8) == [[], []]
