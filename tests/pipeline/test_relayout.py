"""A run that changes its layout again and again has the losses of one rank.

Legs follow one after the other through `pretrain` (all weights, two phases, three sources of data
by weights) and `convert` (the memory). Each goes on in another layout from the checkpoint of the
leg before; data position, weights and moments must be exact for its losses to be those of a run of
one rank that nobody interrupted.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint import load_checkpoint

SERVER = Path(__file__).with_name("relayout_server.py")
ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 2e-5
"""Float32 rounding, of other orders of sums, after some steps; ten times less than seen: 4e-6."""


@dataclass(frozen=True)
class Leg:
    """A part of the run in one layout."""

    stage: str
    until: int
    ranks: int
    zero: int
    tp: int = 1
    cp: int = 1
    more: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """`pretrain-dp4-zero1`, as pytest shows it."""
        dp = self.ranks // self.tp // self.cp
        layout = {"tp": self.tp, "cp": self.cp, "dp": dp}
        sizes = [f"{axis}{size}" for axis, size in layout.items() if size > 1] or ["one"]
        return "-".join([self.stage, *sizes, f"zero{self.zero}", *self.more])

    @property
    def words(self) -> list[str]:
        """Its settings."""
        zero = f"parallel.zero_stage={self.zero}"
        return [zero, f"parallel.tp={self.tp}", f"parallel.cp={self.cp}", *self.more]


A2A = ("parallel.cp_mode=a2a",)
SP = ("parallel.sp=true",)
LEGS = [
    Leg("pretrain", 4, ranks=4, zero=1),
    Leg("pretrain", 7, ranks=2, zero=2, more=("pretrain.micro_batch_size=2",)),
    Leg("pretrain", 10, ranks=1, zero=3),
    Leg("pretrain", 13, ranks=2, zero=1, tp=2),
    Leg("pretrain", 16, ranks=1, zero=0),
    Leg("pretrain", 19, ranks=4, zero=3, tp=2, more=SP),
    Leg("pretrain", 22, ranks=4, zero=2, cp=4),
    Leg("pretrain", 24, ranks=2, zero=3),
    Leg("convert", 4, ranks=2, zero=2, cp=2),
    Leg("convert", 7, ranks=1, zero=1),
    Leg("convert", 10, ranks=4, zero=1, tp=2, cp=2),
    Leg("convert", 13, ranks=4, zero=2, cp=2, more=A2A),
    Leg("convert", 16, ranks=2, zero=2, tp=2, more=SP),
    Leg("convert", 18, ranks=1, zero=0),
]
FIRST_STEP = {
    leg.name: next((e.until for e in reversed(LEGS[:i]) if e.stage == leg.stage), 0) + 1
    for i, leg in enumerate(LEGS)
}
SHAPE = [
    "stage=all",
    "stages=[prepare,pretrain,convert]",
    "pretrain.steps=24",
    "convert.steps=18",
    "pretrain.checkpoint_every=100",
    "convert.checkpoint_every=100",
    "pretrain.keep_last=100",
    "convert.keep_last=100",
    "pretrain.eval_every=2",
    "convert.eval_every=2",
    "convert.eval_batches=1",
    "parallel.timeout_s=60",
    "pretrain.phases=[{fraction: 0.4, seq_length: 24, batch_size: 8,"
    " weights: {code: 1, repeats: 3}}, {fraction: 0.6}]",
]


@dataclass(frozen=True)
class Legs:
    """Folders of both runs, and what the server saw of each leg."""

    whole: Path
    changed: Path
    seen: dict[str, dict[str, Any]]
    full_disk: dict[str, Any]
    """What the server saw of two ranks of which one could not write, and their lines."""


@pytest.fixture(scope="module")
def legs(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_overrides: list[str],
    environment: dict[str, str],
) -> Legs:
    folder = tmp_path_factory.mktemp("relayout")
    repeats = ", {kind: repeats, name: repeats, packages: [yaml], eval_packages: [rich]}]"
    tiny = [
        word.removesuffix("]") + repeats if word.startswith("data.sources") else word
        for word in tiny_overrides
    ]
    plan = {
        "folder": str(folder),
        "words": [*tiny, *SHAPE],
        "legs": [
            {"stage": leg.stage, "until": leg.until, "ranks": leg.ranks, "words": leg.words}
            for leg in LEGS
        ],
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    done = subprocess.run(
        [sys.executable, str(SERVER), str(folder / "plan.json"), str(folder / "out.json")],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    (folder / "stderr").write_text(done.stderr)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads((folder / "out.json").read_text())
    return Legs(
        whole=folder / "whole",
        changed=folder / "legs",
        seen={leg.name: found for leg, found in zip(LEGS, seen["legs"], strict=True)},
        full_disk={**seen["full_disk"], "lines": (folder / "full.err").read_text().splitlines()},
    )


def lines_of(
    legs: Legs, leg: Leg, metrics_of: Callable[[Path], list[dict[str, Any]]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(one rank's line, this leg's line) of each step of a leg."""
    whole, changed = (
        {line["step"]: line for line in metrics_of(d / leg.stage)}
        for d in (legs.whole, legs.changed)
    )
    steps = range(FIRST_STEP[leg.name], leg.until + 1)
    return [(whole[step], changed[step]) for step in steps]


