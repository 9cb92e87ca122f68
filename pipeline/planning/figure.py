"""A picture of the plan: memory of a rank by kind, for the configured and the fastest layouts."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure

from pipeline.atomic import write_atomically
from pipeline.planning.estimate import Memory
from pipeline.planning.plan import Plan
from pipeline.planning.tables import GIB, PARTS, name_of

COLOURS = {
    "weights": "#0072B2",
    "optimizer": "#56B4E9",
    "gradients": "#009E73",
    "activations": "#E69F00",
    "communication": "#CC79A7",
    "temporary": "#D55E00",
    "allocator": "#999999",
    "reserve": "#CCCCCC",
}
DPI = 130


def write_figure(plan: Plan, path: Path) -> bool:
    """Draw it; False where no layout is legal."""
    bars = _bars(plan)
    if not bars:
        return False
    figure = Figure(figsize=(9.5, 1.7 + 0.46 * len(bars)), layout="constrained")
    axes = figure.subplots()
    names = [name for name, _, _ in bars]
    left = [0.0] * len(bars)
    for part, title in PARTS.items():
        widths = [memory.parts.get(part, 0.0) / GIB for _, memory, _ in bars]
        if max(widths) > 0:
            axes.barh(names, widths, left=left, color=COLOURS[part], label=title, height=0.66)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    capacity = plan.gpu.memory / GIB
    axes.axvline(capacity, color="black", linewidth=1.2)
    axes.annotate(
        f"{plan.gpu.name}: {capacity:.1f} GiB",
        (capacity, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        fontsize=8,
    )
    limit = max(capacity, *left) * 1.14
    for (name, memory, note), end in zip(bars, left, strict=True):
        axes.text(
            end + limit * 0.008,
            name,  # type: ignore[arg-type] # a category's place
            f"{end:.1f} GiB{note}",
            va="center",
            fontsize=8,
            color="black" if memory.fits else "#B00020",
        )
    axes.set_xlim(0, limit)
    axes.invert_yaxis()
    axes.set_xlabel("memory of the fullest rank (GiB)", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=8)
    gpus = f"{plan.config.plan.num_gpus} x {plan.gpu.name}"
    title = f"{plan.config.recipe}: {plan.searched.entry} on {gpus}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=DPI))
    return True


def _bars(plan: Plan) -> list[tuple[str, Memory, str]]:
    """(name, memory, note) of the configured layout, then the fastest that fit."""
    bars = []
    for stage in plan.stages:
        if stage.work is plan.searched and stage.memory is not None and stage.layout is not None:
            seconds = max(part.time.step for part in stage.phases)
            name = f"as configured: {name_of(stage.layout)}"
            bars.append((name, stage.memory, f", {seconds:.3g} s/step"))
    for number, estimate in enumerate(plan.found.fitting if plan.found else [], start=1):
        name = f"{number}. {name_of(estimate.layout)}"
        bars.append((name, estimate.memory, f", {estimate.time.step:.3g} s/step"))
    return bars
