"""InfiniteBench: 12 tasks (OpenBMB/InfiniteBench), prompts, lengths and scores as upstream."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from evals import infinitebench_scores as scores
from evals import own_prompts, upstream_prompts
from evals.data_files import Fields, Record, read_records
from evals.example import PROMPTS_LOCAL, PROMPTS_OWN, PROMPTS_UPSTREAM, Example, SuiteTask, checked

SUITE = "InfiniteBench"
PAPER: tuple[str, ...] = ("longbook_qa_eng", "longbook_qa_chn")
_OPTIONS = ("OPTION_A", "OPTION_B", "OPTION_C", "OPTION_D")


@dataclass(frozen=True)
class _Set:
    metric: str
    max_new_tokens: int
    harness_digest: str
    """Of the prompt for GPT-4, which lm-evaluation-harness has."""
    open_digest: str
    """Of the prompt for open models, `yarn_mistral_templates`."""


SETS: dict[str, _Set] = {
    "passkey": _Set("accuracy", 6, "a1d265268f61d448", "32a0f730f8746b1a"),
    "number_string": _Set("accuracy", 12, "7f84f8637ed441f6", "f519b51c90c40022"),
    "kv_retrieval": _Set("accuracy", 50, "afa97419dd69cd74", "afa97419dd69cd74"),
    "longbook_sum_eng": _Set("rouge_l_sum", 1200, "73463436d5d11a9a", "897e95259c5b906a"),
    "longbook_choice_eng": _Set("accuracy", 40, "7df117e8c610080b", "fddf5d8b4293a275"),
    "longbook_qa_eng": _Set("f1", 40, "3d0b2296b8712aaa", "6f24f4abaf415845"),
    "longbook_qa_chn": _Set("f1_zh", 40, "751d02a1547551de", "121d4332c1cc5ee0"),
    "longdialogue_qa_eng": _Set("accuracy", 40, "f6dadd7709f11572", "0483f9f01c709be7"),
    "math_find": _Set("accuracy", 3, "df2334891e94023e", "df2334891e94023e"),
    "math_calc": _Set("prefix", 30000, "", "ebf0b348e08e938f"),
    "code_run": _Set("accuracy", 5, "e566fbaa9fa7dbcb", "8cfbec4288592e77"),
    "code_debug": _Set("accuracy", 5, "94ffaeb0375fe01b", "e485a37d7c9c193f"),
}
_LETTERED = ("longbook_choice_eng", "code_debug")
_FIELDS: Fields = {"context": str, "input": str, "answer": (list, str, int, float)}


def names() -> list[str]:
    """The 12 tasks."""
    return list(SETS)


def build(name: str, *, data: str, prompts: str, max_examples: int) -> SuiteTask:
    """The task of a set; arguments and errors as in `evals.longbench.build`."""
    template, source = _template(name, prompts)
    return SuiteTask(
        name=name,
        suite="infinitebench",
        metric=SETS[name].metric,
        load=partial(_examples, name, data, template),
        scorer=partial(score, name),
        prompts_source=source,
        chat=source != PROMPTS_LOCAL,  # open models get their prompts bare
        decimals=None,
        mean_first=True,
        max_examples=max_examples,
    )


def score(name: str, prediction: str, example: Example) -> float:
    """Upstream's score of one prediction, 0 to 1."""
    return _RULES[name](prediction, example.answers)


_RULES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "passkey": lambda p, a: scores.first_integer(p, a[0]),
    "number_string": lambda p, a: scores.first_integer(p, a[0]),
    "kv_retrieval": lambda p, a: scores.whole_word(p, a[0]),
    "longbook_sum_eng": scores.rouge_l_sum,
    "longbook_choice_eng": scores.chosen_option,
    "longbook_qa_eng": scores.english_f1,
    "longbook_qa_chn": scores.chinese_f1,
    "longdialogue_qa_eng": lambda p, a: scores.whole_word_in_capitals(p, a[0]),
    "math_find": lambda p, a: scores.first_number(p, _number(a[0])),
    "math_calc": lambda p, a: scores.matching_prefix(p, [int(x) for x in a]),
    "code_run": lambda p, a: scores.last_integer(p, int(a[0])),
    "code_debug": lambda p, a: scores.faulty_function(p, a[0], a[1]),
}


def _number(text: str) -> float:
    return int(text) if re.fullmatch(r"-?\d+", text) else float(text)


def _examples(name: str, data: str, template: str) -> Iterator[Example]:
    required: Fields = {**_FIELDS, "options": list} if name in _LETTERED else _FIELDS
    paths = (f"{name}.jsonl", f"data/{name}.jsonl")
    for index, (where, record) in enumerate(
        read_records(data, paths, suite=SUITE, required=required)
    ):
        answers = _answers(name, record, where)
        prompt = template.format(**_parts(name, record, where))
        found = prompt.find(answers[0]) if name in _NEEDLES else -1
        example = Example(
            id=str(record.get("id", index)),
            prompt=prompt,
            answers=answers,
            max_new_tokens=SETS[name].max_new_tokens,
            length=len(record["context"]),
            depth=found / len(prompt) if found >= 0 else None,
        )
        yield checked(example, partial(score, name), where)


_NEEDLES = ("passkey", "number_string", "kv_retrieval")
"""Tasks whose answer stands once, word for word, in the context."""


