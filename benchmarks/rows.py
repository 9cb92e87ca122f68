"""Results of the kernel and model benchmarks: one JSON file that is whole at any moment.

A row is `measured`, `refused` (its check failed: it has an error and no speed), `failed` (it could
not run to its end) or `not measured` (and why). The file is written anew after every row, so that a
run which is cut off keeps what it has; the same command then goes on with what is missing.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Ceilings, Timing, Work

Row = dict[str, Any]
MEASURED, REFUSED, FAILED, MISSING = "measured", "refused", "failed", "not measured"
_DONE = (MEASURED, REFUSED)


class Results:
    """Rows by (group, name), and the file that holds them.

    Args:
        path: of the JSON file; one of the same machine and the same code is gone on with.
        machine: what is measured on.
        fresh: leave out what an earlier run measured.
    """

    def __init__(self, path: Path, machine: dict[str, Any], *, fresh: bool = False) -> None:
        self.path = path
        self.head: dict[str, Any] = {"machine": machine, "ceilings": []}
        self.rows: dict[tuple[str, str], Row] = {}
        if path.is_file() and not fresh:
            self._go_on(json.loads(path.read_text("utf-8")), machine)

    def _go_on(self, old: dict[str, Any], machine: dict[str, Any]) -> None:
        same = ("device", "processor", "torch", "sources")
        other = [key for key in same if old["machine"].get(key) != machine.get(key)]
        if other:
            key = other[0]
            raise ValueError(
                f"{self.path} holds results of {key}={old['machine'].get(key)}, and this is "
                f"{machine.get(key)}; give another --out, or --fresh to write over them"
            )
        self.head["ceilings"] = old["ceilings"]
        for row in old["rows"]:
            if row["status"] in _DONE:
                self.rows[row["group"], row["name"]] = row

    def has(self, group: str, name: str) -> bool:
        """Whether an earlier run has measured or refused it."""
        return (group, name) in self.rows and self.rows[group, name]["status"] in _DONE

    def add(self, row: Row) -> None:
        """Puts a row into the file, and on the screen."""
        self.rows[row["group"], row["name"]] = row
        print(line_of(row), flush=True)
        self.write()

    def write(self) -> None:
        """The whole file, by way of a second one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = {**self.head, "rows": list(self.rows.values())}
        half = self.path.with_suffix(".part")
        half.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        os.replace(half, self.path)

    def count(self, status: str) -> int:
        """Rows of this status."""
        return sum(row["status"] == status for row in self.rows.values())


def measured(
    case: Row, name: str, timing: Timing, work: Work, ceilings: Ceilings, **more: Any
) -> Row:
    """A row with a speed, its floor and how far it is from it; on a CPU of its CPU seconds."""
    floor, bound = work.floor(ceilings)
    row = {**case, "name": name, "status": MEASURED, **asdict(timing)}
    row |= {
        "tokens_per_s": case["batch"] * case.get("new_tokens", case["tokens"]) / timing.steady,
        "flops": work.flops,
        "bytes": work.bytes,
        "floor_s": floor,
        "floor_by": bound,
        "times_floor": timing.steady / floor,
    }
    return {**row, **more}


def refused(case: Row, name: str, error: float, bound: float) -> Row:
    """A row whose check failed."""
    return {
        **case,
        "name": name,
        "status": REFUSED,
        "error": error if error < float("inf") else "not finite",
        "error_bound": bound,
        "why": f"its error {error:.2e} is above {bound:.0e}; no speed is reported",
    }


def missing(case: Row, name: str, why: str) -> Row:
    """A row that was not measured."""
    return {**case, "name": name, "status": MISSING, "why": why}


def failed(case: Row, name: str, error: Exception) -> Row:
    """A row that an error ended, printed whole; a lack of memory is no failure."""
    lines = str(error).strip().splitlines() or [""]
    row = missing(case, name, f"{type(error).__name__}: {lines[0][:200]}")
    if not isinstance(error, torch.OutOfMemoryError):
        traceback.print_exception(error)
        row["status"] = FAILED
    return row


def line_of(row: Row) -> str:
    """One line for a person."""
    head = f"{row['group']:46} {row['name']:26}"
    if row["status"] != MEASURED:
        return f"{head} {row['status']}: {row['why']}"
    clock, seconds = "ms", row["seconds"]
    if row["cpu_seconds"] is not None:
        clock, seconds = "CPU ms", row["cpu_seconds"]
    unequal = "" if row.get("bit_equal", True) else "; TWO RUNS DIFFER"
    return (
        f"{head} {seconds * 1e3:11.3f} {clock} {row['tokens_per_s']:14,.0f} tokens/s, "
        f"{row['times_floor']:6.1f} × its floor ({row['floor_by']}){unequal}"
    )


def load(path: Path) -> dict[str, Any]:
    """A file of results; empty where there is none."""
    if not path.is_file():
        return {"machine": {}, "ceilings": [], "rows": []}
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def find(rows: Iterable[Row], **wanted: Any) -> Row | None:
    """The measured row with these fields, the fastest if there are several; or None."""
    found = [
        row
        for row in rows
        if row["status"] == MEASURED and all(row.get(k) == v for k, v in wanted.items())
    ]
    return min(found, key=lambda row: row["seconds"]) if found else None


def report_end(results: Results) -> int:
    """Where the file is; the exit status, 1 where a check or a run failed."""
    counts = ", ".join(f"{results.count(s)} {s}" for s in (MEASURED, REFUSED, FAILED, MISSING))
    print(f"{counts}: {results.path}")
    wrong = results.count(REFUSED) + results.count(FAILED)
    if wrong:
        print(f"error: {wrong} rows were refused or failed, see above", file=sys.stderr)
    return 1 if wrong else 0
