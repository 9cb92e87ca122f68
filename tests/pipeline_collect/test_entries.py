"""Second rounds in a recipe: their names, folders, settings, data, and what comes before them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.collecting.settings import CollectSettings
from pipeline.config import compose, split_entry
from pipeline.context import folder_name
from pipeline.fingerprint import fingerprint
from pipeline.lineage import data_entry, is_last, lineage
from pipeline.run import main
from pipeline.schema import section_of

TINY = ["recipe=tiny", "tracking=none"]


def test_a_round_is_named_by_a_colon_and_has_its_own_folder_and_section():
    entry = "convert:on_policy@mamba2"
    assert split_entry(entry) == ("convert", "mamba2")
    assert split_entry("convert:on_policy") == ("convert", None)
    assert folder_name(entry) == "convert_on_policy_mamba2"
    assert section_of(entry) == "on_policy"
    assert data_entry(entry) == "collect@mamba2"
    assert data_entry("convert@mamba2") == "prepare"
    config = compose([*TINY, "on_policy.lr=0.5", "convert.lr=0.25"])
    assert config.train_settings("convert:on_policy").lr == 0.5
    assert config.train_settings("convert").lr == 0.25


def test_a_round_starts_from_the_rounds_before_it():
    config = compose(TINY)
    before = ["pretrain", "align", "convert"]
    assert lineage(config, branch="allmem", before="collect") == before
    assert lineage(config, branch="allmem", before="convert:on_policy") == before
    assert lineage(config, branch="allmem")[-2:] == ["convert:on_policy", "sft"]
    assert "convert:on_policy" not in lineage(config, branch="mamba2")
    assert not is_last(config, "convert:on_policy")


def test_the_same_command_line_can_name_stage_and_recipe_twice():
    words = ["stage=all", "recipe=demo", "stage=convert:on_policy", "recipe=tiny", "stage=sft"]
    assert compose(words).stage.name == "sft"
    assert compose(words[:-1]).stage.name == "convert:on_policy"
    assert compose(words).recipe == "tiny"


def test_what_was_collected_decides_a_round_and_what_comes_after_it_alone():
    def flat(entry: str, *more: str) -> dict[str, object]:
        config = compose([*TINY, *more])
        return fingerprint(config, entry, dtype=torch.float32, device=torch.device("cpu"))

    for entry in ("collect", "convert:on_policy", "sft", "evaluate", "export"):
        assert flat(entry) != flat(entry, "collect.temperature=0.5"), entry
        assert flat(entry) == flat(entry, "collect.batch_size=3", "collect.prefill_chunk=8"), entry
    for entry in ("prepare", "convert", "convert@mamba2"):
        assert flat(entry) == flat(entry, "collect.temperature=0.5", "on_policy.lr=1"), entry
    assert flat("collect") != flat("collect", "mixer.window_size=24")
    assert flat("convert:on_policy") == flat("convert:on_policy", "mixer.window_size=24")


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("stage=convert:onpolicy", "unknown round 'onpolicy'; did you mean on_policy?"),
        ("stage=sft:on_policy", "unknown round 'on_policy'"),
        ("stages=[prepare,pretrain,convert,convert:on_policy]", "without collect before it"),
        ("stages=[prepare,pretrain,collect]", "put convert before it"),
        ("stages=[prepare,pretrain,convert@mamba2,collect]", "put convert before it"),
        ("collect.sources=[]", "collect.sources is empty; name prompts"),
        ("collect.temperature=-1", "collect.temperature=-1.0 must not be negative"),
        ("collect.top_p=0", "collect.top_p=0.0 must lie in (0, 1]"),
        ("collect.sources=[{kind: repeats, packages: [yaml]}]", "holds no prompts"),
        ("collect.seq_length=8", "leaves no room for a prompt"),
        ("on_policy.kl_weight=0", "on_policy.kl_weight and on_policy.ce_weight are both 0"),
        ("on_policy.chunk_range=[64,64]", "on_policy.chunk_range starts at 64"),
    ],
)
def test_a_chain_that_cannot_be_is_one_line(
    word: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([*TINY, f"run.dir={tmp_path}", word]) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1


def test_several_responses_need_chance():
    with pytest.raises(ValueError, match="would be the same response each time"):
        CollectSettings(responses_per_prompt=2, temperature=0)
