"""Files of responses: each appears whole, and what a killed run had answered is not asked again.

    responses/  plan.json             what the responses are made from
                unfinished/NAME.jsonl one line for each response that is there, as they come
                part-00000.jsonl      a finished file: a conversation a line, in the prompts' order
                part-00000.json       its counts; the file counts as finished once this is there
                manifest.json         all files, with checksums

Which prompts belong to which file depends on their number alone, and the seed of a response on
(`run.seed`, prompt, draw), so the files are the same for any number of ranks.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_prep.config import PrepareConfig, SourceConfig
from data_prep.settings import ChatConfig
from data_prep.shards import file_sha256
from pipeline.atomic import disk_error, remove, write_atomically, write_json, write_text
from pipeline.collecting.prompts import Prompt
from pipeline.collecting.settings import CollectSettings
from pipeline.metrics_log import read_lines
from pipeline.schema import RunConfig

FOLDER = "responses"
PLAN_FILE = "plan.json"
MANIFEST_FILE = "manifest.json"
UNFINISHED_FOLDER = "unfinished"
SOURCE = "responses"
"""Name of the shards' one source."""
SCHEMA_VERSION = 1
_SEEDS = 1 << 62


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the student said."""

    text: str
    num_tokens: int
    finished: bool
    """Whether it ended by itself."""
    same_tokens: bool
    """Whether the text, tokenized again, gives the tokens that the student chose."""


class Student(Protocol):
    """Answers some prompts at once; each answer depends on its prompt and seed alone."""

    def __call__(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Answer]: ...


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a rank is."""

    done: int
    """Responses that are on the disk."""
    total: int
    tokens: int
    """Tokens of all responses that are on the disk."""
    tokens_per_s: float
    """Of those made by this process."""


def has_responses(stage_dir: Path) -> bool:
    """Whether a `collect` has begun in this folder."""
    return (stage_dir / FOLDER / PLAN_FILE).is_file()


def file_name(number: int) -> str:
    """Name of a file of responses without its ending."""
    return f"part-{number:05d}"


def seed_of(run_seed: int, number: int, draw: int) -> int:
    """Seed of one response, the same wherever it is made."""
    return (run_seed * 1_000_003 + number * 1_009 + draw) % _SEEDS


