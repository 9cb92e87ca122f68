"""One forward and backward pass of a training stage on a planned device: bytes, kernels, traffic.

The stage's own objective runs over the real model with at most two layers. Every layer does the
same, so what the second one adds is what each further one would: activations kept for the backward
pass, kernels, bytes moved. The backward pass has two places for its peak: the last layer, when
everything is kept, and the first one, when all gradients are there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from allmem_megatron.config import BaseModelConfig, MemoryConfig, MixerSettings
from allmem_megatron.model import AllMemGPTModel, build_model
from pipeline.batches import MicroBatch
from pipeline.models import trained_parameters
from pipeline.objectives import Align, Distill, NextToken, Objective
from pipeline.planning.device import (
    META,
    backward,
    planned,
    planned_ranks,
)
from pipeline.planning.tracker import MemoryTracker, Phase

TRACED_LAYERS = 2
LARGEST_TRACE = 64
"""Chunks of the memory that a pass is followed through; longer ones go on in a straight line."""
ATTENTION_BACKWARD_BYTES = {"cuda": 4, "cpu": 0}
"""CUDA's attention sums the gradient of its queries in float32."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything that the memory of one forward and backward pass depends on."""

    stage: str
    base: BaseModelConfig
    memory: MemoryConfig
    branch: str
    mixer: MixerSettings
    trains: str
    """`memory`, `base` or `all`."""
    dtype: torch.dtype
    kind: str
    """`cuda` or `cpu`."""
    num_processors: int = 0
    """Streaming multiprocessors of a GPU."""
    length: int
    """Tokens of a sequence, over all ranks."""
    micro_batch_size: int
    loss_tokens: float
    """Loss tokens of one sequence."""
    documents: int = 1
    """Documents packed in a sequence."""
    logits_elements: int
    recompute: bool
    tp: int = 1
    sp: bool = False
    cp: int = 1
    cp_mode: str = "wavefront"
    num_layers: int = 0
    """Layers to run; 0 for as many as are needed."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What a forward and backward pass of one micro-batch needs on one rank, all layers counted."""

    saved: float
    """Bytes kept for the backward pass when the loss is formed."""
    peaks: dict[str, float]
    """Most bytes beside weights, gradients and optimizer: `teacher`, `student`, `loss`, `backward`
    (at the last layer) and `end` (of the backward pass, at the first layer)."""
    gradients: dict[str, float]
    """Numbers of trained parameters that have a gradient by then; the same keys."""
    communication: float
    """Bytes in buffers of collectives and transfers at the highest peak."""
    traffic: float
    """Bytes that operations other than matrix products read and write."""
    kernels: float
    """Kernels started."""
    sent: dict[tuple[int, ...], float]
    """Bytes that this rank sends to others, by the ranks of the group."""
    trained: float
    """Trained numbers on this rank."""
    frozen: float
    """The other weights of this rank, in numbers."""

    def fuller(self, other: Pass) -> Pass:
        """This pass with the larger of both ranks' bytes at each moment."""
        return replace(
            self,
            saved=max(self.saved, other.saved),
            peaks={name: max(value, other.peaks[name]) for name, value in self.peaks.items()},
            communication=max(self.communication, other.communication),
        )

    def along(self, other: Pass, at: float) -> Pass:
        """The straight line through this pass (0) and another (1), at `at`."""

        def line(a: float, b: float) -> float:
            return max(a + (b - a) * at, 0.0)

        ranks = self.sent.keys() | other.sent.keys()
        return Pass(
            saved=line(self.saved, other.saved),
            peaks={name: line(value, other.peaks[name]) for name, value in self.peaks.items()},
            gradients=self.gradients,
            communication=line(self.communication, other.communication),
            traffic=line(self.traffic, other.traffic),
            kernels=line(self.kernels, other.kernels),
            sent={r: line(self.sent.get(r, 0.0), other.sent.get(r, 0.0)) for r in ranks},
            trained=self.trained,
            frozen=self.frozen,
        )


