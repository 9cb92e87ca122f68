"""What each choice of the conversion buys: the demo's, changed one at a time.

    python -m benchmarks.ablations --out benchmarks/results/ablations.json

Each row converts the demo's base model anew with one change and is measured on the same held-out
documents. Rows that are done are kept in `--runs`, so the same command goes on after a stop. Rows
`seed` tell how far apart two runs of the same settings are: smaller differences mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.measure import ROOT, commit
from pipeline.console import Reporter

STEPS = 400
SHARED = "shared"
COMMON = ["recipe=demo", "tracking=none", f"convert.steps={STEPS}", "convert.log_every=20"]
DENSE = {"fraction": 0.4, "seq_length": 256, "batch_size": 8}
NARROW = {"window_range": [12, 24], "chunk_range": [8, 12]}
MIX = {"far": 0.45, "mixed": 0.35, "code": 0.2}


def phases(
    *, dense: Mapping[str, Any] | None = None, mix: Mapping[str, float] | None = None, **late: Any
) -> str:
    """The demo's two phases with changes, as an override."""
    first = {**DENSE, **NARROW, "weights": {"dense": 1}, **(dense or {})}
    second = {"fraction": 0.6, "weights": dict(mix or MIX), **late}
    return f"convert.phases={_hydra([first, second])}"


def _hydra(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_hydra(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_hydra, value)) + "]"
    return str(value)


ROWS: dict[str, list[str]] = {
    "as the demo": [],
    "seed 1": ["run.seed=1"],
    "seed 2": ["run.seed=2"],
    "projections at random": ["mixer.memory.init_from_base=false"],
    "gate and up of std 1/sqrt(d_h)": ["mixer.memory.gate_up_std=null"],
    "eta 10 times": ["mixer.memory.eta_init=2e-3"],
    "eta a tenth": ["mixer.memory.eta_init=2e-5"],
    "momentum off": ["mixer.memory.momentum=false"],
    "decay 0.05": ["mixer.memory.decay=0.05"],
    "only down is written": ["mixer.memory.writes=[down]"],
    "alpha's rate 3 times": ["optim.alpha_lr_factor=3"],
    "alpha's rate 10 times": ["optim.alpha_lr_factor=10"],
    "alpha's rate 30 times": ["optim.alpha_lr_factor=30"],
    "chunk 8": ["mixer.chunk_size=8", phases(chunk_range=[8, 12])],
    "chunk 64": ["mixer.chunk_size=64", phases(window_range=[64, 96], chunk_range=[48, 64])],
    "align first (100 steps)": [
        'stages=[prepare,align,convert,"convert@mamba2",evaluate,export]',
        "align.steps=100", "align.lr=3e-3", "align.batch_size=4", "align.window_range=[48,96]",
        "align.chunk_range=[32,48]", "align.sink_range=[0,8]",
    ],
    "no dense phase": [
        f"convert.phases={_hydra([{'fraction': 1.0, 'weights': MIX}])}"
    ],
    "no plain text": [phases(mix={"far": 0.55, "mixed": 0.45})],
    "half plain text": [phases(mix={"far": 0.3, "mixed": 0.2, "code": 0.5})],
    "loss beyond the window only": ["convert.loss_beyond_window=true"],
    "cross-entropy beside KL": ["convert.ce_weight=1"],
    "half the steps": [f"convert.steps={STEPS // 2}"],
    "twice the steps": [f"convert.steps={STEPS * 2}"],
}  # fmt: skip


def prepare_shared(runs: Path) -> None:
    """The documents that every row is made from."""
    if not (runs / SHARED / "prepare" / "DONE.json").exists():
        _pipeline("prepare", [*COMMON, f"run.dir={runs / SHARED}"])


