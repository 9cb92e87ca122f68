"""The plan on a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.planning.estimate import NAMES, Memory
from pipeline.planning.layouts import Layout
from pipeline.planning.plan import Plan, StagePlan
from pipeline.wording import duration

GIB = 2**30
BAR = 24
"""Columns of the longest bar."""
SHOWN_REASONS = 8

PARTS = {
    "weights": "weights",
    "optimizer": "optimizer (float32 weights, moments)",
    "gradients": "gradients and their buffers",
    "activations": "activations kept for backward",
    "communication": "buffers of exchanges",
    "temporary": "temporary (recomputed layer, logits, …)",
    "allocator": "lost by the allocator",
    "reserve": "reserve (context, NCCL, libraries)",
}
"""Kinds of memory, from what is always there to what is there for a moment."""


def render(plan: Plan) -> Iterator[RenderableType]:
    """All tables, in the order in which they are read."""
    settings, gpu = plan.config.plan, plan.gpu
    yield Text.assemble(
        (f"{plan.config.recipe} on {settings.num_gpus} x {gpu.name}", "bold"),
        f"  ({gpu.memory / GIB:.1f} GiB, {gpu.flops / 1e12:,.0f} TFLOP/s {plan.dtype}, "
        f"{gpu.bandwidth / 1e12:.2f} TB/s each)",
    )
    yield Text(
        f"base: {plan.base.source}; assumed: matrix products at {settings.mfu:.0%} of the peak "
        f"(plan.mfu), {settings.node_gb_s:g} GB/s between machines of {settings.gpus_per_node}",
        style="dim",
    )
    yield Text()
    yield parameter_table(plan)
    yield stage_table(plan)
    for stage in plan.stages:
        if stage.memory is not None and stage.work is plan.searched:
            yield memory_table(stage.work.entry, stage.layout, stage.memory)
    if plan.found is not None:
        yield layout_table(plan)
        if plan.found.refused:
            yield refused_table(plan)
    yield from verdict(plan)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)


def parameter_table(plan: Plan) -> Table:
    """Parameters by kind."""
    table = _table(f"Parameters of {plan.searched.entry}")
    table.add_column("kind")
    table.add_column("trained (M)", justify="right")
    table.add_column("frozen (M)", justify="right")
    for kind in plan.kinds:
        number = f"{kind.count / 1e6:,.2f}"
        table.add_row(kind.name, *((number, "") if kind.trained else ("", number)))
    sums = [sum(k.count for k in plan.kinds if k.trained is on) / 1e6 for on in (True, False)]
    table.add_section()
    table.add_row("in all", *(f"{value:,.2f}" for value in sums), style="bold")
    return table


def stage_table(plan: Plan) -> Table:
    """The recipe's training stages under the configured layout."""
    layouts = [stage.layout for stage in plan.stages if stage.layout is not None]
    name = f": {name_of(layouts[0], batch=False)}" if layouts else ""
    table = _table(f"Stages with the layout as configured{name}")
    table.add_column("stage", no_wrap=True, min_width=14)
    for column in ("tokens", "batch (pass)", "FLOP/step", "s/step", "tokens/s", "MFU"):
        table.add_column(column, justify="right")
    table.add_column("bound by")
    for column in ("steps", "time", "memory"):
        table.add_column(column, justify="right")
    for stage in plan.stages:
        if not stage.phases:
            table.add_row(stage.work.entry, *[""] * 6, "refused", style="red")
        for number, part in enumerate(stage.phases):
            table.add_row(
                stage.work.entry if number == 0 else "",
                f"{part.phase.length:,}",
                f"{part.phase.batch_size} ({part.split.micro_batch_size})",
                with_prefix(part.flops),
                f"{part.time.step:,.3g}",
                f"{part.tokens_per_s:,.0f}",
                f"{plan.mfu(part.flops, part.time.step):.1%}",
                part.time.bound,
                f"{part.phase.steps:,}",
                duration(part.seconds),
                _memory_cell(stage) if number == 0 else "",
            )
    return table


def _memory_cell(stage: StagePlan) -> Text:
    assert stage.memory is not None
    return Text(size(stage.memory.total), style="green" if stage.memory.fits else "bold red")


def memory_table(entry: str, layout: Layout | None, memory: Memory) -> Table:
    """Memory of the fullest rank by kind, and its other moments."""
    name = "" if layout is None else f" ({name_of(layout)})"
    table = _table(f"Memory of the fullest rank in {entry}{name}")
    table.add_column("kind")
    table.add_column("bytes", justify="right")
    table.add_column("of the GPU's")
    for part, value in memory.parts.items():
        table.add_row(PARTS[part], size(value), _bar(value / memory.capacity))
    table.add_section()
    style = "green" if memory.fits else "bold red"
    when = f"highest: {NAMES[memory.when]}"
    table.add_row(when, size(memory.total), _bar(memory.total / memory.capacity), style=style)
    for moment, value in memory.moments.items():
        if moment != memory.when and value > memory.states.held:
            table.add_row(f"tensors at: {NAMES[moment]}", size(value), style="dim")
    return table


