"""`python -m pipeline.generate model=DIR [key=value …]`: continue a text, or ask about a document.

A document of any length is read in pieces, with a progress bar; the answer goes to stdout as it
comes, everything else to stderr. The state after a document can be saved and asked again later.
"""

from __future__ import annotations

import os
import resource
import sys
import textwrap
import time
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import yaml

from allmem_hf.state_allmem import load_state, save_state
from pipeline.config import build
from pipeline.console import Reporter
from pipeline.generation import Generator, Reading
from pipeline.generation_choice import check_sampling
from pipeline.generation_input import check_files, check_text, read_text
from pipeline.generation_open import MixerChoice, Opened, open_model
from pipeline.generation_text import Prompter, Streamer
from pipeline.help import field_docs
from pipeline.survival import EXIT_USER_ERROR

EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE
_SHOWN_FROM = 1024  # tokens: shorter texts need no progress bar


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the command line."""

    model: Path
    """An exported folder, a run's folder (its export, or what its stages trained), or a base model:
    a Hugging Face folder or a .gguf file."""
    prompt: str = ""
    """Text to continue, or the question about the document of prompt_file."""
    prompt_file: str | None = None
    """A text file of any length that is read before the prompt; - for standard input."""
    chat: bool | None = None
    """Put the tokenizer's chat template around document and question. Default: when load_state
    names a state, as it was made; else false."""
    max_new_tokens: int = 256
    """At most so many tokens are written."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; 0.7 or so varies."""
    top_p: float = 1.0
    """With a temperature: draw among the likeliest tokens of this probability together."""
    seed: int = 0
    """The same seed draws the same text."""
    save_state: Path | None = None
    """Save what the model remembers of the document to this file, before the prompt is read."""
    load_state: Path | None = None
    """Begin where a saved state ended, in the place of a document."""
    interactive: bool = False
    """After the prompt, if there is one: one question a line from standard input, each about the
    same document; an empty line ends."""
    mode: str | None = None
    """full, swa, mamba2 or allmem. Default: the model's own; full for a base model."""
    window_size: int | None = None
    """Attention window in tokens. Default: the model's own; 4096 for a base model."""
    num_sinks: int | None = None
    """First tokens that stay visible. Default: the model's own; 128 for a base model."""
    chunk_size: int | None = None
    """Tokens between two writes of the memory. Default: the model's own."""
    prefill_chunk: int = 4096
    """Tokens that are read at once: more is faster on a GPU, less needs less memory."""
    cuda_graph: bool = False
    """Start the kernels of a written token together, as a CUDA graph, once the window is full."""
    device: typing.Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    dtype: typing.Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on CUDA, float32 on the CPU."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} is negative; set it to 0 or more"
            )
        if self.prefill_chunk < 1:
            raise ValueError(
                f"prefill_chunk={self.prefill_chunk} is below 1; set it to 1 or more, such as 4096"
            )
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed={self.seed} is not in [0, 2^63); choose a smaller number")
        check_sampling(self.temperature, self.top_p)
        if self.interactive and self.prompt_file == "-":
            raise ValueError(
                "prompt_file=- reads standard input to its end, and interactive=true reads the "
                "questions there; name a file, or save_state=FILE first"
            )
        if self.load_state and self.prompt_file:
            raise ValueError("load_state stands in the place of prompt_file; leave one of them out")
        if not (self.prompt or self.prompt_file or self.load_state or self.interactive):
            raise ValueError(
                "there is nothing to read; give prompt=TEXT, prompt_file=PATH or load_state=FILE"
            )