def _answers(name: str, record: Record, where: str) -> tuple[str, ...]:
    """References as texts; for lettered tasks the right option's text and its letter."""
    value = record["answer"]
    values = value if isinstance(value, list) else [value]
    if values and isinstance(values[0], list):  # math_calc, in one of its forms
        values = values[0]
    if not values:
        raise ValueError(f"{where}: answer is an empty list; mend or remove the record")
    if not all(isinstance(x, (str, int, float)) for x in values):
        raise ValueError(f"{where}: answer holds other things than texts or numbers; mend the file")
    answers = tuple(str(x) for x in values)
    if name in ("math_find", "math_calc", "code_run"):
        form = r"-?\d+(\.\d+)?" if name == "math_find" else r"-?\d+"
        for answer in answers:
            if not re.fullmatch(form, answer):
                raise ValueError(f"{where}: answer {answer!r} of {name} is no number; wrong file?")
    if name in _LETTERED:
        return _lettered(answers, record["options"], where)
    return answers


def _lettered(answers: tuple[str, ...], options: Sequence[Any], where: str) -> tuple[str, ...]:
    if len(options) < 4:
        raise ValueError(f"{where} has {len(options)} options instead of 4; wrong file?")
    if len(answers) == 2 and answers[1] in tuple("ABCD"):
        return answers
    if len(answers) != 1 or answers[0] not in options[:4]:
        raise ValueError(f"{where}: answer {answers} is none of the options; mend the data file")
    return answers[0], "ABCD"[options.index(answers[0])]


def _parts(name: str, record: Record, where: str) -> dict[str, str]:
    """What a template may ask for."""
    question = record["input"]
    parts = {"context": record["context"], "input": question, "question": question}
    if name in _LETTERED:
        parts |= dict(zip(_OPTIONS, record["options"], strict=False))
    if name == "code_run":
        call = re.search(r"func_[0-9]+\(-?[0-9]+\)", question)
        if call is None:
            raise ValueError(f"{where}: input {question[:60]!r} calls no func_N(x); wrong file?")
        parts |= {"func": call.group(0).split("(")[0], "func_call": call.group(0)}
    if name == "math_find":
        if re.search(r"The .+ of", question) is None:
            raise ValueError(f"{where}: input {question[:60]!r} asks for no number; wrong file?")
        if upstream_prompts.lm_eval_installed():
            parts["prefix"] = _opening(question)
    return parts


def _opening(question: str) -> str:
    """The sentence before math_find's list, which upstream makes of the question."""
    text = str(_harness_functions().doc_to_text_math_find({"context": "", "input": question}))
    return text.partition("\n\n")[0]


def _template(name: str, folder: str) -> tuple[str, str]:
    if name == "math_find":
        if not upstream_prompts.lm_eval_installed():  # its opening is in no copy's prompts
            return own_prompts.INFINITEBENCH[name], PROMPTS_OWN
        upstream_prompts.check_prompts(
            {name: _opening("The largest number of it")},
            {name: "134b3c232ade05d0"},
            source="lm-evaluation-harness",
            mend="install lm_eval==0.4.13",
        )
    if folder:
        path = upstream_prompts.file_in_copy(
            folder, "src/prompt.py", upstream="OpenBMB/InfiniteBench", key="infinitebench_prompts"
        )
        found = upstream_prompts.literals(path).get("yarn_mistral_templates", {})
        upstream_prompts.check_prompts(
            found,
            {name: SETS[name].open_digest},
            source=str(path),
            mend="take commit 88b3daa of OpenBMB/InfiniteBench",
        )
        return str(found[name]), PROMPTS_LOCAL
    if not upstream_prompts.lm_eval_installed() or not SETS[name].harness_digest:
        return own_prompts.INFINITEBENCH[name], PROMPTS_OWN
    text = _harness_template(name)
    upstream_prompts.check_prompts(
        {name: text},
        {name: SETS[name].harness_digest},
        source="lm-evaluation-harness",
        mend="install lm_eval==0.4.13 or name a copy of OpenBMB/InfiniteBench in "
        "eval.suites.infinitebench_prompts",
    )
    return text, PROMPTS_UPSTREAM


def _harness_template(name: str) -> str:
    """The harness's prompt with its fields named as in upstream's template."""
    if name == "math_find":  # nothing but its parts
        return "{prefix}\n\n{context}\n\n{input}"
    functions = {
        **{"longbook_choice_eng": "doc_to_text_longbook_choice"},
        **{"longdialogue_qa_eng": "doc_to_text_longdialogue"},
        **{"code_run": "doc_to_text_code_run", "code_debug": "doc_to_text_code_debug"},
    }
    if name in functions:
        document = {
            "context": "{context}",
            "input": "func_1(2)" if name == "code_run" else "{question}",
            "options": [f"{{{option}}}" for option in _OPTIONS],
        }
        text = str(getattr(_harness_functions(), functions[name])(document))
        return text.replace("func_1(2)", "{func_call}").replace("func_1", "{func}")
    short = name.removesuffix("g") if name.endswith("_eng") else name
    task = upstream_prompts.lm_eval_yaml(f"infinitebench/infinitebench_{short}.yaml")
    text = str(task["description"]) + str(task["doc_to_text"])
    question = "{question}" if name.startswith("longbook_qa") else "{input}"
    return text.replace("{{context}}", "{context}").replace("{{input}}", question)


@cache
def _harness_functions() -> Any:
    path = upstream_prompts.lm_eval_folder() / "infinitebench" / "utils.py"
    spec = importlib.util.spec_from_file_location("_lm_eval_infinitebench", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} cannot be loaded; install lm_eval==0.4.13")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