def run_row(name: str, words: list[str], runs: Path) -> dict[str, Any]:
    """Convert and measure with one change; a row that is done is read."""
    folder = runs / "".join(c if c.isalnum() else "_" for c in name)
    done = folder / "row.json"
    if done.exists():
        row: dict[str, Any] = json.loads(done.read_text())
        return row
    if not folder.exists():
        shutil.copytree(runs / SHARED / "prepare", folder / "prepare")
    words = [*COMMON, *words, f"run.dir={folder}"]
    mixers = "[full,swa,allmem]" if name == next(iter(ROWS)) else "[allmem]"
    begin = time.monotonic()
    for entry in (*(["align"] if any("align" in word for word in words) else []), "convert"):
        _pipeline(entry, words)
    seconds = time.monotonic() - begin
    measured = [f"eval.mixers={mixers}", "eval.controls=[]", "eval.timing_repeats=0"]
    _pipeline("evaluate", [*words, *measured, "eval.memory_norms=false", "eval.suites.tasks=[]"])
    found = json.loads((folder / "evaluate" / "results.json").read_text())["mixers"]
    row = {"name": name, "words": words[len(COMMON) : -1], "seconds": seconds, "mixers": found}
    done.write_text(json.dumps(row) + "\n")
    return row


def _pipeline(entry: str, words: list[str]) -> None:
    command = [sys.executable, "-m", "pipeline.run", f"stage={entry}", *words]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {found.returncode}:\n{found.stderr}")


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Recall outside the window and the gap in loss from `swa` to `full` that each row closes."""
    first = rows[0]["mixers"]
    out = []
    for row in rows:
        mixer = row["mixers"]["allmem"]
        line = {
            "name": row["name"],
            "recall": mixer["recall"]["exact_match_outside_window"],
            "seconds": row["seconds"],
            "words": row["words"],
        }
        for kind in ("recall", "text"):
            swa, full = (first[m][kind]["loss_beyond_window"] for m in ("swa", "full"))
            line[f"{kind}_gap_closed"] = (swa - mixer[kind]["loss_beyond_window"]) / (swa - full)
        out.append(line)
    return out


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """A bar a row for each of the three measures; the seeds' range as a band."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 0.34 * len(lines) + 1.4), sharey=True)
    names = [line["name"] for line in lines]
    titles = {
        "recall": "recall outside the window",
        "recall_gap_closed": "gap closed: answers' loss",
        "text_gap_closed": "gap closed: text's loss",
    }
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        values = [line[key] for line in lines]
        same = [v for v, n in zip(values, names, strict=True) if n.startswith(("seed", "as "))]
        axis.axvspan(min(same), max(same), color="#cccccc", label="seeds")
        axis.barh(range(len(names)), values, color="#0072B2", height=0.6)
        axis.set(title=title, yticks=range(len(names)), yticklabels=names)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    axes[0].legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Run what is missing, print a Markdown table, write JSON and a figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON; a PNG is put beside it")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "ablations")
    parser.add_argument("--jobs", type=int, default=1, help="rows at once, one thread each")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), help="default: all")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    chosen = [name for name in ROWS if not options.rows or name in options.rows]
    names = list(dict.fromkeys([next(iter(ROWS)), *chosen]))
    runs = options.runs.resolve()
    prepare_shared(runs)
    with ThreadPoolExecutor(options.jobs) as pool:
        measured = pool.map(lambda name: run_row(name, ROWS[name], runs), names)
        with Reporter().progress("ablations", len(names)) as advance:
            rows = []
            for done, row in enumerate(measured, start=1):
                rows.append(row)
                advance(done, row["name"])
    lines = summary(rows)
    found = {"commit": commit(), "steps": STEPS, "rows": lines}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot(lines, options.out.with_suffix(".png"))
    print("| change | recall outside window | gap closed, answers | gap closed, text |")
    print("|---|---:|---:|---:|")
    for line in lines:
        print(
            f"| {line['name']} | {line['recall']:.2f} | {line['recall_gap_closed']:.0%} | "
            f"{line['text_gap_closed']:.0%} |"
        )


if __name__ == "__main__":
    main()
