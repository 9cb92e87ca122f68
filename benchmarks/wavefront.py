"""Measures how well context-parallel ranks overlap, and checks the simulation with it.

    python -m benchmarks.wavefront                    # 1, 2 and 4 ranks, gloo, one thread each
    python -m benchmarks.wavefront --help

Starts the ranks on this machine, each with the same number of tokens of one document, runs forward
and backward passes of a small model and notes when each rank computes and waits. One rank alone
gives the compute times from which `benchmarks.schedule` predicts the others. Writes JSON and a
figure. On a shared machine passes go on until enough of them were undisturbed: every rank had a
core (CPU time over wall time, waits left out) for `--quiet` of the time in which it computed.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from allmem_megatron.config import BaseModelConfig, MemoryConfig
from benchmarks.costs import Setting, messages
from benchmarks.plots import Bar, plot_measured
from benchmarks.programs import LayerSeconds, student_programs
from benchmarks.schedule import Link, Timeline, simulate

ROOT = Path(__file__).resolve().parents[1]
Pass = dict[str, Any]

# (from, to) of two marks that follow each other, and the part of a layer between them
PARTS = {
    ("forward", "start", "scan"): "before",
    ("forward", "scan", "scanned"): "scan",
    ("forward", "scanned", "end"): "after",
    ("backward", "end", "scanned"): "back after",
    ("backward", "scanned", "scan"): "back scan",
    ("backward", "scan", "start"): "back before",
}


def measure(config: dict[str, Any]) -> list[list[Pass]]:
    """Every rank's passes, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder, "config.json"), Path(folder, "out.json")
        given.write_text(json.dumps(config), encoding="utf-8")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(config["ranks"]),
            "OMP_NUM_THREADS": "1",
        }
        words = [sys.executable, "-m", "benchmarks.wavefront_rank", str(given), str(out)]
        ranks = [
            subprocess.Popen(
                words, cwd=ROOT, env={**environment, "RANK": str(r), "LOCAL_RANK": str(r)}
            )
            for r in range(config["ranks"])
        ]
        try:
            statuses = [rank.wait() for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        if any(statuses):
            raise RuntimeError(f"ranks ended with {statuses}; their messages are above")
        found: list[list[Pass]] = json.loads(out.read_text(encoding="utf-8"))
    return found


# ------------------------------------------------------------------------------- one pass


def parts_of(one: Pass) -> list[tuple[str, int, float, float, float]]:
    """(part, layer, start, stop, CPU seconds) of a rank's pass, in order."""
    found = []
    marks = one["marks"]
    for first, second in pairwise(marks):
        if len(first["name"]) == 3 and len(second["name"]) == 3:
            direction, layer, place = first["name"]
            part = PARTS.get((direction, place, second["name"][2]))
            if part and second["name"][1] == layer:
                cpu = second["cpu"] - first["cpu"]
                found.append((part, layer, first["wall"], second["wall"], cpu))
    return found


def bars_of(one: Pass, zero: float) -> list[Bar]:
    """What a rank computed in a pass, without its waits, in seconds from `zero`."""
    waits = [(start - zero, stop - zero) for _, start, stop in one["waits"]]
    bars: list[Bar] = []
    for part, layer, start, stop, _ in parts_of(one):
        kind = part
        if "scan" not in part:
            kind = "backward" if part.startswith("back") else "forward"
        at = start - zero
        for begin, end in waits:
            if at <= begin < stop - zero:
                bars.append((kind, layer, at, begin))
                at = end
        bars.append((kind, layer, at, stop - zero))
    return bars


def span(passes: Sequence[Pass]) -> tuple[float, float]:
    """When the first rank began a pass and the last one ended it."""
    begin = min(one["marks"][0]["wall"] for one in passes)
    return begin, max(one["marks"][-1]["wall"] for one in passes)


def efficiency(passes: Sequence[Pass]) -> float:
    """Share of all ranks' time in which they did not wait for each other."""
    begin, end = span(passes)
    busy = 0.0
    for one in passes:
        waited = sum(stop - start for _, start, stop in one["waits"])
        busy += one["marks"][-1]["wall"] - one["marks"][0]["wall"] - waited
    return busy / (len(passes) * (end - begin))


def seconds_of(ranks: Sequence[Sequence[Pass]], clock: str) -> LayerSeconds:
    """Median times of the parts of a layer, waits left out; clock "cpu" or "wall"."""
    found: dict[str, list[float]] = defaultdict(list)
    for passes in ranks:
        for one in passes:
            for part, _, seconds in worked(one, clock):
                found[part].append(seconds)
    return layer_of({part: statistics.median(values) for part, values in found.items()})


def seconds_by_layer(one: Pass, clock: str) -> list[LayerSeconds]:
    """Every layer's own times in one rank's pass."""
    found: dict[int, dict[str, float]] = defaultdict(dict)
    for part, layer, seconds in worked(one, clock):
        found[layer][part] = seconds
    return [layer_of(found[layer]) for layer in sorted(found)]


def worked(one: Pass, clock: str) -> list[tuple[str, int, float]]:
    """(part, layer, seconds in which the rank did not wait) of a pass."""
    found = []
    for part, layer, start, stop, cpu in parts_of(one):
        waited = sum(e - b for _, b, e in one["waits"] if start <= b < stop)
        found.append((part, layer, cpu if clock == "cpu" else stop - start - waited))
    return found


def layer_of(parts: dict[str, float]) -> LayerSeconds:
    """A layer's parts as the simulation knows them."""
    # where in `before` keys and values are ready is not marked; the schedule hardly depends on it
    return LayerSeconds(
        project=0.3 * parts["before"],
        window=0.7 * parts["before"],
        scan=parts["scan"],
        after=parts["after"],
        back_after=parts["back after"],
        back_scan=parts["back scan"],
        back_window=0.7 * parts["back before"],
        back_project=0.3 * parts["back before"],
    )


# ------------------------------------------------------------------------------- all of it


def base_of(config: dict[str, Any]) -> tuple[BaseModelConfig, MemoryConfig]:
    """The sizes that the ranks build."""
    base = BaseModelConfig(family="qwen3", qk_norm=True, vocab_size=256, **config["base"])
    return base, MemoryConfig(**config["memory"])


def predict(
    config: dict[str, Any], seconds: Sequence[Sequence[LayerSeconds]], link: Link
) -> Timeline:
    """The wavefront that these times, by rank and layer, and messages of the real sizes give."""
    base, memory = base_of(config)
    setting = Setting(
        tokens=config["tokens_per_rank"] * config["ranks"],
        window_size=config["window_size"],
        num_sinks=config["num_sinks"],
        chunk_size=config["chunk_size"],
    )
    sizes = messages(base, config["ranks"], "wavefront", setting, memory, element_bytes=4)
    return simulate(student_programs(seconds, sizes), link)


def alike(config: dict[str, Any], seconds: LayerSeconds) -> list[list[LayerSeconds]]:
    """The same times for every layer of every rank."""
    return [[seconds] * config["base"]["num_layers"]] * config["ranks"]


def replay_errors(config: dict[str, Any], ranks: list[list[Pass]], link: Link) -> list[float]:
    """Predicted over measured time, minus 1, of every pass, from its own compute times.

    Each part of each layer of each rank takes the time it took, disturbed by other processes or
    not. What is left is the schedule: a wait that the simulation does not know makes it too short.
    """
    errors = []
    for passes in zip(*ranks, strict=True):
        begin, end = span(passes)
        predicted = predict(config, [seconds_by_layer(one, "wall") for one in passes], link)
        outside = max(outside_layers(one) for one in passes)
        errors.append((predicted.makespan + outside) / (end - begin) - 1)
    return errors


def outside_layers(one: Pass) -> float:
    """Seconds of a pass before, between and after the layers: embedding, final norm, loss."""
    marks = [(mark["name"], mark["wall"]) for mark in one["marks"]]
    return sum(
        later - earlier
        for (name, earlier), (following, later) in pairwise(marks)
        if len(name) == 1 or len(following) == 1
    )


def bars_of_timeline(timeline: Timeline) -> list[list[Bar]]:
    """The simulated ranks as bars."""
    return [
        [
            (kind, int(layer), start, stop)
            for name, start, stop in spans
            if not name.startswith("wait")
            for kind, layer in [name.rsplit(" ", 1)]
        ]
        for spans in timeline.spans
    ]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def undisturbed(ranks: list[list[Pass]], config: dict[str, Any]) -> list[list[Pass]]:
    """The passes in which every rank had a core; if they are fewer than three, the best three."""
    order = sorted(range(len(ranks[0])), key=lambda i: -ranks[0][i]["core_share"])
    quiet = [i for i in order if ranks[0][i]["core_share"] >= config["quiet"]]
    taken = quiet if len(quiet) >= 3 else order[:3]
    return [[passes[i] for i in sorted(taken)] for passes in ranks]


def row_of(
    config: dict[str, Any], ranks: list[list[Pass]], alone: LayerSeconds, link: Link
) -> dict[str, Any]:
    """What was measured with these ranks, beside bounds and prediction."""
    size, layers = config["ranks"], config["base"]["num_layers"]
    num_passes = len(ranks[0])
    errors = replay_errors(config, ranks, link) if config["mode"] == "wavefront" else []
    ranks = undisturbed(ranks, config)
    passes = list(zip(*ranks, strict=True))
    times = [end - begin for begin, end in map(span, passes)]
    own = seconds_of(ranks, "cpu")
    row: dict[str, Any] = {
        "ranks": size,
        "mode": config["mode"],
        "num_passes": num_passes,
        "num_taken": len(passes),
        "core_share": spread([one[0]["core_share"] for one in passes]),
        "pass_s": spread(times),
        "efficiency": spread([efficiency(one) for one in passes]),
        "layer_bound": layers / (layers + size - 1),
        "scan_bound": layers * own.total / (layers * own.total + (size - 1) * own.scans),
        "cpu_s_of_a_layer": asdict(own),
    }
    if config["mode"] == "wavefront":
        row["replay_error"] = spread(errors)
        row["predicted_s"] = {}
        for source, seconds in (("one rank alone", alone), ("these ranks", own)):
            predicted = predict(config, alike(config, seconds), link)
            row["predicted_s"][source] = {
                "pass_s": predicted.makespan,
                "efficiency": predicted.efficiency,
                "error_to_median": predicted.makespan / statistics.median(times) - 1,
                "error_to_least": predicted.makespan / min(times) - 1,
            }
    return row


def arguments(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.wavefront", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="the first is 1")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--tokens_per_rank", type=int, default=512)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--sinks", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9, help="undisturbed passes to wait for")
    parser.add_argument("--most_passes", type=int, default=200, help="stop waiting for them then")
    parser.add_argument("--idle", type=float, default=0.8, help="share of the cores, before a pass")
    parser.add_argument("--patience_s", type=float, default=0.0, help="of all waiting for --idle")
    parser.add_argument("--quiet", type=float, default=0.95, help="share of a core that a rank had")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--modes", nargs="+", default=["wavefront", "a2a"])
    parser.add_argument("--gbytes_per_s", type=float, default=1.0, help="of gloo, for predictions")
    parser.add_argument("--latency_us", type=float, default=200.0, help="of gloo, for predictions")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/wavefront.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/img/wavefront.png")
    given = parser.parse_args(words)
    if given.ranks[0] != 1 or len(given.ranks) < 2:
        parser.error(f"--ranks {given.ranks}: one rank alone comes first; give 1 and others")
    return given


def main(words: list[str] | None = None) -> None:
    """Measures, predicts, writes JSON and figure."""
    given = arguments(words)
    config: dict[str, Any] = {
        "base": {
            "hidden_size": given.hidden,
            "num_layers": given.layers,
            "num_heads": given.hidden // 64,
            "num_kv_heads": given.hidden // 128,
            "head_dim": 64,
            "intermediate_size": 3 * given.hidden,
        },
        "memory": {"memory_size": 256, "num_heads": 4},
        "tokens_per_rank": given.tokens_per_rank,
        "window_size": given.window,
        "num_sinks": given.sinks,
        "chunk_size": given.chunk,
        "repeats": given.repeats,
        "most_passes": given.most_passes,
        "quiet": given.quiet,
        "idle": given.idle,
        "patience_s": given.patience_s,
        "warmup": given.warmup,
        "mode": "wavefront",
        "ranks": 1,
    }
    link = Link(bytes_per_s=given.gbytes_per_s * 1e9, latency_s=given.latency_us * 1e-6)
    print("1 rank", file=sys.stderr)
    one = measure(config)
    alone = seconds_of(undisturbed(one, config), "cpu")
    rows, shown = [row_of(config, one, alone, link)], None
    for mode in given.modes:
        for size in given.ranks[1:]:
            print(f"{size} ranks, {mode}", file=sys.stderr)
            config = {**config, "mode": mode, "ranks": size}
            ranks = measure(config)
            rows.append(row_of(config, ranks, alone, link))
            print(json.dumps(rows[-1]), file=sys.stderr)
            if mode == "wavefront":
                shown = config, undisturbed(ranks, config)
    result = {"config": {**config, "ranks": given.ranks, "mode": given.modes}, "rows": rows}
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if shown is not None:
        draw(*shown, alone, link, [row for row in rows if row["mode"] == "wavefront"], given.plot)


def draw(
    config: dict[str, Any], ranks: list[list[Pass]], alone: LayerSeconds, link: Link,
    rows: list[dict[str, Any]], path: Path,
) -> None:  # fmt: skip
    """The figure, with the least disturbed pass."""
    best = max(zip(*ranks, strict=True), key=lambda one: one[0]["core_share"])
    zero = span(best)[0]
    simulated = bars_of_timeline(predict(config, alike(config, alone), link))
    measured = [bars_of(one, zero) for one in best]
    plot_measured(measured, simulated, config["base"]["num_layers"], rows, path)


if __name__ == "__main__":
    main()
