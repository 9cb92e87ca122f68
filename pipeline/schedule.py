"""What changes from step to step, as pure functions of (seed, step): learning rate and mixer.

Nothing here has state, so a resumed run draws what the interrupted one would have drawn, and every
rank draws the same.
"""

from __future__ import annotations

import math
import random

from allmem_megatron.config import MixerSettings
from pipeline.train_schema import RandomMixerSettings, TrainSettings


def wsd_lr(step: int, settings: TrainSettings) -> float:
    """Warmup-stable-decay learning rate of an optimizer step.

    Rises linearly over `warmup_fraction` of the steps (the first step already moves), stays at
    `lr`, and falls over the last `decay_fraction` to `final_lr_fraction * lr`, by `1 - sqrt(x)` or
    `1 - x`, where x is 0 at the fall's first step and would be 1 at step `steps`, so that no step
    is spent at a rate of 0.

    Args:
        step: 0 for the first optimizer step.
        settings: `steps`, `lr` and the schedule's fractions.
    """
    warmup = round(settings.warmup_fraction * settings.steps)
    decay = round(settings.decay_fraction * settings.steps)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    into_decay = step - (settings.steps - decay)
    if decay == 0 or into_decay <= 0:
        return settings.lr
    x = min(into_decay / decay, 1.0)
    fallen = math.sqrt(x) if settings.decay_shape == "sqrt" else x
    share = 1.0 - (1.0 - settings.final_lr_fraction) * fallen
    return settings.lr * share


def draw_mixer(step: int, settings: RandomMixerSettings, *, seed: int, mode: str) -> MixerSettings:
    """s, W and c of one step, drawn independently of each other with c <= W.

    Args:
        step: the optimizer step; the same step draws the same values on every rank.
        settings: ranges, by phase where there are phases, and the number that W and c are
            multiples of.
        seed: the run's seed.
        mode: mode of the mixer, `allmem`, `mamba2` or `align`.
    """
    settings = settings.of_phase(settings.phase_at(step))
    source = random.Random(f"mixer {seed} {step}")
    num_sinks = source.randint(*settings.sink_range)
    window = _multiple(source, *settings.window_range, settings.multiple_of)
    low, high = settings.chunk_range
    chunk = _multiple(source, low, min(high, window), settings.multiple_of)
    return MixerSettings(mode=mode, window_size=window, num_sinks=num_sinks, chunk_size=chunk)


def _multiple(source: random.Random, low: int, high: int, step: int) -> int:
    return source.randint(-(-low // step), high // step) * step


def phase_seed(seed: int, phase: int) -> int:
    """Seed of a phase's order of samples; the run's own for the first."""
    return seed if phase == 0 else random.Random(f"phase {seed} {phase}").randrange(2**32)


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seed of whatever randomness a step has."""
    return random.Random(f"step {seed} {step} {rank}").randrange(2**63)
