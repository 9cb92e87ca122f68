"""Weights, gradients and optimizer of a rank: DeepSpeed's rules, as measured at its own engine.

Numbers are bytes for each trained number on this rank (after tensor parallelism), Z the ranks that
ZeRO splits over (DP x CP), E the bytes of a weight. `tests/pipeline_plan/test_states.py` runs the
real engine at every stage and compares.

| | ZeRO-0 | ZeRO-1, float32 | ZeRO-1, bfloat16 | ZeRO-2 | ZeRO-3 |
|---|---|---|---|---|---|
| float32 weights | – | 4/Z | 4/Z | 4/Z | 4/Z |
| moments | 8 | 8/Z | 8/Z | 8/Z | 8/Z |
| gradients all the time | – | – | 4 | – | 4/Z |
| reduction bucket (Z > 1) | – | while gradients form | – | while gradients form | always |
| in the optimizer's step | 4 | 12/Z | 2 + 8/Z | 12/Z | 12/Z |
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.zero import reduce_bucket

LIVE_PARAMETERS = 1_050_000_000
"""Numbers that ZeRO-3 keeps gathered: its defaults `stage3_max_live_parameters` and prefetch."""


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes of a rank that are no activations."""

    weights: float
    """All the time."""
    optimizer: float
    """Float32 weights and moments; all the time."""
    gradients: float
    """Gradients that are there during every pass."""
    buffers: float
    """What gradients are reduced in: from the first gradient on, with ZeRO-3 all the time."""
    gathered: float
    """Whole weights of ZeRO-3 while a pass needs them."""
    growth: float
    """For each trained number whose gradient the backward pass has formed."""
    reduction: float
    """At the end of the backward pass, activations being gone, beyond weights and optimizer."""
    step: float
    """In the optimizer's step, beyond weights and optimizer."""

    @property
    def held(self) -> float:
        """What is there all the time."""
        return self.weights + self.optimizer


def states(
    *,
    trained: float,
    frozen: float,
    element: int,
    zero_stage: int,
    zero_size: int,
    num_micro_batches: int,
    kind: str,
) -> States:
    """Bytes by kind.

    Args:
        trained: trained numbers on this rank.
        frozen: all others.
        element: bytes of a weight, 4 or 2.
        zero_stage: 0 to 3.
        zero_size: Z.
        num_micro_batches: passes of a step; several carry gradients from one to the next.
        kind: `cuda` or `cpu`.
    """
    z, several, p = zero_size, num_micro_batches > 1, trained
    used = reduce_bucket(round(p))
    # with a GPU, communication overlaps the backward pass, and a second buffer is filled meanwhile
    buffers = 0.0 if z == 1 else used * element * (2 if kind == "cuda" and zero_stage < 3 else 1)
    if zero_stage == 0:
        # the step's temporaries: of one tensor at a time on the CPU, of all of them on CUDA
        return States(
            weights=(p + frozen) * 4,
            optimizer=8 * p,
            gradients=4 * p if several else 0,
            buffers=0,
            gathered=0,
            growth=0 if several else 4,
            reduction=8 * p,
            step=(8 if kind == "cuda" else 4) * p,
        )
    optimizer = 12 * p / z
    if zero_stage == 3:
        all_of_them = min(p + frozen, LIVE_PARAMETERS) * element if z > 1 else 0.0
        gradients = 4 * p / z
        flat = 2 * element * p
        if z == 1 and element == 2:
            flat += 4 * p
        if z > 1 and kind == "cpu":
            flat += element * p  # gloo's reduce-scatter works on a copy
        return States(
            weights=(p + frozen) * element / z,
            optimizer=optimizer,
            gradients=gradients,
            buffers=buffers,
            gathered=all_of_them,
            growth=element if z == 1 else 0,
            reduction=gradients + buffers + all_of_them + flat,
            step=gradients + buffers + 12 * p / z,
        )
    weights = (p + frozen) * element
    if zero_stage == 1 and element == 2:  # DeepSpeed's bfloat16 optimizer: no bucket
        return States(
            weights=weights,
            optimizer=optimizer,
            gradients=4 * p,
            buffers=0,
            gathered=0,
            growth=2,
            reduction=4 * p + 4 * p,
            step=4 * p + 2 * p + 8 * p / z,
        )
    carried = (4 * p if zero_stage == 1 else 4 * p / z) if several else 0.0
    formed = 0.0 if several and zero_stage == 1 else float(element)
    # the gradients themselves, and a flat copy or the buffer
    reduction = (
        4 * p + (buffers or 4 * p) if zero_stage == 1 else element * p + (buffers or element * p)
    )
    if zero_stage == 2:  # and what this rank keeps of them, in float32
        reduction += 4 * p / z if element == 2 else carried
    return States(
        weights=weights,
        optimizer=optimizer,
        gradients=carried,
        buffers=buffers,
        gathered=0,
        growth=formed if z == 1 else 0,
        reduction=reduction,
        step=12 * p / z,
    )