def _bar(share: float) -> str:
    full = min(share, 1.0) * BAR
    marks = "█" * int(full) + ("▌" if full % 1 >= 0.5 else "")
    return f"{marks:<{BAR}} {share:4.0%}"


def layout_table(plan: Plan) -> Table:
    """The fastest layouts that fit."""
    found = plan.found
    assert found is not None
    table = _table(
        f"Layouts of {plan.searched.entry} that fit, the fastest first: {found.num_legal} are "
        f"legal, {found.num_followed} ways to split were followed in {found.seconds:.0f} s"
    )
    for name in ("", "TP", "SP", "CP", "DP", "ZeRO", "seqs/pass", "recompute"):
        table.add_column(
            name, justify="right" if name in ("TP", "DP", "ZeRO", "seqs/pass") else "left"
        )
    for name in ("s/step", "tokens/s", "MFU", "bound by", "memory"):
        table.add_column(name, justify="right")
    work = plan.searched
    for number, estimate in enumerate(found.fitting, start=1):
        layout, seconds = estimate.layout, estimate.time.step
        phase = max(work.phases, key=lambda part: part.length * part.batch_size)
        table.add_row(
            str(number),
            str(layout.tp),
            "yes" if layout.sp else "",
            f"{layout.cp} {layout.cp_mode}" if layout.cp > 1 else "1",
            str(layout.dp),
            str(layout.zero_stage),
            str(layout.micro_batch_size),
            "yes" if layout.recompute else "",
            f"{seconds:,.3g}",
            f"{phase.length * phase.batch_size / seconds:,.0f}",
            f"{plan.mfu(work.flops(phase), seconds):.1%}",
            estimate.time.bound,
            size(estimate.memory.total),
            style="bold" if number == 1 else None,
        )
    if not found.fitting:
        for estimate in sorted(found.too_big, key=lambda item: item.memory.total)[:3]:
            table.add_row(
                *[
                    "–",
                    str(estimate.layout.tp),
                    "",
                    str(estimate.layout.cp),
                    str(estimate.layout.dp),
                ],
                *[str(estimate.layout.zero_stage), str(estimate.layout.micro_batch_size)],
                "yes" if estimate.layout.recompute else "",
                *[""] * 3,
                "does not fit",
                size(estimate.memory.total),
                style="red",
            )
    return table


def refused_table(plan: Plan) -> Table:
    """Why some layouts are not among them."""
    assert plan.found is not None
    table = _table("Refused by the program")
    table.add_column("layouts", justify="right")
    table.add_column("such as")
    table.add_column("because", overflow="fold")
    reasons = sorted(plan.found.refused.items(), key=lambda item: -len(item[1]))
    for reason, layouts in reasons[:SHOWN_REASONS]:
        table.add_row(str(len(layouts)), name_of(min(layouts)), " ".join(reason.split()))
    if len(reasons) > SHOWN_REASONS:
        table.add_row("", "", f"and {len(reasons) - SHOWN_REASONS} more reasons, in plan.json")
    return table


def verdict(plan: Plan) -> Iterator[Text]:
    """The last lines: whether it runs, how long, and what would be faster."""
    if not plan.refusals:
        whole = sum(stage.seconds for stage in plan.stages)
        hours = whole * plan.config.plan.num_gpus / 3600
        line = f"The configuration fits: {duration(whole)} of training, {hours:,.1f} GPU hours."
        yield Text(line, style="green")
    for reason in plan.refusals:
        yield Text(f"Refused: {reason}", style="bold red")
    if plan.found is not None and plan.found.fitting:
        best = plan.found.fitting[0].layout
        yield Text(f"Fastest that fits: {best.overrides(plan.searched.stage)}")
    if plan.found is not None and not plan.found.complete:
        yield Text("The search ran out of time; faster layouts may exist.", style="yellow")


def size(value: float) -> str:
    """`54.1 GiB`, `812 MiB`, `3.2 MiB`, `0`."""
    if value < 2**10:
        return "0"
    if value >= GIB:
        return f"{value / GIB:,.1f} GiB"
    mib = value / 2**20
    return f"{mib:,.0f} MiB" if mib >= 100 else f"{mib:.1f} MiB"


def with_prefix(value: float) -> str:
    """`46.7 P` for 46.7e15."""
    powers = {"P": 1e15, "T": 1e12, "G": 1e9}
    prefix = next((name for name, power in powers.items() if value >= power), "M")
    return f"{value / powers.get(prefix, 1e6):.3g} {prefix}"


def name_of(layout: Layout, *, batch: bool = True) -> str:
    """`TP 2 + SP, CP 4 wavefront, DP 8, ZeRO-2, batch 1, recompute`."""
    words = [f"TP {layout.tp}" + (" + SP" if layout.sp else "")] if layout.tp > 1 else []
    words += [f"CP {layout.cp} {layout.cp_mode}"] if layout.cp > 1 else []
    words += [f"DP {layout.dp}", f"ZeRO-{layout.zero_stage}"]
    words += [f"batch {layout.micro_batch_size}"] if batch else []
    return ", ".join(words + (["recompute"] if layout.recompute else []))
