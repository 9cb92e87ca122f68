"""Learning rate and random mixer are pure functions of the step."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.schedule import draw_mixer, step_seed, wsd_lr
from pipeline.train_schema import ConvertSettings, TrainSettings

PLAIN = TrainSettings(steps=100, lr=2.0, warmup_fraction=0.1, decay_fraction=0.2)


def test_warmup_rises_linearly_and_ends_at_the_peak():
    rates = [wsd_lr(step, PLAIN) for step in range(10)]
    assert rates == pytest.approx([0.2 * (i + 1) for i in range(10)])


def test_rate_is_stable_between_warmup_and_decay():
    assert {wsd_lr(step, PLAIN) for step in range(10, 81)} == {2.0}


def test_sqrt_decay_follows_its_formula():
    assert wsd_lr(85, PLAIN) == pytest.approx(2.0 * (1 - (5 / 20) ** 0.5))
    assert wsd_lr(99, PLAIN) == pytest.approx(2.0 * (1 - (19 / 20) ** 0.5))


def test_linear_decay_ends_near_its_final_share():
    linear = dataclasses.replace(PLAIN, decay_shape="linear", final_lr_fraction=0.5)
    assert wsd_lr(90, linear) == pytest.approx(2.0 * 0.75)
    assert wsd_lr(100, linear) == pytest.approx(1.0)


def test_no_step_has_a_rate_of_zero():
    for steps in (1, 2, 3, 7, 100):
        shape = dataclasses.replace(PLAIN, steps=steps, warmup_fraction=0.3, decay_fraction=0.7)
        assert all(wsd_lr(step, shape) > 0 for step in range(steps))


def test_without_warmup_and_decay_the_rate_is_constant():
    flat = dataclasses.replace(PLAIN, warmup_fraction=0.0, decay_fraction=0.0)
    assert {wsd_lr(step, flat) for step in range(100)} == {2.0}


@settings(max_examples=100, deadline=None)
@given(step=st.integers(0, 10**6), seed=st.integers(0, 10**6))
def test_drawn_chunk_never_exceeds_the_window(step: int, seed: int):
    shape = ConvertSettings(
        sink_range=(0, 8), window_range=(20, 70), chunk_range=(3, 64), multiple_of=4
    )
    drawn = draw_mixer(step, shape, seed=seed, mode="allmem")
    assert drawn.chunk_size <= drawn.window_size
    assert 20 <= drawn.window_size <= 70
    assert 3 <= drawn.chunk_size <= 64
    assert 0 <= drawn.num_sinks <= 8
    assert drawn.window_size % 4 == 0
    assert drawn.chunk_size % 4 == 0
    assert drawn == draw_mixer(step, shape, seed=seed, mode="allmem")


def test_draws_cover_the_ranges_of_the_paper():
    shape = ConvertSettings()
    drawn = [draw_mixer(step, shape, seed=1, mode="allmem") for step in range(2000)]
    assert min(d.num_sinks for d in drawn) == 0
    assert max(d.num_sinks for d in drawn) == 256
    assert min(d.window_size for d in drawn) < 600
    assert max(d.window_size for d in drawn) > 8000
    assert max(d.chunk_size for d in drawn) > 3900


def test_seeds_of_steps_differ_by_step_and_rank():
    seeds = {step_seed(seed, step, rank) for seed in (0, 1) for step in (0, 1) for rank in (0, 1)}
    assert len(seeds) == 8
