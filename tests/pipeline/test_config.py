"""Composition: every recipe, every mistake."""

from __future__ import annotations

import dataclasses

import pytest

from pipeline import schema, train_schema
from pipeline.config import build, compose, flatten, groups, schema_keys, split_entry, to_plain
from pipeline.help import field_docs, help_text
from pipeline.run import main
from pipeline.schema import RunConfig

RECIPES = groups()["recipe"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_composes(recipe: str):
    config = compose([f"recipe={recipe}"])
    assert config.recipe == recipe
    assert config.run.dir == f"runs/{recipe}"
    assert config.eval.window_size == config.mixer.window_size
    assert config.stages[0] == "prepare"


@pytest.mark.parametrize(
    ("group", "option"),
    [(group, option) for group, options in groups().items() for option in options],
)
def test_every_group_option_composes_and_says_what_it_is(group: str, option: str):
    from pipeline.help import option_summary

    if group != "recipe":
        overrides = ["recipe=demo", f"{group}={option}"]
        stages = ["stages=[prepare,pretrain]"] if "scratch" in option or option == "tiny" else []
        assert compose([*overrides, *stages]).recipe == "demo"
    assert len(option_summary(group, option)) > 10


def test_papers_settings_stand_in_the_qwen_recipes():
    for recipe in ("qwen3_0_6b", "qwen3_1_7b", "qwen3_8b"):
        config = compose([f"recipe={recipe}"])
        assert config.data.seq_length == 24576
        assert config.convert.lr == 1e-4
        assert config.convert.sink_range == (0, 256)
        assert config.convert.window_range == (512, 8192)
        assert config.convert.chunk_range == (512, 4096)
        assert config.convert.kl_weight == 1.0
        assert config.convert.ce_weight == 0.0
        assert config.parallel.zero_stage == 2
        assert config.parallel.recompute
    assert config.model.path == "models/Qwen3-8B"


MISTAKES = {
    "recipe=dmo": ("recipe=dmo is unknown", "did you mean demo?"),
    "stage=convrt": ("stage=convrt is unknown", "did you mean convert?"),
    "stage=convert@mamba3": ("unknown branch 'mamba3'", "did you mean mamba2?"),
    "mixer=almem": ("mixer=almem is unknown", "did you mean allmem?"),
    "convert.stpes=3": ("convert.stpes is not a setting", "did you mean convert.steps?"),
    "convrt.steps=3": ("convrt.steps is not a setting", "did you mean convert.steps?"),
    "lr=3": ("lr is not a setting", "convert.lr"),
    "convert.learning_rate=1": ("is not a setting", "did you mean convert.lr?"),
    "convert.max_steps=1": ("is not a setting", "did you mean convert.steps?"),
    "convert.window=[1,2]": ("is not a setting", "did you mean convert.window_range?"),
    "mixer.window=64": ("is not a setting", "did you mean mixer.window_size?"),
    "sft.warmup=0.1": ("is not a setting", "did you mean sft.warmup_fraction?"),
    "convrt.learning_rate=1": ("is not a setting", "did you mean convert.lr?"),
    "mixer.memory_size=64": ("is not a setting", "did you mean mixer.memory.memory_size?"),
    "convert.colour=red": ("is not a setting; known: convert.", "convert.kl_weight"),
    "colour=red": ("colour is not a setting; known: align, collect, convert",),
    "mixr=allmem": ("mixr is not a setting", "did you mean mixer?"),
    "convert.steps=abc": ("convert.steps='abc'", "must be a whole number"),
    "convert.steps=2.5": ("convert.steps=2.5", "must be a whole number"),
    "convert.lr=fast": ("convert.lr='fast'", "must be a number"),
    "run.debug=perhaps": ("run.debug='perhaps'", "must be true or false"),
    "convert.decay_shape=sqr": ("'sqr' is not one of", "did you mean sqrt?"),
    "convert.window_range=[4]": ("must have 2 values", "window_range"),
    "convert.window_range=4": ("must be a list", "[4]"),
    "convert.weights=3": ("must be a section", "convert.weights"),
    "convert.lr=1,2": ("is a sweep", "one value"),
    "convert.steps": ("is not KEY=VALUE", "did you mean convert.steps?"),
    "mixer.chunk_size=300 ; mixer.window_size=128": (
        "mixer.chunk_size=300 exceeds",
        "set mixer.chunk_size=128 or less",
    ),
    "convert.steps=0": ("convert.steps=0 must be at least 1", "set convert.steps=1"),
    "convert.lr=0": ("convert.lr=0.0 must be positive", "set convert.lr"),
    "convert.warmup_fraction=1.5": ("must lie in [0, 1]", "convert.warmup_fraction=1.5"),
    "convert.decay_fraction=0.95 ; convert.warmup_fraction=0.1": (
        "exceeds 1",
        "set convert.decay_fraction=0.9 or less",
    ),
    "convert.micro_batch_size=3 ; convert.batch_size=8": (
        "is not a multiple of micro_batch_size=3",
        "set convert.batch",
    ),
    "convert.chunk_range=[512,512] ; convert.window_range=[64,256]": (
        "but c <= W must hold",
        "set convert.chunk_range=",
    ),
    "convert.sink_range=[8,0]": ("must rise", "set convert.sink_range=[8,8]"),
    "convert.multiple_of=1000 ; convert.window_range=[64,256]": (
        "holds no multiple",
        "multiple_of=1",
    ),
    "convert.weights.text=-1": ("must not be negative", "convert.weights.text"),
    "convert.kl_weight=0 ; convert.ce_weight=0": ("both 0", "set convert.kl_weight=1"),
    "parallel.zero_stage=4": ("parallel.zero_stage=4", "set parallel.zero_stage=2"),
    "parallel.tp=0": ("parallel.tp=0 must be at least 1", "set parallel.tp=1"),
    "parallel.sp=true": ("but parallel.tp=1", "set parallel.tp=2 or more, or parallel.sp=false"),
    "parallel.cp_mode=ring": ("parallel.cp_mode='ring' is not one of", "wavefront, a2a"),
    "model=tiny ; stages=[prepare,convert]": ("no pretrain", "stages"),
    "model.path=null": ("neither of path and scratch", "set exactly one"),
    "stages=[prepare,convrt]": ("stage=convrt is unknown", "did you mean convert?"),
    "data.sources=[{kind: recal}]": ("recal", "recall"),
    "data.seq_lenght=5": ("data.seq_lenght is not a setting", "data.seq_length"),
    "eval.chunk_size=4096": ("eval.chunk_size=4096 exceeds", "set eval.chunk_size"),
    "mixer.memory.memory_size=0": ("mixer.memory.memory_size=0 must be positive", "above 0"),
    "mixer.memory.eta_init=0": ("mixer.memory.eta_init=0.0 must be positive", "above 0"),
    "mixer.memory.decay=1": ("mixer.memory.decay=1.0 is not a share", "mixer.memory.decay in"),
    "recipe=tiny ; mixer.memory.memory_size=65 ; --cfg": (
        "error: mixer.memory.memory_size=65 is not a multiple of its 2 heads",
        "set mixer.memory.memory_size to 64 or mixer.memory.num_heads to a divisor (run.debug",
    ),
    "tracking.timeout_s=0": ("timeout_s=0", "must be positive"),
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistake_is_one_line_that_names_the_mend(override: str, capsys: pytest.CaptureFixture[str]):
    changes = override.split(" ; ")
    words = changes if override.startswith("recipe") else ["recipe=demo", *changes]
    assert main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    for part in MISTAKES[override]:
        assert part in lines[0]


def test_a_recipe_must_be_named(capsys: pytest.CaptureFixture[str]):
    assert main(["stage=convert"]) == 2
    assert "recipe is not given; set recipe=NAME, one of demo" in capsys.readouterr().err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]):
    assert main(["recipe=demo", "convert.steps=0", "run.debug=true"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_values_of_the_command_line_win():
    config = compose(["recipe=demo", "convert.lr=1e-5", "+convert.steps=7", "run.dir=x/y"])
    assert config.convert.lr == 1e-5
    assert config.convert.steps == 7
    assert config.run.dir == "x/y"


def test_stage_with_another_branch_is_a_stage():
    assert compose(["recipe=demo", "stage=convert@mamba2"]).stage.name == "convert@mamba2"
    assert split_entry("convert@mamba2") == ("convert", "mamba2")


def test_configuration_is_frozen_and_plain():
    config = compose(["recipe=demo"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.convert.steps = 3  # type: ignore[misc]
    assert build(RunConfig, to_plain(config)) == config
    assert flatten(to_plain(config))["convert.steps"] == config.convert.steps


def test_every_field_of_the_schema_is_documented():
    for module in (schema, train_schema):
        for cls in vars(module).values():
            if isinstance(cls, type) and cls.__module__ == module.__name__:
                documented = field_docs(cls)
                assert [f.name for f in dataclasses.fields(cls) if f.name not in documented] == []


def test_help_names_stages_recipes_and_every_setting(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in (*RECIPES, *schema.STAGES, "convert@mamba2", "run.dir", "--cfg"):
        assert word in text
    section = help_text("convert")
    for field in dataclasses.fields(train_schema.ConvertSettings):
        assert f"convert.{field.name}" in section
    with pytest.raises(ValueError, match="did you mean convert"):
        help_text("convrt")
    assert main(["stage=evaluate", "--help", "evaluate"]) == 0
    assert "eval.suites" in capsys.readouterr().out
    assert main(["stage=evaluate", "-h"]) == 0
    assert "Sections" in capsys.readouterr().out
    assert "--help data.sources" in help_text("data")
    assert "data.sources.filters" in help_text("data.sources")
    assert "ISO 639-1" in help_text("data.sources.filters")
    with pytest.raises(ValueError, match=r"data\.sorces is not a section.*sources"):
        help_text("data.sorces")


def test_known_keys_reach_into_sections():
    keys = set(schema_keys())
    assert {"convert.lr", "mixer.memory.eta_init", "eval.window_size", "data.seq_length"} <= keys
