"""The fastest layouts that fit, in the order of a rough guess, so that few passes are followed.

A way to split (TP, SP, CP, its mode, recomputation) is followed with one sequence a pass. More
sequences a pass need at most as many times the memory and start no more kernels, so the most that
fit are the fastest; and the fastest ZeRO stage among those that fit is taken.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field, replace

from pipeline.batches import RankSplit
from pipeline.console import Advance
from pipeline.planning.estimate import (
    Memory,
    Time,
    compute_seconds,
    estimate_memory,
    estimate_time,
    followed,
    heaviest_phase,
)
from pipeline.planning.hardware import GPUS
from pipeline.planning.layouts import Layout, candidates, check
from pipeline.planning.passes import Pass
from pipeline.planning.work import Work
from pipeline.schema import RunConfig

ZERO_STAGES = (2, 1, 3)
"""In the order in which they are preferred where they are as fast; stage 0 is for float32 tests."""

SEARCH_S = 60.0
"""Seconds after which the search shows what it has."""

EXCHANGES = 12
"""Guess of all-reduces of a layer's output, forward, recomputed and backward, for the order."""

Way = tuple[int, bool, int, str, bool]
Split = tuple[Layout, list[RankSplit]]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A layout with what it needs."""

    layout: Layout
    memory: Memory
    time: Time
    """Of the phase with most tokens in a pass."""


@dataclass(kw_only=True)
class Found:
    """What a search gives."""

    fitting: list[Estimate] = field(default_factory=list)
    """The fastest first, one for each way to split and recompute."""
    too_big: list[Estimate] = field(default_factory=list)
    """Ways that do not fit with one sequence a pass, with what they would need."""
    refused: dict[str, list[Layout]] = field(default_factory=lambda: defaultdict(list))
    """Layouts by what the program says to them."""
    num_legal: int = 0
    num_followed: int = 0
    """Ways to split whose passes were followed through the real code."""
    seconds: float = 0.0
    """Time of the search."""
    complete: bool = True
    """False where time ran out before all that could be among the fastest were tried."""


def search(config: RunConfig, work: Work, dtype: str, tell: Advance) -> Found:
    """Look for the fastest layouts of `plan.num_gpus` GPUs that fit.

    Args:
        config: gives `plan`, and everything that the program's checks ask for.
        work: the stage.
        dtype: type of weights and activations.
        tell: is told how many ways to split have been followed.
    """
    return _Search(config, work, dtype, tell).run()


class _Search:
    def __init__(self, config: RunConfig, work: Work, dtype: str, tell: Advance) -> None:
        self.tell = tell
        self.config, self.plan, self.work, self.dtype = config, config.plan, work, dtype
        self.gpu = GPUS[config.plan.gpu]
        self.found = Found()
        self._alone: dict[bool, Pass] = {}

    def run(self) -> Found:
        found, start = self.found, time.monotonic()
        ways = self._legal_ways()
        guesses = {
            way: min(self._guess(*split) for split in splits) for way, splits in ways.items()
        }
        for way in sorted(ways, key=lambda way: (guesses[way], way)):
            ranked = sorted(estimate.time.step for estimate in found.fitting)
            if len(ranked) >= self.plan.top and guesses[way] > ranked[self.plan.top - 1]:
                break
            if time.monotonic() > start + SEARCH_S:
                found.complete = False
                break
            if self._cannot_fit(ways[way][0][0]):
                continue
            try:
                self._follow(ways[way])
            except ValueError as error:  # what only the model itself checks
                found.refused[str(error)].extend(layout for layout, _ in ways[way])
                found.num_legal -= len(ways[way])
            self.tell(found.num_followed, f"{len(found.fitting)} fit")
        found.fitting.sort(key=lambda estimate: estimate.time.step)
        del found.fitting[self.plan.top :]
        found.seconds = time.monotonic() - start
        return found

    def _legal_ways(self) -> dict[Way, list[Split]]:
        ways: dict[Way, list[Split]] = defaultdict(list)
        for layout in candidates(self.config, self.work):
            try:
                splits = check(self.config, self.work, layout)
            except ValueError as error:
                self.found.refused[str(error)].append(layout)
                continue
            way = (layout.tp, layout.sp, layout.cp, layout.cp_mode, layout.recompute)
            ways[way].append((layout, splits))
            self.found.num_legal += 1
        return ways

    def _follow(self, splits: list[Split]) -> None:
        """Take the largest batch and the best ZeRO stage that fit."""
        smallest, *_ = splits
        self.found.num_followed += 1
        estimates = self._zero_stages(*smallest)
        fitting = [estimate for estimate in estimates if estimate.memory.fits]
        if not fitting:
            self.found.too_big.append(min(estimates, key=lambda item: item.memory.total))
            return
        room = max(_room(estimate.memory) for estimate in fitting)
        share = room * smallest[0].micro_batch_size
        for split in sorted(splits[1:], key=lambda split: -split[0].micro_batch_size):
            if split[0].micro_batch_size > share:
                continue
            larger = [item for item in self._zero_stages(*split) if item.memory.fits]
            if larger:
                fitting += larger
                break
        self.found.fitting.append(min(fitting, key=lambda item: round(item.time.step, 3)))

    def _zero_stages(self, layout: Layout, splits: list[RankSplit]) -> list[Estimate]:
        stages = ZERO_STAGES if layout.zero_size > 1 else ZERO_STAGES[:1]
        phase, split = heaviest_phase(self.work, splits)
        estimates = []
        for stage in stages:
            one = replace(layout, zero_stage=stage)
            memory = estimate_memory(self.work, one, splits, plan=self.plan, dtype=self.dtype)
            seconds = Time()
            if memory.fits:
                seconds = estimate_time(
                    self.work, phase, one, split, plan=self.plan, dtype=self.dtype
                )
            estimates.append(Estimate(layout=one, memory=memory, time=seconds))
        return estimates

    def _reference(self, recompute: bool) -> Pass:
        """A pass of one sequence on one rank."""
        if recompute not in self._alone:
            single = Layout(recompute=recompute)
            phase = max(self.work.phases, key=lambda phase: phase.length)
            self._alone[recompute] = followed(
                self.work, phase, single, 1, gpu=self.gpu, dtype=self.dtype, typical=True
            )
        return self._alone[recompute]

    def _guess(self, layout: Layout, splits: list[RankSplit]) -> float:
        """Seconds of a step, roughly."""
        phase, split = heaviest_phase(self.work, splits)
        alone, passes = self._reference(layout.recompute), split.num_micro_batches
        shares = layout.tp * layout.cp
        sequences = passes * split.micro_batch_size
        busy = compute_seconds(self.work, phase, layout, self.plan)
        busy += sequences * alone.traffic / shares / self.gpu.bandwidth
        launch = passes * alone.kernels * self.gpu.launch_s
        if layout.cp > 1 and layout.cp_mode == "wavefront":
            launch /= layout.cp
        width = self.work.base.hidden_size * self.work.base.num_layers * 2
        moved = EXCHANGES * sequences * phase.length / layout.cp * width
        moved *= 2 * (layout.tp - 1) / layout.tp
        return max(busy, launch) + moved / self.gpu.link

    def _cannot_fit(self, layout: Layout) -> bool:
        """Whether the activations of a single rank, evenly split, are already too many."""
        kept = self._reference(layout.recompute).saved / (layout.tp * layout.cp)
        return not layout.recompute and kept * layout.micro_batch_size > self.gpu.memory


def _room(memory: Memory) -> float:
    """How many times a pass fits beside what is held."""
    held = memory.total - memory.activations
    return (memory.capacity - held) / memory.activations if memory.activations else 1.0
