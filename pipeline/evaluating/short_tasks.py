"""The tasks of lm-evaluation-harness behind the short tasks of `evals.short`.

Data come from the hub by the harness's own names, or, with `eval.data_dir`, from that folder alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evals.short import SHORT_TASKS, ShortTask
from pipeline.context import StageContext
from pipeline.evaluating.journal import Journal
from pipeline.evaluating.short_data import find_file, find_repository, read_rows
from pipeline.evaluating.speaker import Sampling, Speaker
from pipeline.evaluating.statistics import bootstrap_stderr
from pipeline.evaluating.work import Compute, Work, answer_all

if TYPE_CHECKING:
    from lm_eval.api.task import Task as HarnessTask

Place = tuple[str, int, int]
"""Task of the harness, question, instruction of the question."""
INSTALL = "pip install 'allmem[evals]', or the packages lm_eval, langdetect and immutabledict"


def require_harness(names: Sequence[str]) -> None:
    """Refuse short tasks whose packages are not installed.

    Raises:
        ValueError: a package, or the words that IFEval needs, is missing.
    """
    needed = ["lm_eval"] if names else []
    if "ifeval" in names:
        needed += ["langdetect", "immutabledict", "nltk"]
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"eval.short_tasks needs the package {package}; {INSTALL}")
    if "ifeval" in names:
        import nltk

        try:
            nltk.data.find("tokenizers/punkt_tab")
        except LookupError as error:
            raise ValueError(
                "ifeval needs the words of nltk's punkt_tab; python -m nltk.downloader punkt_tab, "
                "or set NLTK_DATA to a folder that has tokenizers/punkt_tab"
            ) from error


def load_harness_tasks(
    name: str, data_dir: Path | None, *, num_fewshot: int | None = None
) -> dict[str, HarnessTask]:
    """The harness's tasks of one short task, one for each subject of a group.

    Raises:
        ValueError: `data_dir` has no data of it.
    """
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    short = SHORT_TASKS[name]
    root = Path(lm_eval.tasks.__file__).parent
    manager = TaskManager(
        include_defaults=False, include_path=[root / folder for folder in short.folders]
    )
    random.seed(0)  # GPQA's choices are put in order by these, as the harness's own command does
    np.random.seed(0)
    changes = {} if data_dir is None else _local(name, short, data_dir)
    if changes:
        # a group's folders hold its members alone; changes of a whole group reach none of them
        group = short.harness in manager.all_groups
        members = manager.all_subtasks if group else [short.harness]
        children = [{"task": member, **changes} for member in members]
        loaded = manager.load([{"group": f"local_{name}", "task": children}])
    else:
        loaded = manager.load([short.harness])
    shots = short.num_fewshot if num_fewshot is None else num_fewshot
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=1234)
    tasks: dict[str, HarnessTask] = dict(loaded["tasks"])
    return tasks


def local_place(name: str, data_dir: Path) -> Path:
    """The copy of the hub's repository, or the single file, that has a short task's data.

    Raises:
        ValueError: `data_dir` has neither.
    """
    short = SHORT_TASKS[name]
    place = find_repository(data_dir, short.dataset) or find_file(data_dir, short.files)
    if place is None:
        looked = [short.dataset.rsplit("/", 1)[-1] + "/", *short.files]
        raise ValueError(
            f"eval.data_dir={data_dir} has no data of {name} (looked for {', '.join(looked)}); "
            f"put a copy of the hub's {short.dataset} there, or leave {name} out of "
            "eval.short_tasks"
        )
    return place


def _local(name: str, short: ShortTask, data_dir: Path) -> dict[str, Any]:
    """What of a task's configuration makes it read the folder."""
    place = local_place(name, data_dir)
    if place.is_dir():
        return {"dataset_path": str(place)}
    rows = read_rows(place, name)

    def custom_dataset(**_: Any) -> Mapping[str, Any]:
        from datasets import Dataset, DatasetDict

        return DatasetDict({short.split: Dataset.from_list(rows)})

    splits = {f"{part}_split": None for part in ("training", "validation", "test")}
    splits[f"{short.split}_split"] = short.split  # type: ignore[assignment]
    return {"custom_dataset": custom_dataset, **splits}


