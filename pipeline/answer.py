"""`python -m pipeline.answer model=DIR prompts=FILE out=FILE [key=value …]`: answers for a grader.

The bridge to benchmarks with a runner of their own (LiveCodeBench): a file of prompts in, a file of
answers out; docs/running-evaluations.md has the lines before and after. Finished answers are kept
beside `out`, and the same command goes on from them.
"""

from __future__ import annotations

import json
import sys
import textwrap
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from pipeline.atomic import write_atomically
from pipeline.config import build
from pipeline.console import Reporter
from pipeline.evaluating.journal import Answer, Journal, Question, digest_of
from pipeline.evaluating.program import program_digest
from pipeline.evaluating.speaker import Sampling, Speaker
from pipeline.generation import Generator
from pipeline.generation_open import MixerChoice, open_model
from pipeline.help import field_docs
from pipeline.survival import EXIT_INTERRUPTED, EXIT_USER_ERROR


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the command line."""

    model: Path
    """An exported folder, a run's folder, or a base model (folder or .gguf)."""
    prompts: Path
    """JSON lines, each with `id` and `prompt`, or `id` and `messages` (role and content each),
    which go into the chat template."""
    out: Path
    """JSON lines that are written: `id` and `texts`, one text a sampling."""
    num_samples: int = 1
    """Samplings of each prompt; more than 1 needs a temperature."""
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    top_p: float = 1.0
    """With a temperature: draw among the likeliest tokens of this probability together."""
    max_new_tokens: int = 2048
    """At most so many tokens are written."""
    seed: int = 0
    """Of the samplings."""
    batch_size: int = 8
    """Answers written together."""
    thinking: bool = False
    """What a chat template that asks for enable_thinking gets."""
    mode: str | None = None
    """full, swa, mamba2 or allmem. Default: the model's own; full for a base model."""
    window_size: int | None = None
    """Attention window in tokens. Default: the model's own."""
    device: typing.Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1; set {name}=1")
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"num_samples={self.num_samples} greedy answers would all be one; set "
                "temperature=0.2, or num_samples=1"
            )


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; 0, 2 (an error to mend) or 130 (interrupted; answers are kept)."""
    given = list(sys.argv[1:] if words is None else words)
    if not given or given[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    try:
        answer(parse(given))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def help_text() -> str:
    """Text of `--help`."""
    docs = field_docs(Options)
    lines = ["Usage: python -m pipeline.answer model=DIR prompts=FILE out=FILE [key=value …]", ""]
    for item in fields(Options):
        required = item.name in ("model", "prompts", "out")
        lines.append(f"  {item.name} ({'required' if required else f'default {item.default!r}'})")
        lines += textwrap.wrap(
            docs[item.name], 92, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    return "\n".join(lines)


def parse(words: Sequence[str]) -> Options:
    """Options from `key=value` words. Raises: ValueError: an unknown key or a wrong value."""
    hints = typing.get_type_hints(Options)
    values: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} is not key=value; see --help")
        values[key] = value if hints.get(key) is Path else yaml.safe_load(value)
    options: Options = build(Options, values)
    return options


def answer(options: Options) -> None:
    """Answer every prompt and write the file.

    Raises:
        ValueError: the file of prompts is not as it must be, or there is no model.
    """
    records = read_prompts(options.prompts)
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu")
        if options.device == "auto"
        else options.device
    )
    opened = open_model(
        options.model,
        MixerChoice(mode=options.mode, window_size=options.window_size),
        device=device,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
    )
    speaker = Speaker(
        Generator(opened.model, max_batch=options.batch_size),
        opened.tokenizer,
        max_positions=opened.model.config.max_position_embeddings,
        stop_ids=sorted(opened.stop_ids),
        thinking=options.thinking,
    )
    reporter = Reporter()
    reporter.say(f"model: {opened.description}, on {device}")
    jobs = [(record, sample) for record in records for sample in range(options.num_samples)]
    prompts = [_tokens(speaker, record, options) for record, _ in jobs]
    questions = [
        Question(id=record["id"], sample=sample, digest=digest_of(tokens, options.max_new_tokens))
        for (record, sample), tokens in zip(jobs, prompts, strict=True)
    ]
    journal = Journal(options.out.parent, f".{options.out.name}", "answers", _key(options), rank=0)
    known = journal.read()
    missing = [i for i, question in enumerate(questions) if question not in known]
    sampling = Sampling(temperature=options.temperature, top_p=options.top_p, seed=options.seed)
    with reporter.progress("answering:", len(missing)) as advance:
        for start in range(0, len(missing), options.batch_size):
            batch = missing[start : start + options.batch_size]
            texts = speaker.speak(
                [prompts[i] for i in batch],
                max_new_tokens=[options.max_new_tokens] * len(batch),
                stop_texts=[()] * len(batch),
                sampling=sampling,
                questions=[questions[i] for i in batch],
            )
            found = [
                Answer(question=questions[i], value=text)
                for i, text in zip(batch, texts, strict=True)
            ]
            journal.append(found)
            known.update({line.question: line.value for line in found})
            advance(start + len(batch))
    journal.close()
    by_id: dict[str, list[str]] = {}
    for question in questions:
        by_id.setdefault(question.id, []).append(known[question])
    lines = [json.dumps({"id": name, "texts": texts}) for name, texts in by_id.items()]
    content = "\n".join(lines) + "\n"
    write_atomically(options.out, lambda path: _write(path, content))
    reporter.say(f"wrote {len(by_id)} answers to {options.out}")


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Records with an `id` each, and `prompt` or `messages`.

    Raises:
        ValueError: no such file, a line that is no such record, or an id that comes twice.
    """
    if not path.is_file():
        raise ValueError(f"prompts={path} is not there; name a file of JSON lines")
    records: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON ({error}); mend it") from error
        if not isinstance(record, dict) or not ({"prompt", "messages"} & set(record)):
            raise ValueError(f"{path} line {number} has neither prompt nor messages; add one")
        if not isinstance(record.get("prompt", ""), str):
            raise ValueError(f"{path} line {number}: prompt is no text; write one in quotes")
        name = str(record.get("id", ""))
        if not name or name in records:
            raise ValueError(f"{path} line {number} has no id of its own ({name!r}); give it one")
        records[name] = {**record, "id": name}
    if not records:
        raise ValueError(f"{path} holds no prompt; write one JSON object a line")
    return list(records.values())


