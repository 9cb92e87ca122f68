"""What the data benchmark times, each in a process of its own.

`python -m benchmarks.data_cases '{"case": …}'` prints one line of JSON: seconds of wall and CPU
(children's too) between start and end of the work, imports not counted, and peak memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Result = dict[str, Any]
SEQ_LENGTH = 24_576
_BATCH = 64
"""Documents that the tokenizer alone gets at a time."""


class Clock:
    """Seconds of wall, and of CPU of this process and its ended children."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), self._now()

    @staticmethod
    def _now() -> float:
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system

    def read(self) -> Result:
        """Since the start."""
        return {"wall_s": time.perf_counter() - self._wall, "cpu_s": self._now() - self._cpu}


def load_texts(folder: str) -> list[str]:
    """All documents, in the order of the files."""
    texts = []
    for file in sorted(Path(folder).glob("text-*.jsonl")):
        with open(file, encoding="utf-8") as lines:
            texts += [json.loads(line)["text"] for line in lines]
    return texts


def tokenizer_alone(work: Result) -> Result:
    """The tokenizer on texts in memory, nothing else: `encode_batch`, or its form without offsets.

    With `thread` in a thread of its own, where its memory is not scattered (see
    `data_prep.tokenize.TextEncoder`): this is the fastest that we know of.

    Several processes start together, each with a share of the documents; seconds of wall are those
    of the slowest, seconds of CPU their sum.
    """
    if work["processes"] > 1:
        return _tokenizers_together(work)
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(f"{work['tokenizer']}/tokenizer.json")
    backend.encode_special_tokens = True
    texts = load_texts(work["text"])[work.get("rank", 0) :: work.get("ranks", 1)]
    encode = backend.encode_batch_fast if work["fast"] else backend.encode_batch

    def count(texts: list[str]) -> int:
        tokens = 0
        for first in range(0, len(texts), _BATCH):
            found = encode(texts[first : first + _BATCH], add_special_tokens=False)
            tokens += sum(len(encoding) for encoding in found)
        return tokens + len(texts)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(count, texts[:1]).result()
        if "rank" in work:
            print("ready", flush=True)
            sys.stdin.readline()
        clock = Clock()
        tokens = thread.submit(count, texts).result() if work["thread"] else count(texts)
        return {**clock.read(), "tokens": tokens}


def _tokenizers_together(work: Result) -> Result:
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.data_cases"),
                json.dumps({**work, "processes": 1, "rank": rank, "ranks": work["processes"]}),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(work["processes"])
    ]
    for process in processes:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise SystemExit("a process of the tokenizer ended early")
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    results = [json.loads(process.communicate()[0]) for process in processes]
    total = {name: sum(result[name] for result in results) for name in ("cpu_s", "tokens")}
    return {"wall_s": max(result["wall_s"] for result in results), **total}


def ours(work: Result) -> Result:
    """`prepare_shards`: read, tokenize, pack to 24K, write shards with checksums."""
    from data_prep.config import PrepareConfig, SourceConfig
    from data_prep.prepare import prepare_shards
    from data_prep.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(work["tokenizer"])
    config = PrepareConfig(
        seq_length=SEQ_LENGTH,
        sources=[SourceConfig(kind="jsonl", name="text", path=work["text"], pattern="*.jsonl")],
        samples_per_shard=256,
        eval_fraction=0.0,
        eval_samples=0,
        num_processes=work["processes"],
    )
    clock = Clock()
    manifest = prepare_shards(config, work["out"], tokenizer=tokenizer)
    return {
        **clock.read(),
        "tokens": manifest.num_tokens("train"),
        "fill": manifest.num_tokens("train") / (manifest.num_samples("train") * SEQ_LENGTH),
    }


def datasets_map(work: Result) -> Result:
    """The usual script: `map` to token ids, `map` again to concatenate and cut."""
    import datasets

    from data_prep.tokenizer import load_tokenizer

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(work["tokenizer"])
    end = tokenizer.convert_tokens_to_ids(work["end"])
    processes = work["processes"] if work["processes"] > 1 else None
    files = [str(file) for file in sorted(Path(work["text"]).glob("text-*.jsonl"))]

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        ids = tokenizer(batch["text"], add_special_tokens=False, split_special_tokens=True)
        return {"input_ids": [[*row, end] for row in ids["input_ids"]]}

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        flat = [token for row in batch["input_ids"] for token in row]
        total = len(flat) // SEQ_LENGTH * SEQ_LENGTH
        return {"input_ids": [flat[i : i + SEQ_LENGTH] for i in range(0, total, SEQ_LENGTH)]}

    clock = Clock()
    data = datasets.load_dataset("json", data_files=files, split="train", cache_dir=work["out"])
    data = data.map(encode, batched=True, num_proc=processes, remove_columns=["id", "text"])
    data = data.map(group, batched=True, num_proc=processes)
    data.save_to_disk(f"{work['out']}/saved", num_proc=processes)
    return {**clock.read(), "tokens": len(data) * SEQ_LENGTH}


def datatrove(work: Result) -> Result:
    """datatrove's `JsonlReader` and `DocumentTokenizer`: files of token ids, nothing packed."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from loguru import logger

    logger.remove()
    files = len(list(Path(work["text"]).glob("text-*.jsonl")))
    pipeline = [
        JsonlReader(work["text"], glob_pattern="*.jsonl"),
        DocumentTokenizer(
            f"{work['out']}/tokens",
            f"{work['tokenizer']}/tokenizer.json",
            eos_token=work["end"],
            shuffle_documents=False,
            save_final_metadata=False,
        ),
    ]
    clock = Clock()
    executor = LocalPipelineExecutor(
        pipeline,
        tasks=files,
        workers=work["processes"],
        logging_dir=f"{work['out']}/logs",
        start_method="spawn",  # its processes' CPU is not seen otherwise
    )
    with contextlib.redirect_stdout(sys.stderr):
        executor.run()
    times = clock.read()
    index = sorted(Path(work["out"], "tokens").glob("*.ds.index"))
    return {**times, "tokens": sum(_last(file) for file in index)}


def _last(index: Path) -> int:
    return int.from_bytes(index.read_bytes()[-8:], "little")


def loader(work: Result) -> Result:
    """One epoch of the loader, batches of one sample of 24K; every token is touched."""
    from data_prep.loader import ShardLoader

    batches = ShardLoader(work["out"], batch_size=1, epochs=work["epochs"], prefetch=2)
    clock = Clock()
    tokens = 0
    for batch in batches:
        tokens += batch.tokens.numel()
    return {**clock.read(), "tokens": tokens}


CASES: dict[str, Callable[[Result], Result]] = {
    "tokenizer": tokenizer_alone,
    "ours": ours,
    "datasets": datasets_map,
    "datatrove": datatrove,
    "loader": loader,
}


def main() -> None:
    """The command."""
    work = json.loads(sys.argv[1])
    result = CASES[work["case"]](work)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(json.dumps({**result, "peak_bytes": own, "largest_child_bytes": child}))


if __name__ == "__main__":
    main()
