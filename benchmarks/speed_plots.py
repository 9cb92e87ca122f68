"""Figures of the kernel and model benchmarks.

    python -m benchmarks.speed_plots benchmarks/results/kernels_gpu.json   # draws kernels_gpu.png

A machine that only measures needs no matplotlib: figures are drawn from the JSON file anywhere.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.rows import MEASURED, Row, load

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, GREY = "#222222", "#9a9a9a"
COLOURS = {"full": "#666666", "swa": "#56b4e9", "mamba2": "#e69f00", "allmem": "#0072b2"}
OURS, OTHERS, FLOOR = "#0072b2", "#b8cfe0", "#d55e00"


def draw(path: Path) -> Path | None:
    """The figure of a file of either benchmark, beside it; None where there is nothing to draw.

    Without matplotlib nothing is drawn, and a line says how to.
    """
    if importlib.util.find_spec("matplotlib") is None:
        print(
            f"no figure: matplotlib is not installed; where it is, draw with "
            f"python -m benchmarks.speed_plots {path}"
        )
        return None
    import matplotlib

    matplotlib.use("Agg")
    of_models = any("mixer" in row for row in load(path)["rows"])
    return plot_models(path) if of_models else plot_kernels(path)


def plot_kernels(path: Path) -> Path | None:
    """A panel for every group of a kernels file: times of the versions, floors as marks."""
    found = load(path)
    groups: dict[str, list[Row]] = {}
    for row in found["rows"]:
        if row["status"] == MEASURED:
            groups.setdefault(row["group"], []).append(row)
    if not groups:
        return None
    import matplotlib.pyplot as plt

    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    heights = [
        max(len(rows) for rows in list(groups.values())[line * columns : (line + 1) * columns])
        for line in range(lines)
    ]
    figure, axes = plt.subplots(
        lines, columns, figsize=(6.2 * columns, sum(0.36 * h + 1.0 for h in heights)),
        height_ratios=[h + 1.6 for h in heights], layout="constrained", squeeze=False,
    )  # fmt: skip
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis, (name, rows) in zip(axes.flat, groups.items(), strict=False):
        _bars(axis, name, rows)
    figure.suptitle(_title(found, "orange"), fontsize=10, color="#555555")
    return _save(figure, path)


def _bars(axis: Axes, name: str, rows: list[Row]) -> None:
    cpu = rows[0]["cpu_seconds"] is not None
    times = [1e3 * (row["cpu_seconds"] if cpu else row["seconds"]) for row in rows]
    ours = ("triton", "allmem: triton", "window: flex")
    colours = [OURS if row["name"].startswith(ours) else OTHERS for row in rows]
    places = range(len(rows))
    axis.barh(places, times, color=colours, height=0.7)
    for place, (row, ms) in enumerate(zip(rows, times, strict=True)):
        axis.plot([1e3 * row["floor_s"]] * 2, [place - 0.35, place + 0.35], color=FLOOR, lw=2)
        axis.annotate(
            f" {ms:.3g} ms", (ms, place), va="center", fontsize=8, color=INK,
        )  # fmt: skip
    axis.set_yticks(places, [row["name"] for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.2 * max(times))
    axis.set_xlabel("CPU ms" if cpu else "ms", fontsize=8)
    axis.set_title(name.replace("/", ", "), loc="left", fontsize=9, color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="x", labelsize=8)


def plot_models(path: Path) -> Path | None:
    """Prefill and decode by length, and bytes of the cache; a row of panels for each shape."""
    found = load(path)
    rows = [row for row in found["rows"] if row["status"] == MEASURED]
    shapes = list(dict.fromkeys(row["shape"] for row in rows if row["op"] in ("prefill", "decode")))
    if not shapes:
        return None
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(shapes), 3, figsize=(12, 3.4 * len(shapes)), layout="constrained", squeeze=False
    )
    for line, shape in zip(axes, shapes, strict=True):
        own = [row for row in rows if row["shape"] == shape]
        _curves(line[0], own, "prefill", "us_per_token", "prefill, µs a token")
        _curves(line[1], own, "decode", "ms_per_token", "decode, ms a step")
        _curves(line[2], own, "decode", "cache_mib", "cache of one sequence, MiB")
        line[0].set_title(shape, loc="left", fontsize=10, color=INK)
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.suptitle(_title(found, "dotted"), fontsize=10, color="#555555")
    return _save(figure, path)


def _curves(axis: Axes, rows: list[Row], op: str, what: str, label: str) -> None:
    for mixer, colour in COLOURS.items():
        for batch, style in ((1, "o-"), (8, "s--")):
            own = [r for r in rows if (r["op"], r["mixer"], r["batch"]) == (op, mixer, batch)]
            if not own or (what == "cache_mib" and batch != 1):
                continue
            # one point a length: a step may also have been timed as a CUDA graph
            fastest = {row["tokens"]: row for row in sorted(own, key=lambda r: -r["seconds"])}
            own = sorted(fastest.values(), key=lambda row: row["tokens"])
            name = mixer if batch == 1 else f"{mixer}, batch {batch}"
            axis.plot(
                [row["tokens"] for row in own], [_value(row, what) for row in own], style,
                color=colour, label=name, markersize=4, linewidth=1.4,
            )  # fmt: skip
            if what != "cache_mib":
                at_best = [{**row, "cpu_seconds": None, "seconds": row["floor_s"]} for row in own]
                floors = [_value(row, what) for row in at_best]
                axis.plot([row["tokens"] for row in own], floors, ":", color=colour, linewidth=1)
    axis.set_xscale("log", base=2)
    if what == "cache_mib":
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
    axis.set_xlabel("tokens", fontsize=8)
    axis.set_ylabel(label, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _value(row: Row, what: str) -> float:
    seconds = row["cpu_seconds"] if row["cpu_seconds"] is not None else row["seconds"]
    if what == "us_per_token":
        return 1e6 * seconds / (row["tokens"] * row["batch"])
    if what == "ms_per_token":
        return 1e3 * seconds
    return row["cache_bytes"] / row["batch"] / 2**20


def _title(found: dict[str, Any], floor: str) -> str:
    machine, ceilings = found["machine"], found["ceilings"][-1]
    name = machine["device"] if machine["device"] != "cpu" else machine["processor"]
    threads = "" if machine["device"] != "cpu" else f", {machine['threads']} thread(s)"
    return (
        f"{name}{threads}; {ceilings['flops'] / 1e12:.3g} TFLOP/s ({ceilings['dtype']} product), "
        f"{ceilings['bandwidth'] / 1e9:.3g} GB/s (copy); {floor}: floor; commit {machine['commit']}"
    )


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    out = path.with_suffix(".png")
    figure.savefig(out, dpi=120)
    plt.close(figure)
    return out


def main(words: Sequence[str] | None = None) -> int:
    """Draws the figure of each named file; gives the exit status."""
    paths = [Path(word) for word in (sys.argv[1:] if words is None else words)]
    absent = [path for path in paths if not path.is_file()]
    if absent or not paths:
        named = f"{absent[0]} is not there" if absent else "no file is named"
        print(f"error: {named}; name files of benchmarks.kernels or .models", file=sys.stderr)
        return 2
    for path in paths:
        print(draw(path) or f"{path}: nothing is drawn")
    return 0


if __name__ == "__main__":
    sys.exit(main())
