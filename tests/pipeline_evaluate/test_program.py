"""Kept answers fall with the program that gave them, and with nothing else."""

import ast
from pathlib import Path

from pipeline.config import PROJECT_ROOT
from pipeline.evaluating.program import answering_files, meaning

PACKAGES = ("kernels", "allmem_hf", "allmem_megatron", "data_prep", "evals", "pipeline")
BEFORE_OR_BESIDE = {
    # in the key or in the question's digest: configuration, weights' places, tokenizer
    *("allmem_megatron.config", "pipeline.config", "pipeline.schema", "pipeline.train_schema"),
    *("pipeline.checkpoint", "pipeline.retention", "pipeline.lineage", "pipeline.fingerprint"),
    *("pipeline.evaluation", "pipeline.fetch", "pipeline.tokenizer", "data_prep.tokenizer"),
    *("data_prep.tokenize",),
    # the training model only carries weights from files to the model that answers
    *("allmem_megatron.initialise", "allmem_megatron.model", "allmem_megatron.sharding"),
    # who is asked when, and where answers are kept
    *("pipeline.evaluating.journal", "pipeline.evaluating.work"),
}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return {name for name in found if name.partition(".")[0] in PACKAGES}


def test_what_answering_modules_import_answers_too_or_is_named_here() -> None:
    files = list(answering_files(PROJECT_ROOT))
    names = {".".join(path.relative_to(PROJECT_ROOT).with_suffix("").parts) for path in files}
    names |= {name.removesuffix(".__init__") for name in names}
    assert "pipeline.generation" in names
    assert "kernels.ttt_memory.reference" in names
    reached = set().union(*map(imports, files))
    assert reached - names - BEFORE_OR_BESIDE == set()


def test_words_about_a_program_are_not_the_program() -> None:
    source = '"""Adds."""\ndef add(a, b):\n    """One more."""\n    return a + b  # the sum\n'
    reworded = "def add(a, b):\n    # otherwise said\n    return (a +\n            b)\n"
    assert meaning(source) == meaning(reworded)
    assert meaning(source) != meaning(source.replace("a + b", "a - b"))
    assert meaning("x = 'text'") != meaning("x = 'other'")
