"""Long-context tasks: every subject answers the same prompts, and the scores in their bins."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evals.example import Example, Task, TooLongError, evidence_distance, prepare_prompt
from pipeline.context import StageContext
from pipeline.distributed import on_main
from pipeline.evaluating.foreign import ForeignMemory, donor_of
from pipeline.evaluating.journal import Journal, Question, digest_of
from pipeline.evaluating.prompt_file import PromptFile
from pipeline.evaluating.speaker import Sampling, Speaker
from pipeline.evaluating.statistics import (
    binned,
    bootstrap_stderr,
    by_length_and_depth,
    length_bins,
)
from pipeline.evaluating.work import Work, answer_all

Metrics = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A task's prompts, the same for every subject."""

    task: Task
    examples: tuple[Example, ...]
    """Those that fit, without the texts of their prompts."""
    prompts: PromptFile
    num_cut: tuple[int, ...]
    """Tokens cut out of each prompt."""
    refused: tuple[str, ...]
    """Why others do not fit."""

    @property
    def name(self) -> str:
        """`longbench/hotpotqa`."""
        return f"{self.task.suite}/{self.task.name}"


class TextTokenizer:
    """A Hugging Face tokenizer as the suites want one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Tokens, with the special ones that the tokenizer puts around a text."""
        return list(self._tokenizer.encode(text))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text


