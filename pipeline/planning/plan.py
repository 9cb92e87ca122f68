"""The plan of a recipe: every training stage under the configured layout, and other layouts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from pipeline.batches import RankSplit
from pipeline.console import Advance
from pipeline.models import choose_dtype
from pipeline.planning.estimate import NAMES, Memory, Time, estimate_memory, estimate_time
from pipeline.planning.hardware import GPUS, Gpu
from pipeline.planning.layouts import Layout, check, configured
from pipeline.planning.parameters import Kind, parameters
from pipeline.planning.search import Estimate, Found, search
from pipeline.planning.sizes import Base, find_base
from pipeline.planning.work import PhaseWork, Work, find_work
from pipeline.schema import RunConfig
from pipeline.wording import duration


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """One phase of a stage under the configured layout."""

    phase: PhaseWork
    split: RankSplit
    time: Time
    flops: float
    """FLOPs of a step over all ranks, recomputation not counted."""

    @property
    def seconds(self) -> float:
        """All of its steps."""
        return self.time.step * self.phase.steps

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all ranks."""
        return self.phase.batch_size * self.phase.length / self.time.step


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One training entry under the configured layout."""

    work: Work
    layout: Layout | None
    memory: Memory | None
    phases: tuple[PhasePlan, ...]
    refusal: str | None
    """What a run would say, or that it does not fit; None where it would run."""

    @property
    def seconds(self) -> float:
        """The whole stage."""
        return sum(phase.seconds for phase in self.phases)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `stage=plan` shows and writes."""

    config: RunConfig
    gpu: Gpu
    dtype: str
    base: Base
    stages: tuple[StagePlan, ...]
    searched: Work
    """The stage that `found` is about."""
    found: Found | None
    kinds: list[Kind]
    """Parameters of the searched stage."""

    @property
    def refusals(self) -> list[str]:
        """Why the configured layout is refused, once each."""
        return list(dict.fromkeys(s.refusal for s in self.stages if s.refusal is not None))

    def mfu(self, flops: float, seconds: float) -> float:
        """Share of all GPUs' FLOP/s that a step makes use of."""
        return flops / (seconds * self.gpu.flops * self.config.plan.num_gpus)


def make_plan(config: RunConfig, tell: Advance) -> Plan:
    """Work everything out.

    Args:
        config: of a run.
        tell: is told how far the search is.

    Raises:
        ValueError: sizes that nobody knows, or a recipe without training.
    """
    gpu = GPUS[config.plan.gpu]
    torch_dtype = choose_dtype(config.parallel, torch.device(gpu.device))
    dtype = str(torch_dtype).removeprefix("torch.")
    base = find_base(config)
    works = find_work(config, base.config)
    stages = tuple(_stage_plan(config, work, gpu, dtype) for work in works)
    wanted = config.plan.stage
    searched = max(
        (work for work in works if wanted in (None, work.stage)),
        key=lambda work: sum(work.flops(phase) * phase.steps for phase in work.phases),
    )
    return Plan(
        config=config,
        gpu=gpu,
        dtype=dtype,
        base=base,
        stages=stages,
        searched=searched,
        found=search(config, searched, dtype, tell) if config.plan.search else None,
        kinds=parameters(searched),
    )


def _stage_plan(config: RunConfig, work: Work, gpu: Gpu, dtype: str) -> StagePlan:
    layout = None
    try:
        layout = configured(config, work)
        splits = check(config, work, layout)
        memory = estimate_memory(work, layout, splits, plan=config.plan, dtype=dtype)
        phases = tuple(
            PhasePlan(
                phase=phase,
                split=split,
                time=estimate_time(work, phase, layout, split, plan=config.plan, dtype=dtype),
                flops=work.flops(phase),
            )
            for phase, split in zip(work.phases, splits, strict=True)
        )
    except ValueError as error:
        text = " ".join(str(error).split())
        return StagePlan(work=work, layout=layout, memory=None, phases=(), refusal=text)
    refusal = None
    if not memory.fits:
        refusal = (
            f"{work.entry} needs {memory.total / 2**30:.1f} GiB a rank ({NAMES[memory.when]}), "
            f"{gpu.name} has {gpu.memory / 2**30:.1f}; {_mend(layout)}"
        )
    return StagePlan(work=work, layout=layout, memory=memory, phases=phases, refusal=refusal)


def _mend(layout: Layout) -> str:
    if layout.micro_batch_size > 1:
        return "set a smaller micro_batch_size"
    return "set parallel.recompute=true" if not layout.recompute else "raise parallel.tp or .cp"


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything as plain values: bytes, seconds, FLOPs and counts."""
    best = plan.found.fitting if plan.found else []
    return {
        "schema_version": 1,
        "recipe": plan.config.recipe,
        "gpu": asdict(plan.gpu),
        "assumptions": asdict(plan.config.plan),
        "dtype": plan.dtype,
        "base": {"source": plan.base.source, **asdict(plan.base.config)},
        "parameters": [asdict(kind) for kind in plan.kinds],
        "stages": [_stage_json(plan, stage) for stage in plan.stages],
        "seconds": sum(stage.seconds for stage in plan.stages),
        "refused": plan.refusals,
        "search": None
        if plan.found is None
        else {
            "stage": plan.searched.entry,
            "legal": plan.found.num_legal,
            "followed": plan.found.num_followed,
            "complete": plan.found.complete,
            "fitting": [_estimate_json(plan, estimate) for estimate in best],
            "too_big": [_estimate_json(plan, estimate) for estimate in plan.found.too_big],
            "refused": {
                reason: [asdict(layout) for layout in layouts[:1]]
                for reason, layouts in plan.found.refused.items()
            },
        },
    }


def _memory_json(memory: Memory) -> dict[str, Any]:
    return {
        "peak_bytes": memory.peak,
        "total_bytes": memory.total,
        "capacity_bytes": memory.capacity,
        "fits": memory.fits,
        "highest": memory.when,
        "moments": memory.moments,
        "parts": memory.parts,
        "saved_activations": memory.saved,
        "states": asdict(memory.states),
    }


def _stage_json(plan: Plan, stage: StagePlan) -> dict[str, Any]:
    return {
        "entry": stage.work.entry,
        "layout": None if stage.layout is None else asdict(stage.layout),
        "refused": stage.refusal,
        "loss_fraction": stage.work.loss_fraction,
        "memory": None if stage.memory is None else _memory_json(stage.memory),
        "seconds": stage.seconds,
        "phases": [
            {
                "steps": part.phase.steps,
                "batch_size": part.phase.batch_size,
                "seq_length": part.phase.length,
                "micro_batch_size": part.split.micro_batch_size,
                "num_micro_batches": part.split.num_micro_batches,
                "flops_per_step": part.flops,
                "seconds_per_step": part.time.step,
                "seconds_by_kind": asdict(part.time),
                "tokens_per_s": part.tokens_per_s,
                "mfu": plan.mfu(part.flops, part.time.step),
            }
            for part in stage.phases
        ],
    }


def _estimate_json(plan: Plan, estimate: Estimate) -> dict[str, Any]:
    return {
        "layout": asdict(estimate.layout),
        "overrides": estimate.layout.overrides(plan.searched.stage),
        "seconds_per_step": estimate.time.step,
        "seconds_by_kind": asdict(estimate.time),
        "memory": _memory_json(estimate.memory),
    }


def total_time(plan: Plan) -> str:
    """`convert 3 h 12 min, sft 10 min` of the stages that would run."""
    return ", ".join(f"{s.work.entry} {duration(s.seconds)}" for s in plan.stages if s.phases)