class ResponseFiles:
    """The files of one rank.

    Args:
        folder: `responses` of the stage.
        prompts: the prompts of the rank's files, all of each.
        settings: sampling and sizes.
        run_seed: the run's seed.
    """

    def __init__(
        self, folder: Path, prompts: Sequence[Prompt], settings: CollectSettings, run_seed: int
    ) -> None:
        self.folder, self.settings, self.run_seed = folder, settings, run_seed
        self.files: dict[int, list[Prompt]] = {}
        for prompt in prompts:
            self.files.setdefault(prompt.number // settings.prompts_per_file, []).append(prompt)

    def make(
        self, student: Student, tell: Callable[[Progress], None], check: Callable[[], None]
    ) -> None:
        """Ask for every response that is not there yet, and write the files.

        Args:
            student: answers a batch.
            tell: told after each batch.
            check: called before each batch; may raise to stop.

        Raises:
            OSError: the disk is full; finished responses are kept.
        """
        draws = self.settings.responses_per_prompt
        done, tokens = self.there()
        before, started = tokens, time.perf_counter()
        for number, prompts in self.files.items():
            if self._record(number).is_file():
                continue
            rows = self._unfinished(number)
            wanted = [
                (prompt, draw)
                for prompt in prompts
                for draw in range(draws)
                if _row_id(prompt, draw) not in rows
            ]
            for batch in _batches(wanted, self.settings.batch_size):
                check()
                asked = [prompt for prompt, _ in batch]
                seeds = [seed_of(self.run_seed, p.number, draw) for p, draw in batch]
                answers = student(asked, seeds)
                new = {
                    _row_id(prompt, draw): _row(prompt, draw, answer)
                    for (prompt, draw), answer in zip(batch, answers, strict=True)
                }
                self._append(number, list(new.values()))
                rows |= new
                done += len(new)
                tokens += sum(row["response_tokens"] for row in new.values())
                speed = (tokens - before) / (time.perf_counter() - started)
                tell(Progress(done=done, total=self.total, tokens=tokens, tokens_per_s=speed))
            self._finish(number, [rows[key] for key in sorted(rows)])

    @property
    def total(self) -> int:
        """Responses that this rank makes."""
        return sum(map(len, self.files.values())) * self.settings.responses_per_prompt

    def there(self) -> tuple[int, int]:
        """Responses of this rank that are on the disk, and their tokens."""
        done = tokens = 0
        for number in self.files:
            if self._record(number).is_file():
                record = json.loads(self._record(number).read_text(encoding="utf-8"))
                done, tokens = done + record["num_responses"], tokens + record["response_tokens"]
            else:
                rows = self._unfinished(number).values()
                done, tokens = done + len(rows), tokens + sum(r["response_tokens"] for r in rows)
        return done, tokens

    def _record(self, number: int) -> Path:
        return self.folder / f"{file_name(number)}.json"

    def _path(self, number: int) -> Path:
        return self.folder / UNFINISHED_FOLDER / f"{file_name(number)}.jsonl"

    def _unfinished(self, number: int) -> dict[str, dict[str, Any]]:
        """Rows of whole batches of a file that was begun; what a kill has torn is cut off.

        Sums are rounded by the batch that they are made in, so only batches that are as an
        undisturbed run makes them give the same responses.
        """
        path = self._path(number)
        if not path.is_file():
            return {}
        found = list(read_lines(path))
        whole = found[: len(found) // self.settings.batch_size * self.settings.batch_size]
        os.truncate(path, whole[-1][0] if whole else 0)
        return {row["id"]: row for _, row in whole}

    def _append(self, number: int, rows: Sequence[dict[str, Any]]) -> None:
        path = self._path(number)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_error(error, path) from error

    def _finish(self, number: int, rows: Sequence[dict[str, Any]]) -> None:
        """The file, then its counts, which make it count as finished."""
        kept = [
            row
            for row in rows
            if row["messages"][-1]["content"] and (row["finished"] or self.settings.keep_unfinished)
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        path = self.folder / f"{file_name(number)}.jsonl"
        write_atomically(path, lambda temporary: write_text(temporary, text))
        record = {
            "path": path.name,
            "num_responses": len(rows),
            "num_kept": len(kept),
            "num_empty": sum(not row["messages"][-1]["content"] for row in rows),
            "num_unfinished": sum(not row["finished"] for row in rows),
            "num_same_tokens": sum(row["same_tokens"] for row in rows),
            "prompt_tokens": sum(row["prompt_tokens"] for row in rows),
            "response_tokens": sum(row["response_tokens"] for row in rows),
            "sha256": file_sha256(path),
        }
        write_json(path.with_suffix(".json"), record)
        remove(self._path(number))


def write_manifest(folder: Path, *, num_files: int, more: dict[str, Any]) -> dict[str, Any]:
    """`manifest.json` of all files, once they are there.

    Args:
        folder: `responses`.
        num_files: how many there must be.
        more: what else to note, the prompts that were left out for example.

    Raises:
        ValueError: a file is missing or not as its counts say.
    """
    records = []
    for number in range(num_files):
        path = folder / f"{file_name(number)}.json"
        if not path.is_file() or not path.with_suffix(".jsonl").is_file():
            raise ValueError(f"{path.with_suffix('.jsonl')} is missing; give the command again")
        record = json.loads(path.read_text(encoding="utf-8"))
        if file_sha256(folder / record["path"]) != record["sha256"]:
            raise ValueError(
                f"{folder / record['path']} is not as {path.name} says; delete both to collect its "
                "responses again"
            )
        records.append(record)
    names = [name for name in records[0] if name.startswith("num_") or name.endswith("_tokens")]
    totals = {name: sum(record[name] for record in records) for name in names}
    manifest = {"schema_version": SCHEMA_VERSION, "files": records, "totals": totals, **more}
    write_json(folder / MANIFEST_FILE, manifest)
    remove(folder / UNFINISHED_FOLDER)
    return manifest


class ResponseShards(PrepareConfig):
    """How shards are made of the responses; the run's folder is not part of what they are."""

    def contents(self) -> dict[str, Any]:
        """What decides the shards' bytes, wherever the run's folder is."""
        plain = super().contents()
        sources = [{**source, "path": FOLDER} for source in plain["sources"]]
        return {**plain, "sources": sources}


def shards_of_responses(config: RunConfig, stage_dir: Path) -> ResponseShards:
    """The configuration of the shards that `collect` makes in its folder, for `data_prep`."""
    settings, data = config.collect, config.data
    source = SourceConfig(
        kind="chat_jsonl",
        name=SOURCE,
        path=str(stage_dir / FOLDER / "part-*.jsonl"),
        chat=ChatConfig(too_long="keep_head"),
    )
    return ResponseShards(
        tokenizer=data.tokenizer,
        seq_length=settings.sample_length,
        sources=[source],
        samples_per_shard=settings.samples_per_shard,
        packing=settings.packing,
        eval_fraction=settings.eval_fraction,
        seed=data.seed,
        num_processes=data.num_processes,
        wait_s=data.wait_s,
    )


def for_worker(config: ResponseShards, rank: int, world_size: int) -> ResponseShards:
    """The share of a rank."""
    return dataclasses.replace(config, num_workers=world_size, worker_rank=rank)


def _row_id(prompt: Prompt, draw: int) -> str:
    return f"{prompt.number:08d}.{draw}"


def _row(prompt: Prompt, draw: int, answer: Answer) -> dict[str, Any]:
    return {
        "id": _row_id(prompt, draw),
        "prompt_id": prompt.id,
        "source": prompt.source,
        "messages": [*prompt.messages, {"role": "assistant", "content": answer.text}],
        "prompt_tokens": len(prompt.tokens),
        "response_tokens": answer.num_tokens,
        "finished": answer.finished,
        "same_tokens": answer.same_tokens,
    }


def _batches(items: Sequence[tuple[Prompt, int]], size: int) -> Iterator[list[tuple[Prompt, int]]]:
    for first in range(0, len(items), size):
        yield list(items[first : first + size])
