"""Memory of a rank and time of a step, for one stage under one layout on one kind of GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from allmem_megatron.config import MixerSettings
from pipeline.batches import RankSplit
from pipeline.planning.hardware import GB, GPUS, Gpu
from pipeline.planning.layouts import Layout
from pipeline.planning.passes import Pass, Task, measure
from pipeline.planning.settings import PlanSettings
from pipeline.planning.states import States, states
from pipeline.planning.work import PhaseWork, Work

NAMES = {
    "teacher": "teacher pass",
    "student": "student pass",
    "loss": "loss",
    "backward": "backward pass, last layer",
    "end": "backward pass, first layer",
    "reduction": "reduction of gradients",
    "step": "optimizer's step",
}
"""Moments at which memory can be highest, as tables call them."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of the rank that needs most."""

    moments: dict[str, float]
    """Bytes in tensors at each moment of `NAMES`."""
    parts: dict[str, float]
    """The highest moment's bytes by kind; with the allocator's loss and the reserve they are
    `total`."""
    capacity: float
    """Bytes that the GPU has."""
    states: States
    saved: float
    """Activations kept for the backward pass."""

    @property
    def when(self) -> str:
        """The highest moment."""
        return max(self.moments, key=lambda name: self.moments[name])

    @property
    def peak(self) -> float:
        """Most bytes in tensors at once."""
        return self.moments[self.when]

    @property
    def total(self) -> float:
        """`peak`, what the allocator loses, and the reserve."""
        return sum(self.parts.values())

    @property
    def activations(self) -> float:
        """Of `total`, what a pass of more sequences needs more of."""
        kinds = ("activations", "communication", "temporary")
        return sum(self.parts.get(kind, 0.0) for kind in kinds)

    @property
    def fits(self) -> bool:
        """Whether the GPU has as much."""
        return self.total <= self.capacity


@dataclass(frozen=True, kw_only=True)
class Time:
    """Seconds of one optimizer step."""

    compute: float = 0.0
    """Matrix products at `plan.mfu` of the GPU's FLOP/s."""
    traffic: float = 0.0
    """All other operations, by the bytes that they read and write."""
    launch: float = 0.0
    """Starting all kernels one after the other: the step takes at least that long."""
    waiting: float = 0.0
    """Of the last context-parallel rank, for the memory's state from the ranks before it."""
    communication: float = 0.0
    """Collectives and transfers, nothing hidden behind computing."""

    @property
    def step(self) -> float:
        """All of it."""
        return max(self.compute + self.traffic, self.launch) + self.waiting + self.communication

    @property
    def bound(self) -> str:
        """What most of the step is."""
        if self.launch > self.compute + self.traffic:
            return "launches"
        names = {name: getattr(self, name) for name in ("compute", "traffic", "communication")}
        return max(names, key=lambda name: names[name])


def task_of(
    work: Work,
    phase: PhaseWork,
    layout: Layout,
    micro_batch_size: int,
    *,
    gpu: Gpu,
    dtype: str,
) -> Task:
    """What a pass of a phase depends on, with typical s, W and c."""
    return Task(
        stage=work.stage,
        base=work.base,
        memory=work.memory,
        branch=work.branch,
        mixer=phase.typical,
        trains=work.trains,
        dtype=getattr(torch, dtype),
        kind=gpu.device,
        num_processors=gpu.processors,
        length=phase.length,
        micro_batch_size=micro_batch_size,
        loss_tokens=work.loss_fraction * phase.length,
        logits_elements=work.settings.logits_elements,
        recompute=layout.recompute,
        tp=layout.tp,
        sp=layout.sp,
        cp=layout.cp,
        cp_mode=layout.cp_mode,
    )