def help_text() -> str:
    """Text of `--help`."""
    docs = field_docs(Options)
    lines = [
        "Usage: python -m pipeline.generate model=DIR [key=value …]",
        "",
        'Examples:  model=runs/demo/export prompt="def add(a, b):"',
        "           model=DIR prompt_file=book.txt prompt='Who is the thief?' chat=true",
        "           model=DIR prompt_file=book.txt chat=true save_state=book.state",
        "           model=DIR load_state=book.state prompt='Who is the thief?'",
        "           model=DIR load_state=book.state interactive=true",
        "",
    ]
    for item in fields(Options):
        default = "required" if item.name == "model" else f"default {item.default!r}"
        lines.append(f"  {item.name} ({default})")
        text = docs[item.name]
        lines += textwrap.wrap(text, 92, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def parse(words: Sequence[str]) -> Options:
    """Options from `key=value` words.

    Raises:
        ValueError: a word without `=`, an unknown key (the nearest is named), a key that comes
            twice, a wrong value.
    """
    hints = typing.get_type_hints(Options)
    values: dict[str, typing.Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} is not key=value; write prompt='…' for a text (see --help)")
        if key in values:
            raise ValueError(f"{key} is given twice; leave one of them out")
        is_text = key in hints and str in (hints[key], *typing.get_args(hints[key]))
        is_path = Path in (hints.get(key), *typing.get_args(hints.get(key)))
        try:
            values[key] = value if is_text or is_path else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(
                f"{word!r} cannot be read; give a number, true, false or a name"
            ) from error
    options: Options = build(Options, values)
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        the exit status: 0, 2 (an error to mend), 130 (interrupted) or 141 (who read the answer has
        gone, as `| head` does).
    """
    given = list(sys.argv[1:] if words is None else words)
    if not given or {"-h", "--help", "help"} & set(given):
        print(help_text())
        return 0
    try:
        _Session(parse(given)).run()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        return EXIT_BROKEN_PIPE
    except torch.OutOfMemoryError as error:
        print(
            f"error: the GPU has too little memory ({str(error).splitlines()[0]}); set a smaller "
            "prefill_chunk, or dtype=bfloat16",
            file=sys.stderr,
        )
        return EXIT_USER_ERROR
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("\ninterrupted; no state was saved after this point", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


class _Session:
    """One call of the program: a document is read or loaded, then asked."""

    def __init__(self, options: Options) -> None:
        self.options = options
        check_text("prompt", options.prompt)
        check_files(options.prompt_file, options.load_state, options.save_state)
        self.reporter = Reporter(every_s=10.0)
        self.device = _device(options.device)
        if options.cuda_graph and self.device.type != "cuda":
            raise ValueError(
                f"cuda_graph=true needs a CUDA device, this is {self.device}; leave it out"
            )
        self.opened: Opened = open_model(
            options.model,
            MixerChoice(
                mode=options.mode,
                window_size=options.window_size,
                num_sinks=options.num_sinks,
                chunk_size=options.chunk_size,
            ),
            device=self.device,
            dtype=_dtype(options.dtype, self.device),
        )
        if options.cuda_graph and self.opened.model.config.attention_window is None:
            raise ValueError(
                "cuda_graph=true needs a window, whose steps are all alike; this is full attention:"
                " leave cuda_graph out, or set mode=swa or allmem"
            )
        self.generator = Generator(
            self.opened.model, prefill_chunk=options.prefill_chunk, cuda_graph=options.cuda_graph
        )
        self.read_tokens, self.read_s = 0, 0.0
        self.new_tokens, self.decode_s = 0, 0.0
        self.cache_bytes = 0

    def run(self) -> None:
        """Read, save, answer, report."""
        options = self.options
        kernels = self.opened.model.kernel_backends()
        words = ", ".join(f"{part} {backend}" for part, backend in kernels.items())
        self.reporter.say(f"model: {self.opened.description}, on {self.device}; kernels: {words}")
        start, chat = self._loaded() if options.load_state else (None, bool(options.chat))
        prompter = Prompter(tokenizer=self.opened.tokenizer, chat=chat)
        has_document = options.load_state is not None
        if start is None:
            has_document = bool(options.prompt_file)
            document = read_text(options.prompt_file) if options.prompt_file else ""
            alone = not options.prompt_file and (options.save_state or not chat)
            ids = prompter.document(options.prompt if alone else document)
            rest = "" if alone else options.prompt
            start = self._read(ids, None) if ids else None
        else:
            rest = options.prompt
        if options.save_state is not None:
            self._save(start, chat)
        if rest or not (options.save_state or options.interactive):
            self._answer(prompter.question(rest, after_document=has_document), start)
        if options.interactive:
            self._ask(prompter, start, has_document)
        self._report()

    def _loaded(self) -> tuple[Reading, bool]:
        assert self.options.load_state is not None
        state = load_state(self.options.load_state, self.opened.model)
        made = bool(state.note.get("chat", False))
        if self.options.chat not in (None, made):
            raise ValueError(
                f"chat={self.options.chat} differs from the state's chat={made}; leave chat out"
            )
        reading = Reading(hidden=state.hidden, cache=state.cache)
        self.cache_bytes = reading.cache.num_bytes
        self.reporter.say(f"state: {reading.num_tokens:,} tokens, read before")
        return reading, made

    def _save(self, start: Reading | None, chat: bool) -> None:
        if start is None:
            raise ValueError("there is no document to save a state of; give prompt_file=PATH")
        assert self.options.save_state is not None
        note = {"chat": chat, "source": self.options.prompt_file}
        path = self.options.save_state
        size = save_state(path, self.opened.model, start.cache, start.hidden, note)
        self.reporter.say(
            f"saved: {path}, {start.num_tokens:,} tokens in {_size(size)}; ask again with "
            f"load_state={path}"
        )

    def _read(self, ids: list[int], start: Reading | None) -> Reading:
        """Read tokens with a progress bar."""
        began = time.perf_counter()
        shown = self.reporter if len(ids) >= _SHOWN_FROM else Reporter(enabled=False)
        with shown.progress("reading", len(ids)) as advance:
            reading = self.generator.read(
                ids, start, advance=lambda done, total: advance(done, "tokens")
            )
            self._wait()
        self.read_s += time.perf_counter() - began
        self.read_tokens += len(ids)
        self.cache_bytes = reading.cache.num_bytes
        return reading

    def _answer(self, ids: list[int], start: Reading | None) -> None:
        """Read a question, then write its answer to stdout."""
        if ids or start is None:
            start = self._read(ids, start)
        streamer = Streamer(self.opened.tokenizer, _say, before=ids[-1:])
        began = time.perf_counter()
        (generation,) = self.generator.generate(
            [[]],
            starts=[start],
            max_new_tokens=self.options.max_new_tokens,
            stop_ids=self.opened.stop_ids,
            temperature=self.options.temperature,
            top_p=self.options.top_p,
            seeds=[self.options.seed],
            on_token=lambda row, token: streamer.add(token),
        )
        self._wait()
        self.decode_s += time.perf_counter() - began
        self.new_tokens += len(generation.tokens) + generation.stopped
        streamer.end()
        _say("\n")

    def _ask(self, prompter: Prompter, start: Reading | None, has_document: bool) -> None:
        """Questions from standard input, each from the same state."""
        for question in _questions():
            ids = prompter.question(question, after_document=has_document)
            self._answer(ids, start)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _report(self) -> None:
        if self.device.type == "cuda":
            peak = f"{_size(torch.cuda.max_memory_allocated(self.device))} of GPU memory"
        else:
            peak = _size(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        parts = [
            f"read {_rate(self.read_tokens, self.read_s)}",
            f"wrote {_rate(self.new_tokens, self.decode_s)}",
            f"cache {_size(self.cache_bytes)}",
            f"peak memory {peak}",
        ]
        self.reporter.say("; ".join(parts))


def _rate(tokens: int, seconds: float) -> str:
    speed = f" ({tokens / seconds:,.0f} tokens/s)" if tokens and seconds > 0 else ""
    return f"{tokens:,} tokens in {seconds:.1f} s{speed}"


def _size(num_bytes: int) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024  # type: ignore[assignment]
    return f"{num_bytes:.4g} GiB"


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _questions() -> Iterator[str]:
    """Lines of standard input until an empty one."""
    while True:
        if sys.stdin.isatty():
            print("question> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda is not there; set device=cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


if __name__ == "__main__":
    sys.exit(main())
