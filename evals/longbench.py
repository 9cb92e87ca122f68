"""LongBench v1: 21 sets (THUDM/LongBench), prompts, lengths and scores as upstream."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from evals import longbench_scores as scores
from evals import own_prompts, upstream_prompts
from evals.data_files import Fields, read_records, texts
from evals.example import PROMPTS_LOCAL, PROMPTS_OWN, PROMPTS_UPSTREAM, Example, SuiteTask, checked
from evals.rouge_l import rouge_l

SUITE = "LongBench"
PAPER: tuple[str, ...] = ("dureader", "hotpotqa", "musique", "narrativeqa", "qmsum", "triviaqa")
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")
"""Sets of which only the first line of a prediction counts."""
NO_CHAT = (*FIRST_LINE, "lcc", "repobench-p")
"""Sets whose prompts are not put into a chat template."""


@dataclass(frozen=True)
class _Set:
    metric: str
    max_new_tokens: int
    prompt_digest: str


SETS: dict[str, _Set] = {
    "narrativeqa": _Set("f1", 128, "aada7ed24b06abac"),
    "qasper": _Set("f1", 128, "0fbdd123fe7f83d6"),
    "multifieldqa_en": _Set("f1", 64, "20b4666a2de8a1f7"),
    "multifieldqa_zh": _Set("f1_zh", 64, "344b3a4e557cd547"),
    "hotpotqa": _Set("f1", 32, "9ec4ae308865bd0c"),
    "2wikimqa": _Set("f1", 32, "9ec4ae308865bd0c"),
    "musique": _Set("f1", 32, "9ec4ae308865bd0c"),
    "dureader": _Set("rouge_l_zh", 128, "ae53329f51b17908"),
    "gov_report": _Set("rouge_l", 512, "91c25d585b189ced"),
    "qmsum": _Set("rouge_l", 512, "dca23b678fe0183b"),
    "multi_news": _Set("rouge_l", 512, "2af3f28c40b902e6"),
    "vcsum": _Set("rouge_l_zh", 512, "3e5d8241bc9b512e"),
    "trec": _Set("classification", 64, "0eff8bebdba99d91"),
    "triviaqa": _Set("f1", 32, "00a802e6377e72fc"),
    "samsum": _Set("rouge_l", 128, "a68d884234907eef"),
    "lsht": _Set("classification", 64, "f3edabdf7fae53d6"),
    "passage_count": _Set("count", 32, "986550b6c61009c6"),
    "passage_retrieval_en": _Set("retrieval", 32, "39b96b7fa52bdd2a"),
    "passage_retrieval_zh": _Set("retrieval_zh", 32, "c1e2346e245eb365"),
    "lcc": _Set("code_similarity", 64, "6a1f24cf0bb83cd9"),
    "repobench-p": _Set("code_similarity", 64, "ee9ec182ea5ffeb7"),
}

_PAIRS: dict[str, Callable[[str, str], float]] = {
    "f1": scores.english_f1,
    "f1_zh": scores.chinese_f1,
    "rouge_l": rouge_l,
    "rouge_l_zh": scores.chinese_rouge_l,
    "count": scores.share_of_numbers,
    "retrieval": lambda p, a: scores.share_of_numbers(p, scores.numbered("Paragraph ", a)),
    "retrieval_zh": lambda p, a: scores.share_of_numbers(p, scores.numbered("段落", a)),
    "code_similarity": scores.code_similarity,
}
_FIELDS: Fields = {
    **{"input": str, "context": str, "answers": list, "length": int},
    **{"dataset": str, "all_classes": (list, type(None)), "_id": str},
}
_MENDED = {
    "triviaqa": ("{context}\n{input}", "{context}\n\n{input}"),
    "samsum": ("{context}\n{input}", "{context}\n\n{input}"),
    "passage_count": ("answer is:", "answer is: "),
    "passage_retrieval_en": ("answer is:", "answer is: "),
    "lcc": ("of code:", "of code:\n"),
    "repobench-p": ("of code:", "of code:\n"),
}
"""White space that the harness (0.4.13) has otherwise than upstream."""


def names() -> list[str]:
    """The 21 sets, in upstream's order."""
    return list(SETS)


def build(name: str, *, data: str, prompts: str, max_examples: int) -> SuiteTask:
    """The task of a set.

    Args:
        name: one of `names()`.
        data: folder, zip or name on the hub.
        prompts: folder of a copy of upstream, or empty.
        max_examples: 0 takes all.

    Raises:
        ValueError: the prompts that can be read are not upstream's.
    """
    template, source = _template(name, prompts)
    return SuiteTask(
        name=name,
        suite="longbench",
        metric=SETS[name].metric,
        load=partial(_examples, name, data, template),
        scorer=partial(score, name),
        prompts_source=source,
        chat=name not in NO_CHAT,
        one_line=name == "samsum",
        max_examples=max_examples,
    )


def score(name: str, prediction: str, example: Example) -> float:
    """Best score over the answers, 0 to 1."""
    if name in FIRST_LINE:
        prediction = scores.first_line(prediction)
    if SETS[name].metric == "classification":
        classes = example.extra["all_classes"]
        return max(scores.classification(prediction, a, classes) for a in example.answers)
    rule = _PAIRS[SETS[name].metric]
    return max(rule(prediction, answer) for answer in example.answers)


def _examples(name: str, data: str, template: str) -> Iterator[Example]:
    paths = (f"{name}.jsonl", f"data/{name}.jsonl")
    for where, record in read_records(
        data, paths, suite=SUITE, required=_FIELDS, archives=("data.zip",)
    ):
        if record["dataset"] in SETS and record["dataset"] != name:
            raise ValueError(
                f"{where} is a record of {record['dataset']}, not of {name}; "
                "give the files their own names"
            )
        classes = tuple(record["all_classes"] or ())
        if SETS[name].metric == "classification" and not classes:
            raise ValueError(f"{where} has no all_classes, which {name} needs; mend the data file")
        example = Example(
            id=record["_id"],
            prompt=template.format(context=record["context"], input=record["input"]),
            answers=texts(record, "answers", where),
            max_new_tokens=SETS[name].max_new_tokens,
            length=record["length"],
            extra={"all_classes": classes} if classes else {},
        )
        yield checked(example, partial(score, name), where)


def _template(name: str, folder: str) -> tuple[str, str]:
    wanted = {name: SETS[name].prompt_digest}
    if folder:
        file = "LongBench/config/dataset2prompt.json"
        path = upstream_prompts.file_in_copy(
            folder, file, upstream="THUDM/LongBench", key="longbench_prompts"
        )
        found = json.loads(path.read_text(encoding="utf-8"))
        upstream_prompts.check_prompts(
            found, wanted, source=str(path), mend="take commit 2e00731 of THUDM/LongBench"
        )
        return str(found[name]), PROMPTS_LOCAL
    if not upstream_prompts.lm_eval_installed():
        return own_prompts.LONGBENCH[name], PROMPTS_OWN
    text = upstream_prompts.lm_eval_yaml(f"longbench/{name}.yaml")["doc_to_text"]
    text = text.replace("{{context}}", "{context}").replace("{{question}}", "{input}")
    if upstream_prompts.digest(text) != SETS[name].prompt_digest and name in _MENDED:
        text = text.replace(*_MENDED[name])
    upstream_prompts.check_prompts(
        {name: text},
        wanted,
        source="lm-evaluation-harness",
        mend="install lm_eval==0.4.13 or name a copy of THUDM/LongBench in "
        "eval.suites.longbench_prompts",
    )
    return text, PROMPTS_UPSTREAM
