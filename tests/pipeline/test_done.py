"""A stage is done only while what it was made from is the same."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.run import main

STAGES = "stages=[prepare,pretrain,convert,evaluate,export]"


@pytest.fixture
def words(tmp_path: Path, tiny_overrides: list[str]) -> list[str]:
    return [
        *tiny_overrides,
        STAGES,
        f"run.dir={tmp_path / 'run'}",
        "pretrain.steps=4",
        "pretrain.checkpoint_every=2",
        "convert.steps=4",
        "convert.checkpoint_every=2",
        "eval.kinds=[text]",
        "eval.timing_repeats=0",
        "eval.mixers=[full,allmem]",
        "eval.controls=[]",
    ]


def results_of(run_dir: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((run_dir / "evaluate" / "results.json").read_text())
    return results


def unfinish(stage_dir: Path) -> None:
    """As if the stage had been killed after its checkpoint before the last."""
    (stage_dir / "DONE.json").rename(stage_dir / "inputs.json")
    mark = json.loads((stage_dir / "inputs.json").read_text())
    (stage_dir / "inputs.json").write_text(json.dumps(mark["inputs"]))
    shutil.rmtree(sorted((stage_dir / "checkpoints").glob("step_*"))[-1])


def test_what_was_made_from_unfinished_or_other_weights_is_made_again(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run_dir = tmp_path / "run"

    def run(*more: str) -> tuple[str, str]:
        assert main([*words, *more]) == 0
        output = capsys.readouterr()
        return output.out, output.err

    run()
    whole = results_of(run_dir)
    exported = (run_dir / "export" / "model.safetensors").read_bytes()
    assert whole["config"]["weights"]["allmem"][-1] == "convert/checkpoints/step_00000004"

    # Nothing changes, not even for new dates of the same files: all is skipped, the table is shown.
    os.utime(run_dir / "convert" / "checkpoints" / "step_00000004" / "model.safetensors")
    out, err = run()
    assert err.count("already complete") == 5
    assert "AllMem evaluation" in out
    assert f"export   {run_dir / 'export'}" in out
    out, err = run("stage=evaluate")
    assert err.count("already complete") == 1
    assert "AllMem evaluation" in out

    # convert is unfinished: evaluate names it, export tells of it, both are done again afterwards.
    unfinish(run_dir / "convert")
    out, err = run("stage=evaluate")
    assert "evaluate: again, because convert/checkpoints/step_00000004/model" in err
    assert list(results_of(run_dir)["mixers"]) == ["full"]
    missing = "stage convert is not finished (step_00000002)"
    assert results_of(run_dir)["missing"] == {"allmem": missing}
    assert "allmem (not trained)" in out
    _, err = run("stage=export")
    assert "export: starts from convert, which is not finished" in err
    assert (run_dir / "export" / "model.safetensors").read_bytes() != exported
    _, err = run()
    assert "convert: going on after step 2" in err
    assert err.count("again, because") == 2
    assert results_of(run_dir)["mixers"] == whole["mixers"]
    assert results_of(run_dir)["missing"] == {}
    assert (run_dir / "export" / "model.safetensors").read_bytes() == exported

    # convert is trained anew with another rate: both are done again.
    shutil.rmtree(run_dir / "convert")
    _, err = run("convert.lr=0.03")
    assert "evaluate: complete in" in err
    assert "export: complete in" in err
    assert results_of(run_dir)["mixers"]["full"] == whole["mixers"]["full"]
    assert results_of(run_dir)["mixers"]["allmem"] != whole["mixers"]["allmem"]


@pytest.mark.parametrize("finished", [True, False])
def test_training_goes_on_only_from_the_weights_that_it_began_with(
    words: list[str], tmp_path: Path, finished: bool, capsys: pytest.CaptureFixture[str]
):
    run_dir = tmp_path / "run"
    for stage in ("prepare", "pretrain", "convert"):
        assert main([*words, f"stage={stage}"]) == 0
    if not finished:
        unfinish(run_dir / "convert")
    weights = run_dir / "pretrain" / "checkpoints" / "step_00000004" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert main([*words, "stage=convert"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{run_dir / 'convert'} was trained from other weights" in error
    assert "pretrain/checkpoints/step_00000004/model.safetensors has changed since" in error


def test_shards_of_other_settings_are_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([*words, "stage=prepare"]) == 0
    for stage in ("pretrain", "evaluate"):
        assert main([*words, f"stage={stage}", "data.train_samples=12"]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"{tmp_path / 'run' / 'prepare'} was made with data.train_samples=" in error
        assert "this run has data.train_samples=12; give the old value" in error
    assert main([*words, "stage=pretrain", "data.num_workers=1"]) == 0  # how, not what


def test_a_base_that_was_made_again_is_noticed(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for stage in ("prepare", "pretrain"):
        assert main([*words, f"stage={stage}"]) == 0
    base = tmp_path / "run" / "pretrain" / "hf"
    shutil.copytree(base, tmp_path / "base")
    other = [
        *words,
        f"run.dir={tmp_path / 'other'}",
        "model.scratch=null",
        "model.embedding_std=null",
        f"model.path={tmp_path / 'base'}",
        "stages=[prepare,evaluate]",
        "eval.mixers=[full]",
    ]
    assert main(other) == 0
    file = tmp_path / "base" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    assert main(other) == 0
    said = capsys.readouterr().err
    assert "evaluate: again, because model.path/model.safetensors has changed" in said


def test_the_last_lines_say_where_everything_is(
    words: list[str], tmp_path: Path, cli: Callable[..., Any]
):
    words = [word for word in words if not word.startswith("tracking=")]
    run_dir = tmp_path / "run"
    done = cli(*words)
    lines = done.stdout.splitlines()
    assert lines[0].strip() == "AllMem evaluation"
    assert all(len(line) <= 80 or str(run_dir) in line for line in lines)
    places = dict(line.split(maxsplit=1) for line in lines[-6:])
    assert places["results"] == f"{run_dir}/evaluate/results.json, table.md beside it"
    assert places["base"] == f"{run_dir}/pretrain/hf"
    assert places["export"] == f"{run_dir}/export"
    assert places["metrics"].endswith(
        f"mlflow ui --backend-store-uri sqlite:///{run_dir}/mlflow.db"
    )
    for word in ("warn", "Warning", "deprecated", "alembic", "INFO"):
        assert word not in done.stderr
    again = cli(*words)
    assert again.stdout == done.stdout


def shards_of(run_dir: Path) -> dict[str, bytes]:
    folder = run_dir / "prepare"
    files = [*folder.glob("*/shard-*"), folder / "manifest.json"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_lost_and_damaged_shards_are_mended(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run_dir = tmp_path / "run"
    words = [*words, "stages=[prepare,pretrain]"]
    assert main([*words, "stage=all"]) == 0
    before = shards_of(run_dir)
    shard = run_dir / "prepare" / "train" / "shard-00000.tar"
    shard.unlink()
    capsys.readouterr()
    assert main([*words, "stage=all"]) == 0
    err = capsys.readouterr().err
    assert "prepare: again, because train/shard-00000.tar is missing" in err
    assert "pretrain: already complete" in err
    assert shards_of(run_dir) == before

    content = bytearray(shard.read_bytes())
    content[512 + 128 + 4] ^= 1
    shard.write_bytes(content)
    shutil.rmtree(run_dir / "pretrain")
    assert main([*words, "stage=pretrain"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "does not match the manifest's sha256; delete it and run stage=prepare again" in error
    assert main([*words, "stage=prepare"]) == 0
    assert "prepare: again, because train/shard-00000.tar is damaged" in capsys.readouterr().err
    assert shards_of(run_dir) == before
    assert main([*words, "stage=prepare"]) == 0
    assert "prepare: already complete" in capsys.readouterr().err


def test_a_tokenizer_that_was_replaced_is_noticed(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    given = next(word for word in words if word.startswith("data.tokenizer="))
    folder = tmp_path / "tokenizer"
    shutil.copytree(given.split("=")[1].strip("'"), folder)
    words = [*words, f"data.tokenizer='{folder}'", "stages=[prepare,pretrain,export]"]
    assert main([*words, "stage=prepare"]) == 0
    template = folder / "chat_template.jinja"
    former = template.read_text(encoding="utf-8")
    template.write_text("x" + former, encoding="utf-8")
    for stage, why in (
        ("prepare", "another configuration, tokenizer or text; name another run.dir or"),
        ("pretrain", "were made with another tokenizer than"),
        ("export", "put the former one back, or take another run.dir"),
    ):
        capsys.readouterr()
        assert main([*words, f"stage={stage}"]) == 2
        assert why in capsys.readouterr().err.splitlines()[-1]
    template.write_text(former, encoding="utf-8")
    assert main([*words, "stage=all"]) == 0
