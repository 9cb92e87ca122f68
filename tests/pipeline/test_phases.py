"""Phases of a stage: which step belongs to which, what they may set, how batches split."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from pipeline.batches import RankSplit, split_over_ranks
from pipeline.schedule import draw_mixer, phase_seed, wsd_lr
from pipeline.train_schema import ConvertSettings, PhaseSettings, PretrainSettings

WIDE = {"window_range": (64, 64), "chunk_range": (32, 32)}


def settings(*phases: PhaseSettings, **changes: Any) -> ConvertSettings:
    values = {"steps": 10, "batch_size": 4, **WIDE, **changes}
    return ConvertSettings(phases=phases, **values)


SHORT = PhaseSettings(
    fraction=0.3,
    batch_size=8,
    seq_length=16,
    weights={"dense": 1.0},
    window_range=(8, 8),
    chunk_range=(4, 4),
)
REST = PhaseSettings(fraction=0.7)


def test_steps_fall_into_phases_by_fraction() -> None:
    staged = settings(SHORT, REST)
    assert [staged.phase_at(step) for step in range(10)] == [0] * 3 + [1] * 7
    thirds = settings(*[PhaseSettings(fraction=1 / 3)] * 3, steps=100)
    assert Counter(thirds.phase_at(step) for step in range(100)) == {0: 33, 1: 34, 2: 33}
    assert settings().phase_at(9) == 0


def test_a_phase_sets_its_own_values_and_inherits_the_rest() -> None:
    staged = settings(SHORT, REST, lr=0.5)
    short, rest = staged.of_phase(0), staged.of_phase(1)
    assert (short.batch_size, short.seq_length, short.weights) == (8, 16, {"dense": 1.0})
    assert (short.lr, short.steps, short.phases) == (0.5, 10, ())
    assert (rest.batch_size, rest.seq_length, rest.weights) == (4, None, {})
    plain = settings()
    assert plain.of_phase(0) is plain


def test_the_mixer_is_drawn_from_the_phase_of_the_step() -> None:
    staged = settings(SHORT, REST)
    drawn = [draw_mixer(step, staged, seed=0, mode="allmem") for step in range(10)]
    assert [m.window_size for m in drawn] == [8] * 3 + [64] * 7
    assert [m.chunk_size for m in drawn] == [4] * 3 + [32] * 7


def test_the_learning_rate_runs_over_all_phases() -> None:
    plain, staged = settings(), settings(SHORT, REST)
    assert [wsd_lr(s, plain) for s in range(10)] == [wsd_lr(s, staged) for s in range(10)]


def test_every_phase_has_its_own_order_of_samples() -> None:
    assert phase_seed(7, 0) == 7
    assert len({phase_seed(7, phase) for phase in range(5)}) == 5


def test_batches_of_all_phases_split_into_the_same_number_of_passes() -> None:
    def phases(first: int, second: int, micro: int | None) -> list[PretrainSettings]:
        return [
            PretrainSettings(batch_size=first, micro_batch_size=micro),
            PretrainSettings(batch_size=second),
        ]

    assert split_over_ranks("pretrain", phases(16, 8, 2), 2) == [RankSplit(2, 4), RankSplit(1, 4)]
    assert split_over_ranks("pretrain", phases(4, 12, None), 2) == [
        RankSplit(2, 1),
        RankSplit(6, 1),
    ]
    assert split_over_ranks("convert", phases(8, 4, 2), 1) == [RankSplit(2, 4), RankSplit(1, 4)]
    with pytest.raises(ValueError, match=r"cut the 16 and 6 sequences.*to 8 or 16$"):
        split_over_ranks("pretrain", phases(16, 6, 4), 1)
    with pytest.raises(ValueError, match=r"micro_batch_size=1 does not .* to 2 or 4 or 8$"):
        split_over_ranks("convert", phases(8, 4, 1), 1)
    with pytest.raises(ValueError, match="does not split over 3 data-parallel ranks"):
        split_over_ranks("pretrain", phases(16, 8, None), 3)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ((SHORT,), r"fractions \[0.3\], which sum to 0.3; make them sum to 1"),
        ((PhaseSettings(fraction=0.0), PhaseSettings(fraction=1.0)), r"phases\[0\].fraction=0.0"),
        ((PhaseSettings(fraction=1.0, window_range=(4, 8)),), "chunk_range starts at 32, above"),
        ((PhaseSettings(fraction=1.0, batch_size=0),), "batch_size=0 must be at least 1"),
    ],
)
def test_phases_that_do_not_fit_are_refused(
    phases: tuple[PhaseSettings, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        settings(*phases)


def test_a_setting_the_stage_lacks_is_refused() -> None:
    phase = PhaseSettings(fraction=1.0, window_range=(8, 8))
    with pytest.raises(ValueError, match="window_range has no meaning in pretrain"):
        PretrainSettings(phases=(phase,))
