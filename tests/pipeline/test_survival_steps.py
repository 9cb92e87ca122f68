"""Steps that go wrong: spikes and skipped steps are recorded with their documents, and counted."""

from __future__ import annotations

import json
import math
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.batches import MicroBatch
from pipeline.context import StageContext
from pipeline.objectives import NextToken
from pipeline.run import main
from pipeline.spikes import SpikeDetector
from pipeline.survival import EXIT_REQUEUE, EXIT_USER_ERROR

STEPS = 20
PLANTED = "planted-document"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> list[str]:
    """Words of a run over 40 documents that are alike, and one of noise; shards are there."""
    folder = tmp_path_factory.mktemp("spikes")
    dice = random.Random(0)
    lines = [{"id": f"plain-{i}", "text": "return self.decoder(value)\n" * 9} for i in range(40)]
    noise = "".join(dice.choice("{}[]#$%^&*~`|XQZWKJ0123456789") for _ in range(120))
    lines.insert(17, {"id": PLANTED, "text": noise})
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    words = [word for word in tiny_overrides if not word.startswith("data.")]
    words += [word for word in tiny_overrides if word.startswith("data.tokenizer")]
    words += [
        f"data.sources=[{{kind: jsonl, name: notes, path: '{path}', eval_path: '{path}'}}]",
        "data.seq_length=64", "data.packing=none", "data.train_samples=null",
        "data.eval_samples=2", "stages=[prepare,pretrain]", f"pretrain.steps={STEPS}",
        "pretrain.batch_size=2", "pretrain.checkpoint_every=4", "pretrain.keep_last=20",
        "pretrain.lr=0.01", "run.spike_window=5", "run.spike_factor=5",
        "stage=all", f"run.dir={folder / 'run'}",
    ]  # fmt: skip
    assert main([*words, "stage=prepare"]) == 0
    return words


def into(folder: Path, corpus: list[str], *further: str) -> list[str]:
    """The same run in another folder, with the shards that are there."""
    folder.mkdir(exist_ok=True)
    (folder / "prepare").symlink_to(Path(corpus[-1].removeprefix("run.dir=")) / "prepare")
    return [*corpus, f"run.dir={folder}", "stage=pretrain", *further]