@pytest.mark.parametrize("leg", LEGS, ids=lambda leg: leg.name)
def test_losses_after_a_change_of_layout_are_those_of_one_rank(
    legs: Legs, leg: Leg, metrics_of: Callable[[Path], list[dict[str, Any]]]
):
    stopped = legs.seen[leg.name]["codes"]
    assert legs.seen[leg.name]["newest"] == f"step_{leg.until:08d}", stopped
    for whole, changed in lines_of(legs, leg, metrics_of):
        for key in ("tokens", "loss_tokens", "train/lr"):
            assert changed[key] == whole[key]
        assert changed["train/loss"] == pytest.approx(whole["train/loss"], rel=TOLERANCE)
        assert changed["train/grad_norm"] == pytest.approx(whole["train/grad_norm"], rel=TOLERANCE)


@pytest.mark.parametrize("leg", LEGS, ids=lambda leg: leg.name)
def test_the_held_out_loss_is_the_same_in_every_layout(
    legs: Legs, leg: Leg, metrics_of: Callable[[Path], list[dict[str, Any]]]
):
    pairs = lines_of(legs, leg, metrics_of)
    losses = [(w["eval/loss"], c["eval/loss"]) for w, c in pairs if w["step"] % 2 == 0]
    assert losses
    for whole, changed in losses:
        assert changed == pytest.approx(whole, rel=TOLERANCE)


@pytest.mark.parametrize("leg", LEGS, ids=lambda leg: leg.name)
def test_each_rank_writes_its_share_and_one_rank_one_file(legs: Legs, leg: Leg):
    files = legs.seen[leg.name]["files"]
    if leg.ranks == 1:
        assert files == ["model.safetensors", "optimizer.safetensors", "state.json"]
        return
    names = [f"{kind}-{i:05d}-of-{leg.ranks:05d}.safetensors"
             for kind in ("model", "optimizer") for i in range(1, leg.ranks + 1)]  # fmt: skip
    indices = [f"{kind}.safetensors.index.json" for kind in ("model", "optimizer")]
    assert files == sorted([*names, *indices, "state.json"])


@pytest.mark.parametrize("stage", ["pretrain", "convert"])
def test_final_weights_and_moments_are_those_of_one_rank(legs: Legs, stage: str):
    name = Path(stage) / "checkpoints" / f"step_{ {'pretrain': 24, 'convert': 18}[stage]:08d}"
    whole, changed = (load_checkpoint(d / name) for d in (legs.whole, legs.changed))
    assert set(whole.model) == set(changed.model)
    assert set(whole.optimizer) == set(changed.optimizer)
    for wanted, got in ((whole.model, changed.model), (whole.optimizer, changed.optimizer)):
        for tensor in wanted:
            scale = float(wanted[tensor].abs().max())
            torch.testing.assert_close(
                got[tensor], wanted[tensor], rtol=1e-3, atol=1e-3 * scale + 1e-9, msg=tensor
            )
    for key in ("tokens", "loss_tokens", "loader", "phase"):
        assert whole.state[key] == changed.state[key]


def test_a_full_disk_of_one_rank_ends_both_at_the_next_step(legs: Legs):
    seen = legs.full_disk
    assert seen["codes"] == [2, 2]
    newest = 3 * len(seen["left"])
    assert seen["left"] == [f"step_{step:08d}" for step in range(3, newest + 1, 3)]
    assert 6 <= newest + 3 <= seen["last"] <= newest + 6 <= 24
    errors = [line for line in seen["lines"] if line.startswith("error")]
    assert len(errors) == 1, errors
    assert "rank 1: File too large while saving" in errors[0]
    assert f"step_{newest + 3:08d}" in errors[0]


def test_after_the_disk_has_room_again_the_same_command_goes_on(legs: Legs):
    assert legs.full_disk["again"] == [0, 0]
