"""`python -m pipeline.generate`: documents, questions, states and errors as a user meets them."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.generate import help_text, main, parse
from tests.pipeline_generate.conftest import DEMO

ROOT = Path(__file__).parents[2]

DOCUMENT = "# note: amber falcon\n" + "def add(a, b):\n    return a + b\n" * 40


@pytest.fixture
def ask(exported, capsys):
    """Runs the command line in this process: status, stdout, stderr."""

    def run(*words: str, model: Path = exported) -> tuple[int, str, str]:
        status = main([f"model={model}", "device=cpu", *words])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def document(tmp_path) -> Path:
    path = tmp_path / "document.txt"
    path.write_text(DOCUMENT)
    return path


def test_a_document_read_once_is_asked_again_later(ask, document, tmp_path):
    question, state = "prompt=# recall: amber", tmp_path / "a.state"
    whole = ask(f"prompt_file={document}", question, "max_new_tokens=12")
    assert whole[0] == 0
    saved = ask(f"prompt_file={document}", f"save_state={state}", "prefill_chunk=100")
    assert (saved[0], saved[1]) == (0, "")
    assert f"load_state={state}" in saved[2]
    again = ask(f"load_state={state}", question, "max_new_tokens=12")
    assert again[:2] == whole[:2]
    other = ask(f"load_state={state}", "prompt=def add(", "max_new_tokens=12")
    assert other[1] != whole[1]
    assert "read before" in other[2]


def test_questions_one_after_the_other_start_from_the_same_document(
    ask, document, tmp_path, monkeypatch
):
    questions = ["# recall: amber", "def add("]
    alone = [
        ask(f"prompt_file={document}", f"prompt={question}", "max_new_tokens=6")[1]
        for question in questions
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*questions, "", "left"])))
    _, said, _ = ask(f"prompt_file={document}", "interactive=true", "max_new_tokens=6")
    assert said == "".join(alone)


def test_the_report_tells_speed_memory_and_cache(ask, document):
    _, _, said = ask(f"prompt_file={document}", "max_new_tokens=4")
    for words in ("tokens/s", "wrote 4 tokens", "cache", "peak memory", "window 64", "kernels"):
        assert words in said
    sizes = []
    for number in (1, 4):
        document.write_text(DOCUMENT * number)
        _, _, said = ask(f"prompt_file={document}", "max_new_tokens=1")
        sizes.append(said.split("cache ")[1].split(";")[0])
    assert sizes[0] == sizes[1]


def test_the_chat_template_goes_around_document_and_question(ask, document, monkeypatch):
    from pipeline import generation

    seen: list[int] = []
    read = generation.Generator.read

    def recording(self, tokens, start=None, **more):
        seen.extend(tokens)
        return read(self, tokens, start, **more)

    monkeypatch.setattr(generation.Generator, "read", recording)
    document.write_text("one <|im_end|> two")
    assert ask(f"prompt_file={document}", "prompt=why?", "chat=true", "max_new_tokens=2")[0] == 0
    from data_prep.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(DEMO)
    assert tokenizer.decode(seen) == (
        "<|im_start|>user\none <|im_end|> two\n\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert seen.count(end) == 1  # the one in the text is letters


def test_text_from_standard_input_and_other_mixers(ask, document, monkeypatch):
    said = {}
    for mode in ("full", "swa", "allmem"):
        monkeypatch.setattr("sys.stdin", io.StringIO(DOCUMENT))
        status, said[mode], _ = ask("prompt_file=-", f"mode={mode}", "max_new_tokens=8")
        assert status == 0
    base = ask(f"prompt_file={document}", "max_new_tokens=8", model=DEMO)
    assert base[1] == said["full"]


def test_a_seed_draws_the_same_text_again(ask):
    asked = ("prompt=def ", "temperature=1.5", "max_new_tokens=12")
    first, again, other = (ask(*asked, f"seed={seed}")[1] for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prompt=x", "max_new_token=3"], "did you mean max_new_tokens"),
        (["prompt=x", "max_new_tokens=many"], "must be a whole number"),
        (["hello"], "is not key=value"),
        ([], "nothing to read"),
        (["prompt_file=absent.txt"], "is not there"),
        (["prompt=x", "mode=mamba2"], "needs weights of that branch"),
        (["prompt=x", "mode=swap"], "is not one of full, swa"),
        (["load_state=a", "prompt_file=b"], "leave one of them out"),
        (["prompt=x", "chunk_size=65"], "chunk_size=65 exceeds window_size=64"),
        (["prompt=x", "device=tpu"], "is not one of auto, cpu, cuda"),
    ],
)
def test_errors_are_one_line_with_a_mend(ask, words, said):
    status, out, error = ask(*words)
    assert (status, out) == (2, "")
    line = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(line) == 1
    assert said in line[0]


def test_models_that_are_not_there_are_refused(ask, tmp_path):
    assert "is not there" in ask("prompt=x", model=tmp_path / "absent")[2]
    assert "is a base model" in ask("prompt=x", "mode=allmem", model=DEMO)[2]
    (tmp_path / "configs").mkdir()
    assert "run a training stage" in ask("prompt=x", model=tmp_path)[2]


def test_help_names_every_option():
    text = help_text()
    for name in ("prompt_file", "save_state", "load_state", "interactive", "prefill_chunk"):
        assert f"  {name} (" in text
    assert parse(["model=m", "prompt=a=b: [c"]).prompt == "a=b: [c"


def test_an_interrupted_reading_saves_nothing(exported, tmp_path):
    document, state = tmp_path / "long.txt", tmp_path / "a.state"
    document.write_text(DOCUMENT * 400)
    command = [
        sys.executable, "-m", "pipeline.generate", f"model={exported}", f"prompt_file={document}",
        f"save_state={state}", "prefill_chunk=256", "device=cpu",
    ]  # fmt: skip
    program = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert program.stderr is not None
    line = program.stderr.readline()
    while not line.startswith("model:"):
        assert line, "the program ended early"
        line = program.stderr.readline()
    time.sleep(0.5)
    program.send_signal(signal.SIGINT)
    said = program.communicate(timeout=60)[1]
    assert program.returncode == 130
    assert "interrupted" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.txt"]
