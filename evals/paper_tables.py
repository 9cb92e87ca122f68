"""Results in the shape of the paper's Tables 1 to 3, with its published numbers, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evals import longbench, lveval, published
from evals.table import COLUMNS, MISSING, ROW_TITLES, format_value, human_tokens

OWN_PROMPTS = "†"
REFUSED = "‡"
FIRST_ONLY = "§"
PUBLISHED = "published, other hardware/data"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One row of a comparison: a mixer or control of a run."""

    run: str
    """Label of the run; empty where only one run is shown."""
    name: str
    title: str
    metrics: Mapping[str, Mapping[str, float]]
    tasks: Mapping[str, Mapping[str, Any]]
    """What the run's results say of each task: metric, prompts, counts."""
    config: Mapping[str, Any]

    @property
    def label(self) -> str:
        """Run and mixer."""
        return f"{self.run}: {self.title}" if self.run else self.title

    def score(self, task: str) -> float | None:
        """The task's headline score, 0 to 100; None where it was not measured."""
        about = self.tasks.get(task)
        return None if about is None else self.metrics.get(task, {}).get(about["metric"])

    def cell(self, task: str, *, error: bool = False) -> str:
        """The score as printed, marked where prompts are our own or examples are left out."""
        value = self.score(task)
        if value is None:
            return MISSING
        text = f"{value:.2f}"
        if error and (stderr := self.metrics[task].get("stderr")):
            text += f" ± {stderr:.2f}"
        return text + self.marks(task)

    def marks(self, task: str) -> str:
        """Signs after a score: own prompts, examples that were refused, only the first examples."""
        own = self.tasks[task].get("prompts") == "own"
        refused = self.metrics[task].get("num_refused", 0) > 0
        marks = (OWN_PROMPTS if own else "") + (REFUSED if refused else "")
        return marks + (FIRST_ONLY if self._limited(task) else "")

    def _limited(self, task: str) -> bool:
        """Whether only the first examples were asked."""
        if task.startswith("short/"):
            return bool(self.config.get("short_limit"))
        return bool((self.config.get("suites") or {}).get("max_examples"))


def subjects_of(
    runs: Mapping[str, Mapping[str, Any]],
    *,
    mixers: Sequence[str] | None = None,
    controls: bool = False,
) -> list[Subject]:
    """Mixers (and controls) of each run, in the runs' order.

    Args:
        runs: results by label.
        mixers: only these; None takes all.
        controls: whether the memory's controls are rows too.
    """
    found = []
    for label, results in runs.items():
        kinds = [("mixers", results["mixers"])]
        if controls:
            kinds.append(("controls", results.get("controls", {})))
        for kind, members in kinds:
            for name, metrics in members.items():
                if kind == "mixers" and mixers is not None and name not in mixers:
                    continue
                found.append(
                    Subject(
                        run=label if len(runs) > 1 else "",
                        name=name,
                        title=ROW_TITLES.get(name, name),
                        metrics=metrics,
                        tasks=results.get("tasks", {}),
                        config=results["config"],
                    )
                )
    return found


def paper_tables(subjects: Sequence[Subject], *, held_out: bool = True) -> str:
    """All tables for which any subject has a number, each under its heading.

    Args:
        subjects: the rows.
        held_out: whether loss and recall on held-out documents are among them.
    """
    parts = [
        _held_out(subjects) if held_out else "",
        _short_tasks(subjects),
        _longbench(subjects),
        _long(subjects),
        _all_tasks(subjects),
    ]
    shown = [part for part in parts if part]
    notes = []
    text = "\n".join(shown)
    if OWN_PROMPTS in text:
        notes.append(f"{OWN_PROMPTS} prompts: own; not comparable with published numbers.")
    if REFUSED in text:
        notes.append(f"{REFUSED} examples that the model has too few positions for are left out.")
    if FIRST_ONLY in text:
        notes.append(f"{FIRST_ONLY} the first examples of the data set only.")
    if PUBLISHED in text:
        notes.append(f"Rows and columns marked *{PUBLISHED}*: {published.SOURCE}.")
    return "\n".join([*shown, *(f"{note}\n" for note in notes)])


def _held_out(subjects: Sequence[Subject]) -> str:
    """Loss, recall, speed and cache: the table of one run, for several."""
    rows = []
    for subject in subjects:
        values = [subject.metrics.get(c.task, {}).get(c.metric) for c in COLUMNS]
        if any(value is not None for value in values):
            cells = [format_value(v, c.unit) for v, c in zip(values, COLUMNS, strict=True)]
            rows.append([subject.label, _setting(subject), *cells])
    if not rows:
        return ""
    titles = [
        c.title.format(length="documents' length", long=human_tokens(131072)) for c in COLUMNS
    ]
    return _table("Held-out documents", ["", "window, sinks, chunk", *titles], rows)


def _setting(subject: Subject) -> str:
    keys = ("window_size", "num_sinks", "chunk_size")
    return ", ".join(f"{subject.config.get(key, MISSING)}" for key in keys)


