"""What the training stages of a recipe will do, phase by phase, without their data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from allmem_megatron.config import BaseModelConfig, MemoryConfig, MixerSettings
from pipeline.config import split_entry
from pipeline.flops import layer_flops, step_flops
from pipeline.lineage import branch_of, stored_length
from pipeline.schedule import draw_mixer
from pipeline.schema import TRAINING_STAGES, RunConfig
from pipeline.train_schema import RandomMixerSettings, TrainSettings

DRAWS = 32
"""Steps of a phase whose random s, W and c stand for all of them."""


@dataclass(frozen=True, kw_only=True)
class PhaseWork:
    """A part of a stage with one length and batch."""

    number: int
    steps: int
    batch_size: int
    """Sequences of a step, over all ranks."""
    length: int
    """Tokens of a sequence."""
    mixers: tuple[MixerSettings, ...]
    """Settings that its steps draw."""
    heaviest: tuple[MixerSettings, ...]
    """Settings at the ends of the ranges, among which the one that needs most memory is."""

    @property
    def typical(self) -> MixerSettings:
        """Settings near the middle of what is drawn."""
        ordered = sorted(self.mixers, key=lambda mixer: (mixer.chunk_size, mixer.window_size))
        return ordered[len(ordered) // 2]


@dataclass(frozen=True, kw_only=True)
class Work:
    """A training entry of the recipe."""

    entry: str
    stage: str
    branch: str
    trains: str
    """`memory`, `base` or `all`."""
    base: BaseModelConfig
    memory: MemoryConfig
    settings: TrainSettings
    phases: tuple[PhaseWork, ...]
    loss_fraction: float
    """Loss tokens of a token."""

    @property
    def trains_base(self) -> bool:
        """Whether gradients of the base's weights are formed."""
        return self.trains != "memory"

    def flops(self, phase: PhaseWork) -> float:
        """FLOPs of one step over all ranks, recomputation not counted."""
        tokens = phase.batch_size * phase.length
        return mean(
            step_flops(
                self.stage,
                self.base,
                None if self.stage == "pretrain" else self.memory,
                mixer,
                length=phase.length,
                num_tokens=tokens,
                loss_tokens=round(tokens * self.loss_fraction) if self.stage != "align" else 0,
                trains_base=self.trains_base,
            )
            for mixer in phase.mixers
        )

    def again(self, phase: PhaseWork) -> tuple[float, float]:
        """FLOPs of one step's student forward pass, and of its branch: what recomputation adds."""
        memory = None if self.stage == "pretrain" else self.memory
        layers = [layer_flops(self.base, memory, m, phase.length) for m in phase.mixers]
        tokens = self.base.num_layers * phase.batch_size * phase.length
        student, branch = (tokens * mean(values) for values in zip(*layers, strict=True))
        return (branch if self.stage == "align" else student), branch

    @property
    def full_attention(self) -> bool:
        """Whether a step computes full attention: as the teacher, or as what is trained."""
        return self.stage in ("convert", "align", "pretrain")


def find_work(config: RunConfig, base: BaseModelConfig) -> list[Work]:
    """The recipe's training entries in order.

    Raises:
        ValueError: there are none, or the recipe has no entry of `plan.stage`.
    """
    fraction = config.plan.loss_fraction or _prepared_fraction(Path(config.run.dir)) or 1.0
    found = []
    for entry in config.stages:
        name, _ = split_entry(entry)
        if name not in TRAINING_STAGES:
            continue
        settings = config.train_settings(entry)
        trains = {"pretrain": "base", "sft": config.sft.train}.get(name, "memory")
        found.append(
            Work(
                entry=entry,
                stage=name,
                branch=branch_of(config, entry),
                trains=trains,
                base=base,
                memory=config.mixer.memory,
                settings=settings,
                phases=tuple(_phases(config, entry, settings)),
                loss_fraction=fraction,
            )
        )
    wanted = config.plan.stage
    names = [work.stage for work in found]
    if not found or (wanted is not None and wanted not in names):
        raise ValueError(
            f"recipe={config.recipe} has the training stages {names or 'none'}; "
            f"choose a recipe with {wanted or 'one'}, or set plan.stage to one of them"
        )
    return found


def _prepared_fraction(run_dir: Path) -> float | None:
    """Share of loss tokens in the shards that `prepare` made, if it has."""
    path = run_dir / "prepare" / "manifest.json"
    if not path.is_file():
        return None
    records = json.loads(path.read_text(encoding="utf-8"))["splits"].get("train", [])
    tokens = sum(record["num_tokens"] for record in records)
    return sum(record["num_loss_tokens"] for record in records) / tokens if tokens else None


def _phases(config: RunConfig, entry: str, settings: TrainSettings) -> Iterator[PhaseWork]:
    name, branch = split_entry(entry)[0], branch_of(config, entry)
    mode = {"pretrain": "full", "align": "align"}.get(name, branch)
    starts = [
        next(s for s in range(settings.steps) if settings.phase_at(s) == number)
        for number in range(max(len(settings.phases), 1))
    ]
    for number, start in enumerate(starts):
        end = starts[number + 1] if number + 1 < len(starts) else settings.steps
        own = settings.of_phase(number)
        length = own.seq_length or stored_length(config, entry)
        if isinstance(settings, RandomMixerSettings) and isinstance(own, RandomMixerSettings):
            stride = max((end - start) // DRAWS, 1)
            mixers = tuple(
                draw_mixer(step, settings, seed=config.run.seed, mode=mode)
                for step in range(start, end, stride)
            )
            heaviest = tuple(_ends(own, mode, length))
        else:
            mixers = heaviest = (MixerSettings(mode=mode),)
        yield PhaseWork(
            number=number,
            steps=end - start,
            batch_size=own.batch_size,
            length=length,
            mixers=mixers,
            heaviest=heaviest,
        )


def _ends(settings: RandomMixerSettings, mode: str, length: int) -> Iterator[MixerSettings]:
    """The narrowest window, and the widest that is no full attention, with the shortest chunks."""
    step = settings.multiple_of
    low, high = settings.window_range
    low, most = -(-low // step) * step, max(min(high, length - 1) // step * step, 1)
    chunk = -(-settings.chunk_range[0] // step) * step
    for window in dict.fromkeys((max(most, low), low)):
        yield MixerSettings(
            mode=mode,
            window_size=window,
            num_sinks=settings.sink_range[1],
            chunk_size=min(chunk, window),
        )