def followed(
    work: Work,
    phase: PhaseWork,
    layout: Layout,
    micro_batch_size: int,
    *,
    gpu: Gpu,
    dtype: str,
    typical: bool = False,
) -> Pass:
    """A pass of a phase, followed through the real code.

    Args:
        work: the stage.
        phase: which of its phases.
        layout: how it is split.
        micro_batch_size: sequences of a pass in this phase.
        gpu: the planned device.
        dtype: `float32` or `bfloat16`.
        typical: with s, W and c from the middle of what is drawn; else with those that need most
            memory.

    Raises:
        ValueError: what the model itself refuses.
    """
    task = task_of(work, phase, layout, micro_batch_size, gpu=gpu, dtype=dtype)
    if typical:
        return measure(task)
    return measure(replace(task, mixer=_heaviest_mixer(task, phase.heaviest)))


def heaviest_phase(work: Work, splits: list[RankSplit]) -> tuple[PhaseWork, RankSplit]:
    """The phase with most tokens in a pass; of several the one with the widest window."""

    def weight(pair: tuple[PhaseWork, RankSplit]) -> tuple[int, int]:
        phase, split = pair
        widest = max(mixer.window_size for mixer in phase.heaviest)
        return phase.length * split.micro_batch_size, widest

    return max(zip(work.phases, splits, strict=True), key=weight)


def _heaviest_mixer(task: Task, ends: tuple[MixerSettings, ...]) -> MixerSettings:
    """Which end of the ranges needs most memory, found on one rank with one sequence."""
    if len(ends) == 1:
        return ends[0]
    alone = replace(task, tp=1, sp=False, cp=1, cp_mode="wavefront", micro_batch_size=1)

    def peak(mixer: MixerSettings) -> float:
        return max(measure(replace(alone, mixer=mixer)).peaks.values())

    return max(ends, key=peak)


def estimate_memory(
    work: Work, layout: Layout, splits: list[RankSplit], *, plan: PlanSettings, dtype: str
) -> Memory:
    """Bytes of the fullest rank in the stage's heaviest phase.

    Raises:
        ValueError: what the model itself refuses.
    """
    gpu = GPUS[plan.gpu]
    phase, split = heaviest_phase(work, splits)
    found = followed(work, phase, layout, split.micro_batch_size, gpu=gpu, dtype=dtype)
    rest = states(
        trained=found.trained,
        frozen=found.frozen,
        element=getattr(torch, dtype).itemsize,
        zero_stage=layout.zero_stage,
        zero_size=layout.zero_size,
        num_micro_batches=split.num_micro_batches,
        kind=gpu.device,
    )
    return _combine(found, rest, layout, getattr(torch, dtype).itemsize, gpu, plan)


def _combine(
    found: Pass, rest: States, layout: Layout, element: int, gpu: Gpu, plan: PlanSettings
) -> Memory:
    """Put a pass and what stands beside it together."""

    def beside(name: str) -> float:
        """Gradients and their buffers at a moment of the pass."""
        formed = found.gradients[name]
        buffers = rest.buffers if layout.zero_stage == 3 or name in ("backward", "end") else 0.0
        if gpu.device == "cpu":  # memory that nobody has written to yet costs nothing
            buffers = min(buffers, element * formed)
        return rest.gradients + buffers + rest.growth * formed

    moments = {
        name: rest.held + rest.gathered + peak + beside(name) for name, peak in found.peaks.items()
    }
    moments["reduction"] = rest.held + rest.reduction
    moments["step"] = rest.held + rest.step
    when = max(moments, key=lambda name: moments[name])
    parts = {"weights": rest.weights + rest.gathered, "optimizer": rest.optimizer}
    if when in found.peaks:
        kept = 0.0 if when == "teacher" else min(found.saved, found.peaks[when])
        if when == "end":
            kept = 0.0
        carried = min(found.communication, found.peaks[when] - kept)
        parts |= {
            "gradients": beside(when),
            "activations": kept,
            "communication": carried,
            "temporary": found.peaks[when] - kept - carried,
        }
    else:
        parts |= {"gradients": moments[when] - rest.held - rest.gathered}
    if gpu.device == "cuda":
        parts["allocator"] = plan.fragmentation * moments[when]
        parts["reserve"] = plan.reserve_gb * GB
    return Memory(moments=moments, parts=parts, capacity=gpu.memory, states=rest, saved=found.saved)


