"""Prompts of our own, for where upstream's cannot be read. Their scores compare with no table."""

from __future__ import annotations

_EN_QA = (
    "{context}\n\nUse the text above to answer in as few words as possible.\n"
    "Question: {input}\nAnswer:"
)
_ZH_QA = "{context}\n\n根据以上内容，用尽量少的字作答。\n问题：{input}\n答案："
_EN_SUMMARY = "{context}\n\nSummarise the text above in one page.\nSummary:"
_ZH_SUMMARY = "{context}\n\n用一段话概括以上内容。\n概括："
_OPTIONS = "A. {OPTION_A}\nB. {OPTION_B}\nC. {OPTION_C}\nD. {OPTION_D}\n"

LONGBENCH: dict[str, str] = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en"), _EN_QA),
    **dict.fromkeys(("hotpotqa", "2wikimqa", "musique"), _EN_QA),
    **dict.fromkeys(("multifieldqa_zh", "dureader"), _ZH_QA),
    **dict.fromkeys(("gov_report", "multi_news"), _EN_SUMMARY),
    "qmsum": _EN_QA,
    "vcsum": _ZH_SUMMARY,
    **dict.fromkeys(("trec", "triviaqa", "samsum", "lsht"), "{context}\n{input}"),
    "passage_count": (
        "{context}\n\nSome of the paragraphs above are repeated. How many different ones are "
        "there? Give the number only.\nNumber:"
    ),
    "passage_retrieval_en": (
        "{context}\n\nWhich of the paragraphs above does this abstract describe? Answer in the "
        "form Paragraph 1.\n{input}\nAnswer:"
    ),
    "passage_retrieval_zh": (
        "{context}\n\n以下摘要描述的是上面哪一段？按“段落1”的格式作答。\n{input}\n答案："
    ),
    "lcc": "{context}",
    "repobench-p": "{context}{input}",
}

INFINITEBENCH: dict[str, str] = {
    **dict.fromkeys(("passkey", "number_string", "kv_retrieval"), "{context}\n\n{input}\nAnswer:"),
    "longbook_sum_eng": _EN_SUMMARY,
    "longbook_qa_eng": _EN_QA.replace("{input}", "{question}"),
    "longbook_qa_chn": _ZH_QA.replace("{input}", "{question}"),
    "longbook_choice_eng": (
        "{context}\n\nQuestion: {question}\n" + _OPTIONS + "Letter of the right option:"
    ),
    "longdialogue_qa_eng": (
        "{context}\n\nOne character's name is hidden by $$MASK$$ in the script above. The name is"
    ),
    "math_find": "{context}\n\n{input}\nAnswer:",
    "math_calc": (
        "Write the value reached after each number of the expression, as a list.\n\n"
        "Expression: 2 + 5 - 1\nValues: [2, 7, 6]\n\nExpression: {context}\nValues:"
    ),
    "code_run": "{context}\n\n# The value of {func_call} is",
    "code_debug": (
        "{context}\n\nOne of these functions holds a mistake.\n"
        + _OPTIONS
        + "The correct option is:"
    ),
}

LVEVAL: dict[str, str] = {
    **dict.fromkeys(("hotpotwikiqa_mixup", "loogle_SD_mixup", "loogle_CR_mixup"), _EN_QA),
    **dict.fromkeys(("loogle_MIR_mixup", "multifieldqa_en_mixup", "factrecall_en"), _EN_QA),
    **dict.fromkeys(("multifieldqa_zh_mixup", "factrecall_zh", "cmrc_mixup"), _ZH_QA),
    **dict.fromkeys(("lic_mixup", "dureader_mixup"), _ZH_QA),
}