def _tokens(speaker: Speaker, record: dict[str, Any], options: Options) -> list[int]:
    if "messages" in record and not speaker.has_chat:
        raise ValueError(
            f"prompt {record['id']!r} has messages but the tokenizer has no chat template; give "
            "prompts as text"
        )
    text = speaker.chat(record["messages"]) if "messages" in record else record["prompt"]
    tokens = list(speaker.tokenizer.encode(text))
    limit = speaker.max_positions - options.max_new_tokens
    if not 0 < len(tokens) <= limit:
        raise ValueError(
            f"prompt {record['id']!r} has {len(tokens)} tokens; the model's {speaker.max_positions}"
            f" positions less max_new_tokens={options.max_new_tokens} leave {limit}"
        )
    return tokens


def _key(options: Options) -> str:
    """Of all that decides an answer but the prompt: weights by name, size and date."""
    chosen = {k: str(v) for k, v in asdict(options).items() if k not in ("prompts", "out")}
    files = [options.model] if options.model.is_file() else sorted(options.model.rglob("*"))
    stamps = [
        [str(file), file.stat().st_size, file.stat().st_mtime_ns]
        for file in files
        if file.suffix in (".safetensors", ".gguf", ".json")
    ]
    return digest_of(chosen, stamps, program_digest())


def _write(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