def measure(task: Task) -> Pass:
    """Follow one pass; very long sequences are followed at two shorter lengths.

    Raises:
        ValueError: what the model refuses: sizes that do not split over the ranks, and so on.
    """
    unit = max(task.mixer.chunk_size, 1) * task.cp
    chunks = task.length / unit
    if task.micro_batch_size > 2:
        one, two = (replace(task, micro_batch_size=n) for n in (1, 2))
        return measure(one).along(measure(two), task.micro_batch_size - 1)
    shorter = [unit * (LARGEST_TRACE // part) for part in (4, 2)]
    if chunks <= LARGEST_TRACE or shorter[0] < 2 * task.mixer.window_size or task.documents > 1:
        return _follow(task)
    share = task.loss_tokens / task.length
    low, high = (
        _follow(replace(task, length=length, loss_tokens=share * length)) for length in shorter
    )
    return low.along(high, (task.length - shorter[0]) / (shorter[1] - shorter[0]))


def _follow(task: Task) -> Pass:
    """The fullest rank's pass: the last one receives most, the one before it also sends."""
    last = _follow_rank(task, task.cp - 1)
    return last if task.cp <= 2 else last.fuller(_follow_rank(task, task.cp - 2))


def objective_for(task: Task, model: AllMemGPTModel) -> Objective:
    """The stage's objective, as `pipeline.stages` makes it."""
    kind = {"align": Align, "convert": Distill}.get(task.stage, NextToken)
    mode = cast(Any, None if task.cp == 1 else task.cp_mode)
    return kind(model, max_elements=task.logits_elements, cp_mode=mode)


@lru_cache(maxsize=512)
def _follow_rank(task: Task, cp_rank: int) -> Pass:
    rank = task.tp * (cp_rank + 1) - 1
    layers = task.num_layers or min(task.base.num_layers, TRACED_LAYERS)
    with planned_ranks(tp=task.tp, cp=task.cp, rank=rank):
        model = build_model(
            replace(task.base, num_layers=layers),
            branch="none" if task.stage == "pretrain" else task.branch,
            memory=task.memory,
            dtype=task.dtype,
            recompute=task.recompute,
            sequence_parallel=task.sp,
            meta=True,
        )
        trained = trained_parameters(model, task.trains)
        objective = objective_for(task, model)
        tracker = MemoryTracker(
            loss_tokens=round(task.loss_tokens * task.micro_batch_size / task.cp),
            attention_backward_bytes=ATTENTION_BACKWARD_BYTES[task.kind],
            gathers_copy=task.kind == "cpu",
        )
        _run(task, cp_rank, objective, tracker, list(trained.values()))
        numbers = [
            _numbers(objective.model, trained, part) for part in ("", f".layers.{layers - 1}.")
        ]
    return _extrapolate(tracker.phases, layers, task.base.num_layers, *numbers)


def _numbers(model: AllMemGPTModel, trained: dict[str, nn.Parameter], part: str) -> tuple[int, int]:
    """Trained and frozen numbers of the parameters with `part` in their names."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if part in name}
    chosen = sum(size for name, size in sizes.items() if name in trained)
    return chosen, sum(sizes.values()) - chosen


def _run(
    task: Task,
    cp_rank: int,
    objective: Objective,
    tracker: MemoryTracker,
    trained: list[nn.Parameter],
) -> None:
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(tracker.drop_gradient)
    _mark_phases(objective.model, tracker)
    batch = _micro_batch(task)
    if task.cp > 1:
        batch = batch.shard(cp_rank, task.cp)
    tracker.leave_out((*objective.model.parameters(), *objective.model.buffers()))
    where = planned(task.kind, num_processors=task.num_processors, tell=tracker.launch)
    with tracker, where, objective.active(task.mixer):
        with objective.step(objective, [batch], 1.0):
            loss, _ = objective(batch)
        tracker.enter("backward")
        backward(loss)
        del loss
        tracker.close()


def _micro_batch(task: Task) -> MicroBatch:
    rows, length = task.micro_batch_size, task.length
    borders = None
    if task.documents > 1:
        # of different lengths, as packed documents are
        shares = (
            torch.arange(1, task.documents + 1).cumsum(0)
            * length
            // sum(range(1, task.documents + 1))
        )
        row = torch.cat([torch.zeros(1, dtype=torch.int64), shares])
        borders = torch.cat([row[:1], *(row[1:] + i * length for i in range(rows))]).int()
        rows, length = 1, rows * length
    tokens = torch.empty(rows, length, dtype=torch.int64, device=META)
    targets = torch.empty(rows, length, dtype=torch.bool, device=META)
    return MicroBatch(tokens, targets, torch.empty_like(tokens), borders)


def _mark_phases(model: AllMemGPTModel, tracker: MemoryTracker) -> None:
    """Tell the tracker when a layer begins, forward and backward."""

    def before(number: int) -> None:
        name = "student" if torch.is_grad_enabled() else "teacher"
        tracker.enter(f"{name}/{number}")

    def after(number: int, out: Tensor | tuple[Tensor, ...]) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        if number == len(model.decoder.layers) - 1:
            tracker.enter("loss" if torch.is_grad_enabled() else "teacher/out")
        if hidden.requires_grad:
            hidden.register_hook(lambda _: tracker.enter(f"backward/{number}"))

    for number, layer in enumerate(model.decoder.layers):
        layer.register_forward_pre_hook(lambda *_, n=number: before(n))
        layer.register_forward_hook(lambda module, arguments, out, n=number: after(n, out))


def _extrapolate(
    phases: dict[str, Phase],
    traced: int,
    layers: int,
    numbers: tuple[int, int],
    of_layer: tuple[int, int],
) -> Pass:
    """From `traced` layers to `layers`.

    Args:
        phases: what the tracker noted.
        traced: layers that ran.
        layers: layers of the model.
        numbers: trained and frozen numbers of the traced model on this rank.
        of_layer: the same of one layer.
    """
    more = layers - traced
    forward = [phases[f"student/{i}"].end for i in range(traced)]
    kept = max(forward[-1] - forward[-2], 0) if traced > 1 else 0
    extra = more * kept

    def peak(*prefixes: str) -> float:
        found = [p.peak for name, p in phases.items() if name.startswith(prefixes)]
        return float(max(found, default=0))

    last, first = f"backward/{traced - 1}", "backward/0"
    late = [name for name in phases if name == first] if traced > 1 else []
    # what a layer's backward pass does not let go of: messages kept for recomputation
    let_go = phases[last].start - phases[first].start if late else 0
    held = max(kept - let_go / (traced - 1), 0) if late else 0
    early = [name for name in phases if name.startswith("backward") and name not in late]
    peaks = {
        "teacher": peak("teacher", "start"),
        "student": peak("student") + extra,
        "loss": peak("loss") + extra,
        "backward": max(phases[name].peak for name in early) + max(extra, more * held),
        "end": max((phases[name].peak for name in late), default=0) + more * held,
    }
    trained, frozen = (float(a + more * b) for a, b in zip(numbers, of_layer, strict=True))
    # gradients that are there when the last layer is through; all, where that cannot be told
    early_on = float(max(phases[name].gradients for name in early)) if late else trained
    gradients = dict.fromkeys(peaks, 0.0) | {"backward": early_on, "end": trained}
    again = [
        name for name in (f"teacher/{traced - 1}", f"student/{traced - 1}", last) if name in phases
    ]
    times = {name: 1.0 + (more if name in again else 0) for name in phases}
    if last not in phases:  # align: layers do not pass gradients on, so nothing tells them apart
        times["backward"] += more / traced
    counted = [(phases[name], times[name]) for name in phases]
    sent: dict[tuple[int, ...], float] = {}
    for phase, factor in counted:
        for ranks, moved in phase.sent.items():
            sent[ranks] = sent.get(ranks, 0.0) + factor * moved
    highest = max(phases.values(), key=lambda phase: phase.peak)
    return Pass(
        saved=float(forward[-1]) + extra,
        peaks=peaks,
        gradients=gradients,
        communication=float(highest.peak_communication),
        traffic=sum(phase.traffic * factor for phase, factor in counted),
        kernels=sum(phase.kernels * factor for phase, factor in counted),
        sent=sent,
        trained=trained,
        frozen=frozen,
    )
