"""Which weights a stage starts from, and what decides its result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint import refuse_other_config
from pipeline.config import compose
from pipeline.fingerprint import digest, fingerprint
from pipeline.lineage import branch_of, lineage
from pipeline.models import choose_dtype, load_model, trained_parameters
from pipeline.schema import RunConfig


@pytest.fixture
def config(tiny_overrides: list[str], tmp_path: Path) -> RunConfig:
    return compose([*tiny_overrides, f"run.dir={tmp_path}"])


def of(config: RunConfig, entry: str, device: str = "cpu") -> dict[str, Any]:
    """The fingerprint on a device."""
    place = torch.device(device)
    dtype = choose_dtype(config.parallel, place)
    return fingerprint(config, entry, dtype=dtype, device=place)


def test_a_branch_starts_from_its_own_stages_and_the_bases(config: RunConfig):
    trained = ["pretrain", "align", "convert", "convert:on_policy", "sft"]
    assert lineage(config, branch="allmem") == trained
    assert lineage(config, branch="allmem", before="convert") == ["pretrain", "align"]
    assert lineage(config, branch="mamba2") == ["pretrain", "convert@mamba2"]
    assert lineage(config, branch="none") == ["pretrain"]
    assert branch_of(config, "convert@mamba2") == "mamba2"
    assert branch_of(config, "convert") == "allmem"


def test_a_missing_stage_before_is_named(config: RunConfig, tmp_path: Path):
    with pytest.raises(ValueError, match=r"stage pretrain has no checkpoint .*run it first"):
        load_model(config, tmp_path, branch="allmem", device=torch.device("cpu"), before="convert")


def test_training_the_memory_freezes_the_base(config: RunConfig, tmp_path: Path):
    model = load_model(
        config, tmp_path, branch="allmem", device=torch.device("cpu"), before="pretrain"
    )
    memory = trained_parameters(model, "memory")
    assert all(".memory." in name for name in memory)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(memory)
    assert len(trained_parameters(model, "all")) == len(dict(model.named_parameters()))
    assert all(p.requires_grad for p in model.parameters())
    base = trained_parameters(model, "base")
    assert not any(".memory." in name for name in base)


def test_fingerprint_follows_what_decides_a_result(
    config: RunConfig, tiny_overrides: list[str], tmp_path: Path
):
    def changed(entry: str, *words: str) -> bool:
        other = compose([*tiny_overrides, f"run.dir={tmp_path}", *words])
        return digest(of(other, entry)) != digest(of(config, entry))

    assert changed("convert", "convert.lr=0.1")
    assert changed("convert", "pretrain.lr=0.1")
    assert changed("convert", "align.lr=0.1")
    assert changed("convert", "run.seed=4")
    assert changed("prepare", "data.seq_length=32")
    assert changed("evaluate", "eval.max_samples=3")
    assert changed("export", "convert.lr=0.1")
    assert changed("export", "mixer.window_size=32")
    assert not changed("convert", "mixer.window_size=32")
    assert not changed("pretrain", "convert.lr=0.1")
    assert not changed("pretrain", "mixer.window_size=32")
    assert not changed("prepare", "convert.lr=0.1", "run.seed=4")
    assert not changed("convert@mamba2", "align.lr=0.1")
    assert not changed("convert", "run.dir=elsewhere", "tracking=sqlite", "run.debug=true")
    assert not changed("convert", "convert.keep_last=9", "convert.micro_batch_size=1")


def test_a_float32_run_goes_on_elsewhere_only_in_float32(
    config: RunConfig, tiny_overrides: list[str], tmp_path: Path
):
    auto = compose([*tiny_overrides, "parallel.dtype=auto", "parallel.device=auto"])
    asked = compose([*tiny_overrides, "parallel.dtype=float32", "parallel.device=auto"])
    stored = of(auto, "convert")
    refuse_other_config(tmp_path, stored, of(asked, "convert", "cuda"))
    with pytest.raises(ValueError, match=r'parallel.dtype="float32", this run has .*"bfloat16"'):
        refuse_other_config(tmp_path, stored, of(auto, "convert", "cuda"))
    assert of(asked, "evaluate") != of(asked, "evaluate", "cuda")  # speeds are another device's
