"""Layouts: which there are for a number of GPUs, and what the program says to each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from pipeline.batches import RankSplit, split_over_ranks
from pipeline.distributed import Ranks
from pipeline.layout import check_layout
from pipeline.models import check_length, choose_dtype
from pipeline.planning.hardware import GPUS
from pipeline.planning.work import Work
from pipeline.schema import RunConfig, StageChoice
from pipeline.zero import check_zero

MODES: tuple[Literal["wavefront", "a2a"], ...] = ("wavefront", "a2a")

MICRO_BATCHES = (1, 2, 4, 8, 16)
"""Sequences of a pass that are tried, beside the rank's whole share."""


@dataclass(frozen=True, kw_only=True, order=True)
class Layout:
    """How a stage's work is split over the GPUs."""

    tp: int = 1
    sp: bool = False
    cp: int = 1
    cp_mode: Literal["wavefront", "a2a"] = "wavefront"
    dp: int = 1
    zero_stage: int = 2
    micro_batch_size: int = 1
    """In the stage's first phase."""
    recompute: bool = False

    @property
    def num_gpus(self) -> int:
        """Ranks in all."""
        return self.tp * self.cp * self.dp

    @property
    def zero_size(self) -> int:
        """Ranks that ZeRO splits over."""
        return self.cp * self.dp

    def overrides(self, stage: str) -> str:
        """What to put on the command line to run it."""
        words = [f"parallel.tp={self.tp}", f"parallel.sp={str(self.sp).lower()}"]
        words += [f"parallel.cp={self.cp}"]
        words += [f"parallel.cp_mode={self.cp_mode}"] if self.cp > 1 else []
        words += [f"parallel.zero_stage={self.zero_stage}"]
        words += [f"parallel.recompute={str(self.recompute).lower()}"]
        return " ".join([*words, f"{stage}.micro_batch_size={self.micro_batch_size}"])


def configured(config: RunConfig, work: Work) -> Layout:
    """The layout that the configuration asks for.

    Raises:
        ValueError: it does not split over `plan.num_gpus`.
    """
    parallel = config.parallel
    ranks = _ranks(config.plan.num_gpus, parallel.tp, parallel.cp)
    split = _splits(work, ranks.dp_size)[0]
    return Layout(
        tp=parallel.tp,
        sp=parallel.sp,
        cp=parallel.cp,
        cp_mode=parallel.cp_mode,
        dp=ranks.dp_size,
        zero_stage=parallel.zero_stage,
        micro_batch_size=split.micro_batch_size,
        recompute=parallel.recompute,
    )


def with_layout(config: RunConfig, work: Work, layout: Layout) -> RunConfig:
    """The configuration of one stage under a layout, as if its values had been given.

    Raises:
        ValueError: values that the schema refuses.
    """
    parallel = replace(
        config.parallel,
        tp=layout.tp,
        sp=layout.sp,
        cp=layout.cp,
        cp_mode=layout.cp_mode,
        zero_stage=layout.zero_stage,
        recompute=layout.recompute,
    )
    settings = replace(work.settings, micro_batch_size=layout.micro_batch_size)
    changes = {work.stage: settings, "parallel": parallel, "stage": StageChoice(name=work.entry)}
    return replace(config, **changes)  # type: ignore[arg-type]


def check(config: RunConfig, work: Work, layout: Layout) -> list[RankSplit]:
    """Ask the program's own checks, those of a run's start, about a layout.

    Returns:
        how each phase's batches are cut.

    Raises:
        ValueError: what a run with this layout would say.
    """
    asked = with_layout(config, work, layout)
    device = torch.device(GPUS[config.plan.gpu].device)
    check_zero(layout.zero_stage, choose_dtype(config.parallel, device))
    ranks = _ranks(layout.num_gpus, layout.tp, layout.cp)
    check_layout(asked, work.base, ranks)
    settings = asked.train_settings(work.stage)
    check_length(work.stage, settings, config.data.seq_length, work.base)
    return _splits(replace(work, settings=settings), ranks.dp_size)


def candidates(config: RunConfig, work: Work) -> Iterator[Layout]:
    """All layouts of `plan.num_gpus` GPUs, legal or not; ZeRO stage 2 stands for all stages."""
    gpus = config.plan.num_gpus
    for tp in _divisors(gpus):
        for cp in _divisors(gpus // tp):
            dp = gpus // tp // cp
            share = max(work.phases[0].batch_size // dp, 1)
            sizes = sorted({size for size in (*MICRO_BATCHES, share) if size <= share})
            for sp in (False, True) if tp > 1 else (False,):
                for mode in MODES if cp > 1 else MODES[:1]:
                    for recompute in (False, True):
                        for size in sizes:
                            yield Layout(
                                tp=tp,
                                sp=sp,
                                cp=cp,
                                cp_mode=mode,
                                dp=dp,
                                micro_batch_size=size,
                                recompute=recompute,
                            )


def _ranks(num_gpus: int, tp: int, cp: int) -> Ranks:
    world = Ranks(rank=0, local_rank=0, world_size=num_gpus, device=torch.device("cpu"))
    return world.with_layout(tp=tp, cp=cp)


def _splits(work: Work, dp_size: int) -> list[RankSplit]:
    settings = work.settings
    phases = [settings.of_phase(number) for number in range(max(len(settings.phases), 1))]
    return split_over_ranks(work.stage, phases, dp_size)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