def prepare(
    task: Task,
    tokenizer: TextTokenizer,
    *,
    max_positions: int,
    chat_template: Callable[[str], str] | None,
    folder: Path,
) -> Prepared:
    """Encode a task's examples; those that the task refuses for their length are counted.

    Args:
        task: gives the examples.
        tokenizer: the model's.
        max_positions: tokens that prompt and answer may have together.
        chat_template: puts a user's message into the model's template; None for a base model.
        folder: where the prompts' tokens are kept while they are needed.

    Raises:
        ValueError: data of another suite, an empty list of answers, two examples of one id.
    """
    prompts = PromptFile(folder)
    examples, cuts, refused = [], [], []
    seen: set[str] = set()
    for example in task.examples():
        if example.id in seen:
            raise ValueError(
                f"{task.suite}/{task.name} has two examples with the id {example.id!r}; remove one"
            )
        seen.add(example.id)
        try:
            prompt = prepare_prompt(
                task,
                example,
                tokenizer,
                max_positions=max_positions,
                chat_template=chat_template,
            )
        except TooLongError as error:
            refused.append(str(error))
            continue
        examples.append(replace(example, prompt=""))
        prompts.append(prompt.tokens)
        cuts.append(prompt.num_cut)
    return Prepared(
        task=task,
        examples=tuple(examples),
        prompts=prompts,
        num_cut=tuple(cuts),
        refused=tuple(refused),
    )


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How every task is put to a subject."""

    context: StageContext
    sampling: Sampling
    num_samples: int
    batch_size: int
    resamples: int
    """Of the bootstrap."""
    window_size: int
    num_sinks: int


def predictions(
    prepared: Prepared,
    speaker: Speaker,
    foreign: ForeignMemory | None,
    asking: Asking,
    *,
    subject: str,
    key: str,
) -> list[list[str]]:
    """What a subject says: for each example its samplings.

    Args:
        prepared: the prompts.
        speaker: the subject's model.
        foreign: for `state_shuffled`: what puts another prompt's memory under a prompt.
        asking: sampling and batches.
        subject: its name.
        key: digest of what decides its answers, the prompts left out.
    """
    journal = Journal(
        asking.context.dir / "journal",
        subject,
        prepared.name,
        key,
        rank=asking.context.ranks.rank,
    )
    jobs = [
        (index, sample)
        for index in range(len(prepared.examples))
        for sample in range(asking.num_samples)
    ]
    asked = prepared.prompts.digests
    questions = [
        Question(
            id=prepared.examples[index].id,
            sample=sample,
            digest=digest_of(
                asked[index],
                None if foreign is None else asked[donor_of(index, len(asked))],
                prepared.examples[index].max_new_tokens,
                prepared.examples[index].stop,
                prepared.task.one_line,
            ),
        )
        for index, sample in jobs
    ]

    def compute(chosen: Sequence[int]) -> list[Any]:
        found: list[Any] = []
        for part in [chosen] if foreign is None else [[job] for job in chosen]:
            places = [jobs[job][0] for job in part]
            if foreign is not None:
                foreign.install(prepared.prompts[donor_of(places[0], len(asked))])
            found += speaker.speak(
                [prepared.prompts[place] for place in places],
                max_new_tokens=[prepared.examples[place].max_new_tokens for place in places],
                stop_texts=[prepared.examples[place].stop for place in places],
                sampling=asking.sampling,
                questions=[questions[job] for job in part],
                one_line=prepared.task.one_line,
            )
        return found

    work = Work(
        questions=questions,
        costs=[prepared.prompts.lengths[index] for index, _ in jobs],
        batch_size=asking.batch_size,
    )
    title = f"{asking.context.entry} {prepared.name} {subject}:"
    texts = answer_all(work, compute, journal, asking.context, title)
    grouped: list[list[str]] = [[] for _ in prepared.examples]
    for (index, _), text in zip(jobs, texts, strict=True):
        grouped[index].append(text)
    return grouped


def suite_metrics(prepared: Prepared, texts: Sequence[Sequence[str]], asking: Asking) -> Metrics:
    """A task's score with its error and counts, and the same by length, distance and depth.

    `n` examples count; of them `num_truncated` had lost their middle, and `num_empty` got no word
    (they score by the suite's rule, mostly 0). `num_refused` more were too long for a suite that
    cuts nothing. Where the evidence's place is known, `METRIC_outside_window` is the score of the
    `n_outside_window` examples whose evidence ends neither inside the window of the prompt's last
    token nor among the sinks; evidence that was cut out with the middle is not counted there.
    """
    task, examples = prepared.task, prepared.examples
    counts = {"n": float(len(examples)), "num_refused": float(len(prepared.refused))}
    if not examples:
        return {prepared.name: counts}
    scores = [
        statistics.fmean(task.score(text, example) for text in said)
        for example, said in zip(examples, texts, strict=True)
    ]
    stderr = bootstrap_stderr(
        scores, task.aggregate, resamples=asking.resamples, seed=asking.sampling.seed
    )
    lengths = prepared.prompts.lengths
    counts["num_truncated"] = float(sum(cut > 0 for cut in prepared.num_cut))
    counts["num_empty"] = float(sum(not any(text.strip() for text in said) for said in texts))
    counts["mean_prompt_tokens"] = statistics.fmean(lengths)
    found: Metrics = {
        prepared.name: {task.metric: task.aggregate(scores), "stderr": stderr, **counts},
        f"{prepared.name}_by_length": binned(lengths, scores, length_bins(lengths), task.aggregate),
    }
    distances = [
        evidence_distance(example, length, cut)
        for example, length, cut in zip(examples, lengths, prepared.num_cut, strict=True)
    ]
    outside = [
        score
        for score, distance, length in zip(scores, distances, lengths, strict=True)
        if distance is not None
        and distance >= asking.window_size
        and length - distance > asking.num_sinks
    ]
    if outside:
        found[prepared.name][f"{task.metric}_outside_window"] = task.aggregate(outside)
        found[prepared.name]["n_outside_window"] = float(len(outside))
    if known := [distance for distance in distances if distance is not None]:
        found[f"{prepared.name}_by_distance"] = binned(
            distances, scores, length_bins(known), task.aggregate
        )
    cells = by_length_and_depth(
        [example.length for example in examples],
        [example.depth for example in examples],
        scores,
        task.aggregate,
    )
    if cells:
        found[f"{prepared.name}_by_length_and_depth"] = cells
    return found


def describe(prepared: Prepared) -> dict[str, Any]:
    """What a reader of the results must know of a task."""
    task = prepared.task
    return {
        "suite": task.suite,
        "metric": task.metric,
        "prompts": task.prompts_source,
        "n": len(prepared.examples),
        "num_truncated": sum(cut > 0 for cut in prepared.num_cut),
        "num_refused": len(prepared.refused),
    }


def prepare_on_ranks(context: StageContext, make: Callable[[], Prepared]) -> Prepared:
    """Prepare a task on every rank; rank 0 first, which alone fetches data that are not there."""
    if context.ranks.world_size == 1:
        return make()
    first: list[Prepared] = []
    on_main(context.ranks, lambda: first.append(make()))
    return first[0] if first else make()


def binned_tasks(metrics: Mapping[str, Any], ending: str) -> Iterator[tuple[str, Any]]:
    """(task, bins) of a subject's metrics whose name ends so, `_by_length` for example."""
    for name, values in metrics.items():
        if name.endswith(ending) and "/" in name:
            yield name.removesuffix(ending), values
