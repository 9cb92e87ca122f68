"""What `model=PATH` may name, and that a run's checkpoints and its export are one model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.generation_open import MixerChoice, open_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny recipe, from its base to its export."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    done = subprocess.run(
        [
            sys.executable, "-m", "pipeline.run", "stage=all", "recipe=tiny", f"run.dir={folder}",
            "stages=[prepare,pretrain,convert,export]", "tracking=none", "pretrain.steps=2",
            "convert.steps=2",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def opened(path: Path, **choice):
    return open_model(path, MixerChoice(**choice), device=torch.device("cpu"), dtype=torch.float32)


def logits(model) -> torch.Tensor:
    ids = torch.randint(1, 200, (1, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def test_a_run_s_checkpoints_and_its_export_are_one_model(run_dir):
    export = opened(run_dir)
    assert export.description.startswith(str(run_dir / "export"))
    direct = opened(run_dir / "export")
    assert torch.equal(logits(export.model), logits(direct.model))
    for choice in ({}, {"mode": "swa"}, {"mode": "full"}, {"window_size": 20, "chunk_size": 5}):
        expected = opened(run_dir / "export", **choice)
        aside = (run_dir / "export").rename(run_dir / "aside")
        try:
            found = opened(run_dir, **choice)
        finally:
            aside.rename(run_dir / "export")
        assert "pretrain" in found.description
        assert found.stop_ids == expected.stop_ids
        torch.testing.assert_close(
            logits(found.model), logits(expected.model), atol=1e-6, rtol=1e-5
        )
    (run_dir / "export").rename(run_dir / "aside")
    with pytest.raises(ValueError, match="no stage that trains mamba2"):
        opened(run_dir, mode="mamba2")


def test_a_base_folder_is_opened_in_the_modes_that_need_no_branch(run_dir):
    base = run_dir / "pretrain" / "hf"
    full, window = opened(base), opened(base, mode="swa", window_size=80, num_sinks=0)
    torch.testing.assert_close(logits(full.model), logits(window.model), atol=1e-5, rtol=1e-5)
    narrow = opened(base, mode="swa", window_size=8, num_sinks=0)
    assert (logits(narrow.model) - logits(full.model)).abs().max() > 1e-3
    assert full.model.kernel_backends() == {"window": "sdpa"}
