"""LV-Eval: 11 sets at 5 lengths (infinigence/LVEval), prompts, lengths and scores as upstream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from evals import longbench_scores, lveval_scores, own_prompts, upstream_prompts
from evals.data_files import Fields, read_records, texts
from evals.example import PROMPTS_LOCAL, PROMPTS_OWN, Example, SuiteTask, checked

SUITE = "LV-Eval"
LEVELS: tuple[str, ...] = ("16k", "32k", "64k", "128k", "256k")


@dataclass(frozen=True)
class _Set:
    metric: str
    max_new_tokens: int
    prompt_digest: str


SETS: dict[str, _Set] = {
    "hotpotwikiqa_mixup": _Set("gated_f1", 64, "c8b75e076f014e87"),
    "loogle_SD_mixup": _Set("gated_f1", 64, "dea26bcf80f439ac"),
    "loogle_CR_mixup": _Set("gated_f1", 64, "dea26bcf80f439ac"),
    "loogle_MIR_mixup": _Set("gated_f1", 64, "dea26bcf80f439ac"),
    "multifieldqa_en_mixup": _Set("gated_f1", 64, "dea26bcf80f439ac"),
    "multifieldqa_zh_mixup": _Set("gated_f1_zh", 64, "7427f4ffbc307206"),
    "factrecall_en": _Set("f1", 16, "95b795444370c103"),
    "factrecall_zh": _Set("f1_zh", 16, "d71ee6028140eeb4"),
    "cmrc_mixup": _Set("gated_f1_zh", 64, "5017b8321e45769f"),
    "lic_mixup": _Set("gated_f1_zh", 64, "a546c25719e3ac10"),
    "dureader_mixup": _Set("rouge_l_zh", 64, "5017b8321e45769f"),
}
_RULES: dict[str, Callable[[str, str, str | None], float]] = {
    "gated_f1": lveval_scores.english_gated_f1,
    "gated_f1_zh": lveval_scores.chinese_gated_f1,
    "f1": lambda p, a, keywords: longbench_scores.english_f1(p, a),
    "f1_zh": lambda p, a, keywords: longbench_scores.chinese_f1(p, a),
    "rouge_l_zh": lambda p, a, keywords: lveval_scores.chinese_filtered_rouge_l(p, a),
}
_FIELDS: Fields = {"input": str, "context": str, "answers": list, "length": int, "dataset": str}


def names() -> list[str]:
    """All `SET_LEVEL`, set by set."""
    return [f"{name}_{level}" for name in SETS for level in LEVELS]


def build(name: str, *, data: str, prompts: str, max_examples: int) -> SuiteTask:
    """The task of a set at a level; arguments and errors as in `evals.longbench.build`."""
    base, _, level = name.rpartition("_")
    template, source = _template(base, prompts)
    return SuiteTask(
        name=name,
        suite="lveval",
        metric=SETS[base].metric,
        load=partial(_examples, base, level, data, template),
        scorer=partial(score, base),
        prompts_source=source,
        max_examples=max_examples,
    )


def score(name: str, prediction: str, example: Example) -> float:
    """Score against the first answer, 0 to 1; `name` is without its level."""
    rule = _RULES[SETS[name].metric]
    return max(0.0, rule(prediction, example.answers[0], example.extra.get("answer_keywords")))


def _examples(name: str, level: str, data: str, template: str) -> Iterator[Example]:
    file = f"{name}_{level}.jsonl"
    for index, (where, record) in enumerate(
        read_records(
            data, (file, f"{name}/{file}"), suite=SUITE, required=_FIELDS, archives=(f"{name}.zip",)
        )
    ):
        keywords = record.get("answer_keywords")
        if keywords is not None and not isinstance(keywords, str):
            raise ValueError(f"{where}: answer_keywords is not a text; mend the data file")
        example = Example(
            id=str(record.get("_id", index)),
            prompt=template.format(context=record["context"], input=record["input"]),
            answers=texts(record, "answers", where),
            max_new_tokens=SETS[name].max_new_tokens,
            length=record["length"],
            extra={"answer_keywords": keywords} if keywords else {},
        )
        yield checked(example, partial(score, name), where)


def _template(name: str, folder: str) -> tuple[str, str]:
    if not folder:
        return own_prompts.LVEVAL[name], PROMPTS_OWN
    path = upstream_prompts.file_in_copy(
        folder, "config.py", upstream="infinigence/LVEval", key="lveval_prompts"
    )
    found = upstream_prompts.literals(path).get("DATASET_PROMPT", {})
    upstream_prompts.check_prompts(
        found,
        {name: SETS[name].prompt_digest},
        source=str(path),
        mend="take commit 63e7ae9 of infinigence/LVEval",
    )
    return str(found[name]), PROMPTS_LOCAL
