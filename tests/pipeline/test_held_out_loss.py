"""`eval/loss` is the mean over the held-out loss tokens, measured on the weights of its step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.loader import ShardLoader
from pipeline.run import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> Path:
    """A small chain with held-out losses in two stages."""
    folder = tmp_path_factory.mktemp("held_out")
    words = [
        *tiny_overrides,
        "stage=all",
        "stages=[prepare,pretrain,align,convert]",
        "pretrain.eval_every=4",
        "pretrain.eval_batches=100",
        "pretrain.log_every=3",
        "align.eval_every=4",
        "convert.eval_every=4",
        "convert.eval_batches=1",
        f"run.dir={folder}",
    ]
    assert main(words) == 0
    return folder


def lines_of(run: Path, stage: str) -> list[dict[str, Any]]:
    text = (run / stage / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_it_is_the_loss_that_transformers_finds(run: Path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run / "pretrain" / "hf", dtype=torch.float32)
    loader = ShardLoader(run / "prepare", split="eval", batch_size=1, shuffle=False, epochs=1)
    total, count = 0.0, 0
    for batch in loader:
        assert batch.cu_seqlens is None  # one document a row: nothing to mask
        with torch.no_grad():
            logits = model(batch.tokens).logits[:, :-1].double()
        mask = batch.loss_mask[:, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits[mask], batch.tokens[:, 1:][mask], reduction="none"
        )
        total, count = total + float(losses.sum()), count + len(losses)
    assert count > 400
    measured = lines_of(run, "pretrain")[-1]
    assert measured["step"] == 8
    assert measured["eval/loss"] == pytest.approx(total / count, rel=1e-5)


def test_it_has_a_line_of_its_own_where_nothing_else_is_logged(run: Path):
    lines = lines_of(run, "pretrain")
    assert [line["step"] for line in lines] == [3, 4, 6, 8]
    assert set(lines[1]) == {"step", "time", "eval/loss"}


def test_other_losses_are_measured_too(run: Path):
    found = [line for line in lines_of(run, "convert") if "eval/loss" in line]
    assert [line["step"] for line in found] == [4, 8]
    for line in found:
        assert line["eval/loss"] == pytest.approx(line["eval/kl"], rel=1e-6)
        assert line["eval/ce"] > line["eval/kl"] > 0
    (aligned,) = (line for line in lines_of(run, "align") if "eval/loss" in line)
    assert 0 < aligned["eval/loss"] < 2


def test_measuring_changes_nothing_that_is_trained(run: Path, tiny_overrides: list[str]):
    other = run.with_name("unmeasured")
    other.mkdir()
    (other / "prepare").symlink_to(run / "prepare")
    words = [*tiny_overrides, "stage=all", "stages=[prepare,pretrain,align,convert]"]
    assert main([*words, f"run.dir={other}"]) == 0
    name = "convert/checkpoints/step_00000008/model.safetensors"
    assert (run / name).read_bytes() == (other / name).read_bytes()


def test_without_held_out_samples_it_is_refused_with_the_mend(
    run: Path, tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = [*tiny_overrides, "stage=all", "stages=[prepare,pretrain]", "data.eval_samples=0"]
    assert main([*words, "pretrain.eval_every=2", f"run.dir={tmp_path}"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "pretrain.eval_every=2 needs held-out samples" in error
    assert "set data.eval_samples and prepare again, or pretrain.eval_every=0" in error