def run_short_task(
    name: str,
    tasks: Mapping[str, HarnessTask],
    speaker: Speaker,
    context: StageContext,
    *,
    subject: str,
    key: str,
    limit: int,
    batch_size: int,
    seed: int,
    resamples: int,
    chat: bool,
) -> dict[str, float]:
    """A subject's metrics of one short task, in percent, with errors and counts.

    Args:
        name: of `evals.short`.
        tasks: of `load_harness_tasks`, the same ones for every subject.
        speaker: the subject's model.
        context: ranks, and who is told.
        subject: its name.
        key: digest of what decides its answers.
        limit: first examples that are used; 0 takes all.
        batch_size: requests computed together.
        seed: of samplings and bootstrap.
        resamples: of the bootstrap.
        chat: whether a task that wants the chat template gets it.

    Returns:
        `acc` for example, `stderr` of the first metric by bootstrap over questions, `n`, and
        `num_truncated`, requests whose beginning did not fit.
    """
    from lm_eval.evaluator import evaluate

    from pipeline.evaluating.harness_model import HarnessModel

    short = SHORT_TASKS[name]
    journal = Journal(
        context.dir / "journal", subject, f"short/{name}", key, rank=context.ranks.rank
    )
    sampling = None
    if short.temperature is not None:
        sampling = Sampling(temperature=short.temperature, top_p=short.top_p, seed=seed)

    def ask(work: Work, compute: Compute, title: str) -> list[Any]:
        whole = f"{context.entry} short/{name} {subject}, {title}:"
        return answer_all(work, compute, journal, context, whole)

    rows: dict[str, dict[Place, list[float]]] = {}
    truncated = 0
    for sample in range(short.num_samples):
        model = HarnessModel(speaker, ask, sampling=sampling, sample=sample, batch_size=batch_size)
        with quiet():
            found = evaluate(
                model,
                {"tasks": dict(tasks), "groups": {}, "group_map": {}},
                limit=limit or None,
                bootstrap_iters=0,
                apply_chat_template=short.chat and chat,
                log_samples=True,
            )
        truncated += model.num_truncated
        _collect(short, found["samples"], rows)
    return _summary(short, rows, truncated, seed=seed, resamples=resamples)


def _collect(
    short: ShortTask, samples: Mapping[str, Any], rows: dict[str, dict[Place, list[float]]]
) -> None:
    """Add each question's score, by metric and place; IFEval's have one for each instruction."""
    for metric in short.metrics:
        column, _, chosen = metric.partition(",")
        for task, records in samples.items():
            for record in records:
                if record["filter"] != chosen:
                    continue
                value = record[column]
                for number, score in enumerate(value if isinstance(value, list) else [value]):
                    place = (task, record["doc_id"], number)
                    rows.setdefault(metric, {}).setdefault(place, []).append(float(score))


def _summary(
    short: ShortTask,
    rows: Mapping[str, Mapping[Place, list[float]]],
    truncated: int,
    *,
    seed: int,
    resamples: int,
) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric in short.metrics:
        scores = [statistics.fmean(values) for values in rows[metric].values()]
        found[short.label(metric)] = _percent(scores)
        if metric == short.metrics[0]:
            found["stderr"] = bootstrap_stderr(scores, _percent, resamples=resamples, seed=seed)
            found["n"] = float(len(scores))
    found["num_samples"] = float(short.num_samples)
    found["num_truncated"] = float(truncated)
    return found


def _percent(scores: Sequence[float]) -> float:
    return 100 * statistics.fmean(scores)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the harness's log lines and bars, made for its own command line, out of ours."""
    import datasets
    import lm_eval.api.task

    logger, bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    level, bar = logger.level, lm_eval.api.task.tqdm
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bar
        if not bars:
            datasets.enable_progress_bars()