def record_of(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "pretrain" / "spikes.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def break_losses(patched: pytest.MonkeyPatch, steps: set[int]) -> list[int]:
    """Let the loss of some steps (1 for the first) be NaN; the steps that were computed."""
    forward = NextToken.forward
    done: list[int] = []

    def broken(self: NextToken, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        total, extra = forward(self, batch)
        done.append(len(done) + 1)
        return total * (math.nan if len(done) in steps else 1.0), extra

    patched.setattr(NextToken, "forward", broken)
    return done


def checkpoints(folder: Path) -> list[int]:
    found = (folder / "pretrain" / "checkpoints").glob("step_*")
    return sorted(int(path.name.removeprefix("step_")) for path in found)


def test_a_planted_document_that_makes_a_spike_is_named(
    tmp_path: Path,
    corpus: list[str],
    capsys: pytest.CaptureFixture[str],
    metrics_of: Callable[[Path], list[dict[str, Any]]],
):
    assert main(into(tmp_path / "run", corpus, "run.seed=4")) == 0
    errors = capsys.readouterr().err
    (spike,) = record_of(tmp_path / "run")
    assert spike["kind"] == "spike"
    assert spike["loss"] > spike["threshold"] > spike["median"]
    assert math.isfinite(spike["grad_norm"])
    ids = [document["ids"] for document in spike["documents"]]
    assert [PLANTED] in ids
    assert [document["row"] for document in spike["documents"]] == [0, 1]
    assert {document["source"] for document in spike["documents"]} == {"notes"}
    assert f"step {spike['step']} has a loss of " in errors
    assert PLANTED in errors
    lines = metrics_of(tmp_path / "run" / "pretrain")
    assert [line["loss_spikes"] for line in lines] == [
        int(line["step"] >= spike["step"]) for line in lines
    ]
    assert {line["skipped_steps"] for line in lines} == {0}
    artifacts = json.loads((tmp_path / "run" / "artifacts.json").read_text())
    assert "pretrain/spikes.jsonl" in [item["path"] for item in artifacts["pretrain"]]


def test_a_resumed_run_records_the_same_spikes_once(
    tmp_path: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(into(whole, corpus, "run.seed=4")) == 0
    words = into(stopped, corpus, "run.seed=4")
    (spike,) = record_of(whole)
    log: Callable[..., None] = StageContext.log

    def log_and_stop(self: StageContext, step: int, values: dict[str, Any]) -> None:
        log(self, step, values)
        if step == spike["step"] + 1:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(StageContext, "log", log_and_stop)
        assert main(words) == EXIT_REQUEUE
    assert main(words) == 0
    (found,) = record_of(stopped)
    assert found | {"time": 0} == spike | {"time": 0}


def test_skipped_steps_are_counted_and_named_and_put_checkpoints_off(
    tmp_path: Path,
    corpus: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    metrics_of: Callable[[Path], list[dict[str, Any]]],
):
    words = into(tmp_path / "run", corpus, "run.spike_factor=0")
    with monkeypatch.context() as patched:
        break_losses(patched, {7, 8, 9})
        assert main(words) == 0
    errors = capsys.readouterr().err
    lines = metrics_of(tmp_path / "run" / "pretrain")
    assert [line["skipped_steps"] for line in lines] == [0] * 6 + [1, 2] + [3] * 12
    assert [line["train/loss"] is None for line in lines] == [
        line["step"] in (7, 8, 9) for line in lines
    ]
    assert [line["tokens"] for line in lines] == [128 * step for step in range(1, STEPS + 1)]
    assert checkpoints(tmp_path / "run") == [4, 10, 12, 16, 20]  # 8 waited for a good step
    record = record_of(tmp_path / "run")
    assert [(line["step"], line["kind"]) for line in record] == [
        (7, "skipped"), (8, "skipped"), (9, "skipped"),
    ]  # fmt: skip
    assert all(len(line["documents"]) == 2 for line in record)
    assert "step 7 is skipped: the loss is nan" in errors


def test_too_many_skipped_steps_end_the_run_with_the_last_good_checkpoint_named(
    tmp_path: Path,
    corpus: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    words = into(tmp_path / "run", corpus, "run.max_skipped_steps=3")
    with monkeypatch.context() as patched:
        done = break_losses(patched, set(range(6, STEPS)))
        assert main(words) == EXIT_USER_ERROR
    assert len(done) == 8
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "3 steps in a row up to step 8 were skipped (the loss is nan" in line
    assert f"the last good checkpoint is {tmp_path}/run/pretrain/checkpoints/step_00000004" in line
    assert "lower the stage's lr" in line
    assert checkpoints(tmp_path / "run") == [4]


def test_a_stop_between_skipped_steps_keeps_their_count(
    tmp_path: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch
):
    words = into(tmp_path / "run", corpus, "run.max_skipped_steps=4")
    log: Callable[..., None] = StageContext.log

    def log_and_stop(self: StageContext, step: int, values: dict[str, Any]) -> None:
        log(self, step, values)
        if step == 6:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        break_losses(patched, set(range(6, STEPS)))
        patched.setattr(StageContext, "log", log_and_stop)
        assert main(words) == EXIT_REQUEUE
    assert checkpoints(tmp_path / "run") == [4, 7]
    with monkeypatch.context() as patched:
        done = break_losses(patched, set(range(1, STEPS)))
        assert main(words) == EXIT_USER_ERROR
    assert len(done) == 2  # steps 6 and 7 before the stop, 8 and 9 after it


def test_the_detector_needs_some_losses_and_is_not_moved_by_a_spike():
    detector = SpikeDetector(factor=6.0, window=50)
    dice = torch.Generator().manual_seed(0)
    losses = (3 + 0.1 * torch.randn(200, generator=dice)).tolist()
    found = []
    for step, loss in enumerate(losses):
        loss = {5: 9.0, 60: 4.5, 61: 4.4, 62: math.nan, 63: math.inf}.get(step, loss)
        if detector.is_spike(loss):
            found.append(step)
        if math.isfinite(loss):
            detector.losses.append(loss)
    assert found == [60, 61]  # at step 5 too few losses were known
    median, threshold = detector.limits() or (0.0, 0.0)
    assert median == pytest.approx(3.0, abs=0.1)
    assert threshold == pytest.approx(3.6, abs=0.25)


@pytest.mark.parametrize("factor", [0.0, 8.0])
def test_losses_that_do_not_vary_have_a_floor_and_zero_switches_off(factor: float):
    detector = SpikeDetector(factor=factor, window=25)
    detector.losses.extend([2.0] * 25)
    assert not detector.is_spike(2.3)  # 2 % of the median, times 8, is 0.32
    assert detector.is_spike(2.4) == (factor > 0)
