"""Measures data preparation beside the tokenizer alone, `datasets.map` and datatrove.

    make bench                                    # text and tokenizer that every checkout has
    python -m benchmarks.data --text books.jsonl.xz --tokenizer path/to/tokenizer

Every tool gets the same files on the same machine, one after the other, some rounds long, each in a
process of its own; ratios are taken within a round, and their median is reported. Before that the
tokens of every tool are compared with the tokenizer's own: where they differ nothing is reported.
Seconds of CPU count all processes, so that other programs on the machine disturb them less than
seconds of wall. Writes JSON and a figure to benchmarks/results.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data_cases import SEQ_LENGTH
from benchmarks.data_checks import (
    CheckError,
    Reference,
    check_datasets,
    check_datatrove,
    check_ours,
    make_reference,
)
from benchmarks.data_figure import draw
from benchmarks.data_summary import machine, summary
from benchmarks.data_text import Text, make_text
from data_prep.tokenize import end_of_text_id
from data_prep.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DEFAULT_TOKENIZER = ROOT / "models" / "demo_base"
TOOLS = ("ours", "datasets", "datatrove")
PARTS = ("compare", "memory", "loader", "parts")
Result = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives the exit status."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="allmem-bench-", dir=options.work) as folder:
        try:
            result = measure(options, Path(folder))
        except (CheckError, ValueError) as error:
            print(f"error: {error}; nothing is reported", file=sys.stderr)
            return 2
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out / f"{options.name}.json"
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, out.with_suffix(".png"))
    print(summary(result))
    print(f"{out} and {out.with_suffix('.png')}")
    return 0


def _parser() -> argparse.ArgumentParser:
    cores = len(os.sched_getaffinity(0))
    counts = sorted({n for n in (1, 2, 4, 8, 16) if n <= cores} | {cores})
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--text",
        help="file, folder or glob of .jsonl (also .gz, .xz, .zst) or text files; default: source "
        "files of Python's library and installed packages",
    )
    parser.add_argument("--text-name", help="what results call it; default: the file's name")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=DEFAULT_TOKENIZER,
        help="folder with tokenizer.json, or .gguf file; default: the demo model's",
    )
    parser.add_argument("--tokenizer-name", help="what results call it; default: the folder's name")
    parser.add_argument("--characters", type=int, default=20_000_000, help="of the text")
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison (default 3)")
    parser.add_argument(
        "--processes",
        type=int,
        nargs="+",
        default=counts,
        help=f"how many (default {' '.join(map(str, counts))})",
    )
    parser.add_argument("--mfu", type=float, default=0.5, help="of the training step (default 0.5)")
    parser.add_argument(
        "--peak-tflops",
        type=float,
        default=989.0,
        help="of the GPU that the loader feeds (default 989: H200, dense bfloat16)",
    )
    parser.add_argument(
        "--parameters", type=float, default=1.7e9, help="of the model that it trains (1.7e9)"
    )
    parser.add_argument(
        "--tools", nargs="*", choices=TOOLS[1:], default=TOOLS[1:], help="to compare with"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--name", default="data", help="of the files (default data)")
    parser.add_argument("--work", help="folder for temporary files (some GB)")
    return parser


def measure(options: argparse.Namespace, folder: Path) -> Result:
    """All that was asked for.

    Raises:
        CheckError: a tool made other tokens than the tokenizer.
    """
    for tool in options.tools:
        if importlib.util.find_spec(tool) is None:
            raise ValueError(
                f"{tool} is not installed; pip install -e '.[bench]', or leave it out with --tools"
            )
    tools = ("ours", *options.tools)
    tokenizer = load_tokenizer(options.tokenizer)
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    text = make_text(folder / "text", options.text, options.characters)
    end = end_of_text_id(tokenizer)
    reference = make_reference(text, tokenizer, end)
    bench = Bench(folder, text, str(tokenizer.convert_ids_to_tokens(end)))
    lengths = np.diff(reference.ends, prepend=0)
    result: Result = {
        "text": {
            "name": options.text_name or text.description,
            "documents": text.num_documents,
            "characters": text.num_characters,
            "bytes": text.num_bytes,
            "tokens": len(reference.tokens),
            "median_tokens": float(np.median(lengths)),
        },
        "tokenizer": {
            "name": options.tokenizer_name or options.tokenizer.name,
            "vocab_size": len(tokenizer),
        },
        "machine": machine(),
        "seq_length": SEQ_LENGTH,
    }
    if {"compare", "loader"} & set(options.only):
        result["checks"] = check_all(
            bench, reference, len(tokenizer), tools, max(options.processes)
        )
    if "compare" in options.only:
        result["rounds"] = rounds(bench, options.rounds, tools, options.processes)
        result["ratios"] = ratios(result["rounds"])
    if "memory" in options.only:
        result["memory"] = memory(bench, options, folder)
    if "loader" in options.only:
        result["loader"] = loader(bench, options)
    if "parts" in options.only:
        work = {"characters": 4_000_000, "work": str(folder), "lengths": lengths.tolist()}
        result["parts"] = bench.call("benchmarks.data_parts", work)
    result["machine"]["load_after"] = os.getloadavg()[0]
    return result


class Bench:
    """Runs cases in processes of their own.

    Args:
        folder: for what they write.
        text: of all cases.
        end: the end-of-text token, as text.
    """

    def __init__(self, folder: Path, text: Text, end: str) -> None:
        self.folder, self.text, self.end = folder, text, end
        self.out = folder / "out"

    def run(
        self, case: str, *, text: Text | None = None, keep: bool = False, **work: Any
    ) -> Result:
        """One case; what it writes is deleted first, and afterwards unless `keep`."""
        if case != "loader":
            shutil.rmtree(self.out, ignore_errors=True)
        told = f"{case} {work or ''}"
        print(f"  {told.strip()}", file=sys.stderr, flush=True)
        result = self.call(
            "benchmarks.data_cases",
            {
                "case": case,
                "text": str((text or self.text).folder),
                "tokenizer": str(self.folder / "tokenizer"),
                "out": str(self.out),
                "end": self.end,
                **work,
            },
        )
        if not keep:
            shutil.rmtree(self.out, ignore_errors=True)
        return result

    def call(self, module: str, work: Result) -> Result:
        """A module's last line, with one thread for each process.

        Raises:
            ValueError: it ended with an error.
        """
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
        environment = {**os.environ, **dict.fromkeys(names, "1"), "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(self.folder / "cache")}
        done = subprocess.run(
            [sys.executable, "-m", module, json.dumps({"text": str(self.text.folder), **work})],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise ValueError(
                f"{module} {work.get('case', '')} ended with status {done.returncode}: {lines[-1]}"
            )
        return dict(json.loads(done.stdout.splitlines()[-1]))


def check_all(
    bench: Bench, reference: Reference, vocab_size: int, tools: Sequence[str], most: int
) -> Result:
    """Compares every tool's tokens, with one process and with the most.

    Raises:
        CheckError: they differ.
    """
    lost = 0
    for processes in sorted({1, most}):
        bench.run("ours", processes=processes, keep=True)
        check_ours(bench.out, reference)
        if "datatrove" in tools:
            bench.run("datatrove", processes=processes, keep=True)
            check_datatrove(bench.out, reference, vocab_size)
        if "datasets" in tools:
            bench.run("datasets", processes=processes, keep=True)
            lost = check_datasets(bench.out, reference, processes)
    return {
        "the same tokens": ["the tokenizer alone", *tools],
        "tokens that datasets.map drops at ends of batches": lost,
    }


def rounds(
    bench: Bench, number: int, tools: Sequence[str], processes: Sequence[int]
) -> list[dict[str, Result]]:
    """Every case once a round, in an order that turns; by `case/processes`."""
    cases: list[tuple[str, dict[str, Any]]] = []
    for count in processes:
        cases.append((f"tokenizer/{count}", {"fast": True, "thread": True, "processes": count}))
        cases += [(f"{tool}/{count}", {"processes": count}) for tool in tools]
    plain = {"thread": False, "processes": 1}
    cases.append(("tokenizer in the main thread/1", {"fast": True, **plain}))
    cases.append(("tokenizer with offsets/1", {"fast": False, **plain}))
    found = []
    for turn in range(number):
        order = cases[turn % len(cases) :] + cases[: turn % len(cases)]
        this: dict[str, Result] = {}
        for name, work in order:
            this[name] = bench.run(name.split("/")[0].split()[0], **work)
        found.append({name: this[name] for name, _ in cases})
    return found


def ratios(found: list[dict[str, Result]]) -> Result:
    """Within each round: speed of a tool by the tokenizer's with as many processes, by CPU time and
    by wall; and speed-ups over one process."""
    result: Result = {}
    for name in found[0]:
        tool, count = name.split("/")
        for kind in ("cpu_s", "wall_s"):
            own = [turn[f"tokenizer/{count}"][kind] / turn[name][kind] for turn in found]
            one = [turn[f"{tool}/1"][kind] / turn[name][kind] for turn in found]
            result.setdefault(name, {})[kind] = {
                "of_the_tokenizer": _spread(own),
                "of_one_process": _spread(one),
            }
    return result


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def memory(bench: Bench, options: argparse.Namespace, folder: Path) -> list[Result]:
    """Peak resident memory of the main process and of its largest child, for text ×1 and ×4."""
    rows = []
    large = make_text(folder / "text4", options.text, 4 * options.characters)
    for times, text in ((1, bench.text), (4, large)):
        for processes in sorted({1, 2} & {*options.processes, 1}):
            found = bench.run("ours", text=text, processes=processes)
            rows.append(
                {
                    "times": times,
                    "characters": text.num_characters,
                    "processes": processes,
                    **{key: found[key] for key in ("peak_bytes", "largest_child_bytes")},
                }
            )
    shutil.rmtree(large.folder)
    return rows


def loader(bench: Bench, options: argparse.Namespace) -> Result:
    """Tokens a second that the loader gives, and that a training step takes."""
    bench.run("ours", processes=1, keep=True)
    runs = [bench.run("loader", epochs=4, keep=True) for _ in range(max(options.rounds, 1))]
    wall = statistics.median(run["tokens"] / run["wall_s"] for run in runs)
    cpu = statistics.median(run["tokens"] / run["cpu_s"] for run in runs)
    flops = 6 * options.parameters
    need = options.peak_tflops * 1e12 * options.mfu / flops
    return {
        "tokens_per_wall_s": wall,
        "tokens_per_cpu_s": cpu,
        "need_tokens_per_s": need,
        "arithmetic": f"{options.peak_tflops:g} TFLOP/s × {options.mfu:g} (MFU) ÷ (6 × "
        f"{options.parameters:g} FLOP a token) = {need:,.0f} tokens/s for each GPU; attention and "
        "the teacher's forward pass only make it less",
        "times_the_need": cpu / need,
    }


if __name__ == "__main__":
    sys.exit(main())