def _short_tasks(subjects: Sequence[Subject]) -> str:
    shown = [name for name in published.SHORT if _any(subjects, [f"short/{name}"])]
    if not shown:
        return ""
    headings = ["", *(published.SHORT[name][0] for name in shown)]
    rows = []
    for size in published.SIZES:
        for place, mixer in enumerate(("full", "allmem")):
            scores = [published.SHORT[name][1][size][place] for name in shown]
            rows.append([_published(size, mixer), *(f"{score:.2f}" for score in scores)])
    rows += [
        [s.label, *(s.cell(f"short/{name}") for name in shown)]
        for s in subjects
        if _any([s], [f"short/{name}" for name in shown])
    ]
    return _table("Table 1: short tasks", headings, rows, f"Published: {published.SHORT_SETTING}.")


def _longbench(subjects: Sequence[Subject]) -> str:
    tasks = [f"longbench/{name}" for name in longbench.PAPER]
    if not _any(subjects, tasks):
        return ""
    rows = [
        [_published(size, mixer), *[MISSING] * len(tasks), f"{score:.2f}"]
        for size in published.SIZES
        for mixer, score in zip(published.MIXERS, published.LONGBENCH_AVERAGE[size], strict=True)
    ]
    for subject in subjects:
        if _any([subject], tasks):
            cells = [subject.cell(task) for task in tasks]
            rows.append([subject.label, *cells, _mean_cell(subject, tasks)])
    headings = ["", *longbench.PAPER, "average"]
    note = f"Published: {published.LONGBENCH_SETTING}. An average needs all six sets."
    return _table("Table 2: LongBench", headings, rows, note)


def _long(subjects: Sequence[Subject]) -> str:
    singles = [task for task in published.LONG if "/" in task]
    sets = [f"lveval/{name}_128k" for name in lveval.SETS]
    if not _any(subjects, [*singles, *sets]):
        return ""
    rows = [
        [_published(size, mixer), *(f"{published.LONG[t][size][i]:.2f}" for t in published.LONG)]
        for size in published.SIZES
        for i, mixer in enumerate(published.MIXERS)
    ]
    for subject in subjects:
        if _any([subject], [*singles, *sets]):
            cells = [subject.cell(task) for task in singles]
            rows.append([subject.label, *cells, _mean_cell(subject, sets)])
    headings = ["", *(task.partition("/")[2] for task in singles), "LV-Eval 128k, average"]
    note = f"Published: {published.LONG_SETTING}. LV-Eval's average needs its 11 sets."
    return _table("Table 3: InfiniteBench and LV-Eval", headings, rows, note)


def _all_tasks(subjects: Sequence[Subject]) -> str:
    """Every task with its standard error, a column for each subject."""
    tasks = dict.fromkeys(task for s in subjects for task in s.tasks if s.score(task) is not None)
    if not tasks:
        return ""
    shown = [s for s in subjects if any(s.score(task) is not None for task in tasks)]
    rows = []
    for task in tasks:
        about = next(s.tasks[task] for s in shown if task in s.tasks)
        counts = {
            int(s.metrics[task]["n"])
            for s in shown
            if s.score(task) is not None and "n" in s.metrics[task]
        }
        number = "–".join(str(n) for n in sorted({min(counts), max(counts)})) if counts else MISSING
        rows.append([task, about["metric"], number, *(s.cell(task, error=True) for s in shown)])
    headings = ["task", "metric", "examples", *(s.label for s in shown)]
    note = "Score, 0 to 100, ± one standard error by bootstrap over the examples."
    return _table("All tasks", headings, rows, note, numbers_from=2)


def _mean_cell(subject: Subject, tasks: Sequence[str]) -> str:
    """The mean over tasks, if all were measured; else how many were."""
    scores = [score for task in tasks if (score := subject.score(task)) is not None]
    if len(scores) < len(tasks):
        return f"{MISSING} ({len(scores)} of {len(tasks)})" if scores else MISSING
    marks = dict.fromkeys(mark for task in tasks for mark in subject.marks(task))
    return f"{sum(scores) / len(scores):.2f}{''.join(marks)}"


def _published(size: str, mixer: str) -> str:
    return f"paper {size}: {mixer} (*{PUBLISHED}*)"


def _any(subjects: Sequence[Subject], tasks: Sequence[str]) -> bool:
    return any(s.score(task) is not None for s in subjects for task in tasks)


def _table(
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    note: str = "",
    *,
    numbers_from: int = 1,
) -> str:
    return "\n".join([f"## {title}\n", *_lines(headings, rows, numbers_from), "", *_note(note)])


def _note(note: str) -> list[str]:
    return [note, ""] if note else []


def _lines(
    headings: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int
) -> Iterator[str]:
    widths = [max(len(line[i]) for line in [headings, *rows]) for i in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(w) if i < numbers_from else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    yield line([cell.replace("|", "/") for cell in headings])
    rule = [
        "-" * (w + 2) if i < numbers_from else "-" * (w + 1) + ":" for i, w in enumerate(widths)
    ]
    yield "|" + "|".join(rule) + "|"
    for row in rows:
        yield line([cell.replace("|", "/") for cell in row])
