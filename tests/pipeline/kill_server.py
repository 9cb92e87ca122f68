"""Runs the command line in forked processes and kills them; run by test_kill.py.

python kill_server.py PLAN.json OUT.json. All imports happen once, before the first fork, so a start
costs a fraction of a second. The run of the plan is done once undisturbed, keeping every
checkpoint; then again and again under SIGKILL, until there were enough kills and the run that was
killed last has come to its end. What must hold after every kill is checked here; what is different
from the undisturbed run is written to OUT.json, for the tests to judge.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from fork_server import is_over, start, wait

from pipeline.checkpoint import load_checkpoint
from pipeline.retention import BEST_FILE

NUMBERS = ("step", "tokens", "loss_tokens", "train/loss", "train/grad_norm", "train/lr")


def kill_one(children: list[int], run_dir: Path, source: random.Random, longest_s: float) -> str:
    """SIGKILL one of the children at a random time, or at one aimed at a save; which it was."""
    victim = source.choice(children)
    aimed = source.random() < 0.5
    deadline = time.monotonic() + source.uniform(0.0, longest_s)
    while time.monotonic() < deadline and not is_over(victim):
        time.sleep(0.001)
    if aimed:  # a few milliseconds after the next time that something appears or goes
        before, latest = names(run_dir), time.monotonic() + 5
        while time.monotonic() < latest and not is_over(victim) and names(run_dir) == before:
            time.sleep(0.0005)
        time.sleep(source.uniform(0.0, 0.004))
    if is_over(victim):
        return "over"
    os.kill(victim, signal.SIGKILL)
    return "aimed" if aimed else "random"


def names(run_dir: Path) -> list[str]:
    """What lies in the folders of checkpoints and in those that are being written."""
    found: list[str] = []
    for folder in run_dir.glob("*/checkpoints"):
        for path, folders, files in os.walk(folder):
            found += [path, *folders, *files]
    return found


def checkpoints(run_dir: Path) -> Iterator[Path]:
    yield from sorted(run_dir.glob("*/checkpoints/step_*"))


def differences(path: Path, wanted: Path) -> list[str]:
    """What is wrong with a checkpoint that should be as another one, to the last bit."""
    try:
        saved, other = load_checkpoint(path), load_checkpoint(wanted)
    except ValueError as error:
        return [str(error)]
    wrong = [key for key in other.state if saved.state.get(key) != other.state[key]]
    for mine, theirs in ((saved.model, other.model), (saved.optimizer, other.optimizer)):
        wrong += sorted(set(mine) ^ set(theirs))
        wrong += [n for n in theirs if n in mine and not torch.equal(mine[n], theirs[n])]
    return [f"{path.parent.parent.name}/{path.name}: {name}" for name in wrong]


def look(run_dir: Path, whole: Path, newest: dict[str, str]) -> list[str]:
    """What is wrong in the folder of a run that has just been killed."""
    wrong = []
    for path in checkpoints(run_dir):
        wrong += differences(path, whole / path.relative_to(run_dir))
    for folder in run_dir.glob("*/checkpoints"):
        steps = sorted(path.name for path in folder.glob("step_*"))
        before, now = newest.get(folder.parent.name, ""), steps[-1] if steps else ""
        if now < before:
            wrong.append(f"{folder}: {before} is gone")
        newest[folder.parent.name] = now
        best = folder / BEST_FILE
        for entry in json.loads(best.read_text())["checkpoints"] if best.exists() else []:
            if not (folder / entry["folder"]).is_dir():
                wrong.append(f"{folder}: the best, {entry['folder']}, is gone")
    return wrong


def numbers(stage: Path) -> list[list[Any]]:
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [[line[key] for key in NUMBERS] for line in lines]


def compare(run_dir: Path, whole: Path, stages: list[str]) -> list[str]:
    """What is different at the end."""
    wrong = []
    for stage in stages:
        if numbers(run_dir / stage) != numbers(whole / stage):
            wrong.append(f"{stage}/metrics.jsonl differs")
        last = sorted((whole / stage / "checkpoints").glob("step_*"))[-1].relative_to(whole)
        wrong += differences(run_dir / last, whole / last)
        wrong += [str(left) for left in (run_dir / stage).rglob(".unfinished-*")]
        files = [folder / stage / "checkpoints" / BEST_FILE for folder in (run_dir, whole)]
        if files[0].read_text() != files[1].read_text():
            wrong.append(f"{stage}: another checkpoint is the best")
    return wrong


def main(plan_file: str, out_file: str) -> None:
    plan = json.loads(Path(plan_file).read_text())
    folder, words, ranks = Path(plan["folder"]), plan["words"], plan["num_ranks"]
    source = random.Random(plan["seed"])
    whole, killed = folder / "whole", folder / "killed"
    keep_all = [f"{stage}.keep_last=100000" for stage in plan["stages"]]
    result: dict[str, Any] = {"kills": {}, "wrong": [], "codes": [], "runs": 0, "others_s": []}
    codes = wait(start([*words, *keep_all, f"run.dir={whole}"], ranks), 300)
    assert codes == [0] * ranks, codes
    words = [*words, f"run.dir={killed}"]
    while sum(result["kills"].values()) < plan["num_kills"] and not result["wrong"]:
        shutil.rmtree(killed, ignore_errors=True)
        newest: dict[str, str] = {}
        done = False
        while not done:
            children = start(words, ranks)
            where = "over"
            if sum(result["kills"].values()) < plan["num_kills"]:
                where = kill_one(children, killed, source, plan["longest_s"])
            since = time.monotonic()
            codes = wait(children, 60)
            if where != "over":
                result["kills"][where] = result["kills"].get(where, 0) + 1
                result["others_s"].append(time.monotonic() - since)
                result["codes"].append(codes)
            done = codes == [0] * ranks
            if where == "over" and not done:
                result["wrong"].append(f"codes {codes} without a kill")
            result["wrong"] += look(killed, whole, newest)
            if result["wrong"]:
                break
        result["runs"] += 1
        if done:
            result["wrong"] += compare(killed, whole, plan["stages"])
    Path(out_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