def estimate_time(
    work: Work,
    phase: PhaseWork,
    layout: Layout,
    split: RankSplit,
    *,
    plan: PlanSettings,
    dtype: str,
) -> Time:
    """Seconds of one step of a phase."""
    gpu = GPUS[plan.gpu]
    passes = split.num_micro_batches
    size = split.micro_batch_size
    found = followed(work, phase, layout, size, gpu=gpu, dtype=dtype, typical=True)
    compute = compute_seconds(work, phase, layout, plan)
    traffic = found.traffic * passes / gpu.bandwidth
    launch = found.kernels * passes * gpu.launch_s
    moved = sum(passes * sent / _bandwidth(ranks, plan, gpu) for ranks, sent in found.sent.items())
    moved += _zero_seconds(found, layout, passes, getattr(torch, dtype).itemsize, plan, gpu)
    return Time(
        compute=compute,
        traffic=traffic,
        launch=launch,
        waiting=_waiting(work, phase, layout, max(compute + traffic, launch), passes),
        communication=moved,
    )


def compute_seconds(work: Work, phase: PhaseWork, layout: Layout, plan: PlanSettings) -> float:
    """Matrix products of one step on the rank that has most of them."""
    flops = work.flops(phase)
    if layout.recompute:
        flops += work.again(phase)[0]
    if layout.cp > 1 and work.full_attention and not _balanced(work, layout):
        # causal: the last part of a sequence attends to (2 - 1/R) times the mean number of keys
        base = work.base
        keys = base.num_layers * 4.0 * base.num_heads * base.head_dim * phase.length / 2
        passes = 3 + layout.recompute if work.stage == "pretrain" else 1
        flops += phase.batch_size * phase.length * keys * passes * (1 - 1 / layout.cp)
    return flops / (layout.num_gpus * GPUS[plan.gpu].flops * plan.mfu)


def _balanced(work: Work, layout: Layout) -> bool:
    """Whether full attention is split by heads: `a2a`, where key-value heads are enough."""
    return layout.cp_mode == "a2a" and (work.base.num_kv_heads // layout.tp) % layout.cp == 0


def _waiting(work: Work, phase: PhaseWork, layout: Layout, busy: float, passes: int) -> float:
    """The wavefront's start: R - 1 ranks scan one layer before the last rank can, each way."""
    if layout.cp == 1 or layout.cp_mode != "wavefront" or work.stage == "pretrain":
        return 0.0
    student, branch = work.again(phase)
    times = 3 + layout.recompute
    share = branch * times / (work.flops(phase) + (student if layout.recompute else 0))
    return busy * share * (layout.cp - 1) / work.base.num_layers / passes


def _bandwidth(ranks: tuple[int, ...], plan: PlanSettings, gpu: Gpu) -> float:
    """Bytes/s between the ranks of a group; ranks of a machine are neighbours."""
    machines = {rank // plan.gpus_per_node for rank in ranks}
    return gpu.link if len(machines) == 1 else plan.node_gb_s * GB


def _zero_seconds(
    found: Pass, layout: Layout, passes: int, element: int, plan: PlanSettings, gpu: Gpu
) -> float:
    """Gradients reduced and weights gathered over DP x CP."""
    z = layout.zero_size
    if z == 1:
        return 0.0
    ranks = tuple(range(0, layout.num_gpus, layout.tp))
    share = (z - 1) / z
    gathered = found.trained * element
    reduced = found.trained * element * (passes if layout.zero_stage >= 2 else 1)
    if layout.zero_stage < 2:
        reduced *= 2  # an all-reduce
    if layout.zero_stage == 3:  # before the forward and again before the backward pass
        gathered = (found.trained + found.frozen) * element * 2 * passes
    return share * (gathered + reduced) / _bandwidth(ranks, plan, gpu)
