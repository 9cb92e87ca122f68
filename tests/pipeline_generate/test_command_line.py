"""`python -m pipeline.generate`: documents, questions, states and errors as a user meets them."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from pipeline.generate import help_text, main, parse
from pipeline.generation_text import Streamer
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
        (["prompt=x", "dtype=int4"], "is not one of auto, float32, bfloat16"),
        (["prompt=x", "max_new_tokens=["], "'max_new_tokens=[' cannot be read"),
        (["prompt=x", "prompt=y"], "prompt is given twice"),
        (["prompt=x", "seed=99999999999999999999"], "choose a smaller number"),
        (["prompt=a\udcffb"], "prompt is not UTF-8 text (at character 1)"),
        (["prompt=x", "cuda_graph=true"], "cuda_graph=true needs a CUDA device, this is cpu"),
        (["prompt_file=-", "interactive=true"], "name a file, or save_state=FILE first"),
    ],
)
def test_errors_are_one_line_with_a_mend(ask, words, said):
    status, out, error = ask(*words)
    assert (status, out) == (2, "")
    line = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(line) == 1
    assert said in line[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prompt=x", "temperature=-1"], "temperature=-1.0 is not in [0, inf)"),
        (["prompt=x", "temperature=.nan"], "temperature=nan is not in [0, inf)"),
        (["prompt=x", "top_p=0"], "top_p=0.0 is not in (0, 1]"),
        (["prompt=x", "prefill_chunk=0"], "prefill_chunk=0 is below 1"),
        (["prompt_file=."], "prompt_file=. is not there, or no file"),
        (["prompt=x", "load_state=absent.state"], "is not there, or no file; save one"),
        (["prompt=x", "save_state=."], "name one in a folder that is yours"),
        (["prompt=x", f"save_state={__file__}/a.state"], "name one in a folder that is yours"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(ask, tmp_path, words, said):
    assert said in ask(*words, model=tmp_path / "absent")[2]


def test_texts_that_are_empty_or_no_text_are_refused(ask, tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    for content, said in ((b"", "is empty; name another"), (b"a\xff", "is not UTF-8 text")):
        file.write_bytes(content)
        assert said in ask(f"prompt_file={file}")[2]
        for errors in ("strict", "surrogateescape"):  # as locales differ
            stdin = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", errors=errors)
            monkeypatch.setattr("sys.stdin", stdin)
            assert said in ask("prompt_file=-")[2]


def test_a_prompt_is_answered_before_the_questions(ask, document, monkeypatch):
    words = (f"prompt_file={document}", "max_new_tokens=6")
    both = [ask(*words, f"prompt={prompt}")[1] for prompt in ("# recall: amber", "def add(")]
    monkeypatch.setattr("sys.stdin", io.StringIO("def add(\n"))
    assert ask(*words, "prompt=# recall: amber", "interactive=true")[1] == "".join(both)


def test_a_reader_that_goes_away_ends_the_program_quietly(ask, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)  # as head does
    with open(writing, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        status, _, said = ask("prompt=def add(", "max_new_tokens=4")
        print("what is still in the buffer goes nowhere", file=stdout)
    assert status == 141
    assert "error" not in said


def test_spaces_before_words_and_lines_are_streamed_with_llamas_kind_of_tokenizer():
    words = ["<unk>", "▁def", "▁f", ":", "\n", "▁", "▁return", "▁x", "é", "<0xC3>", "<0xA9>"]
    model = models.BPE(
        vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>"
    )
    backend = Tokenizer(model)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = [words.index(word) for word in ("▁def", "▁f", ":", "\n", "▁", "▁", "▁return", "▁x")]
    for read in range(len(ids)):
        said: list[str] = []
        streamer = Streamer(tokenizer, said.append, before=ids[:read][-1:])
        for token in ids[read:]:
            streamer.add(token)
        streamer.end()
        whole, head = tokenizer.decode(ids), tokenizer.decode(ids[:read])
        assert head + "".join(said) == whole
    said = []
    streamer = Streamer(tokenizer, said.append, before=[words.index("<0xC3>")])
    streamer.add(words.index("<0xA9>"))
    streamer.add(words.index("é"))
    streamer.end()
    assert "".join(said).endswith("é")


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
    document.write_text(DOCUMENT * 2000)
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
    time.sleep(0.3)
    program.send_signal(signal.SIGINT)
    said = program.communicate(timeout=60)[1]
    assert program.returncode == 130
    assert "interrupted" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.txt"]
