"""A stop that comes in a stage's very last step is heard as well."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline.context import StageContext
from pipeline.run import main
from pipeline.survival import EXIT_REQUEUE


def test_a_signal_in_the_last_step_ends_the_run_and_loses_nothing(
    tmp_path: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "stage=all", *tiny_overrides, "stages=[prepare,pretrain,convert]", "tracking=none",
        "pretrain.steps=3", "convert.steps=1", f"run.dir={tmp_path}",
    ]  # fmt: skip
    log = StageContext.log

    def log_and_stop(self: StageContext, step: int, values: dict[str, Any]) -> None:
        log(self, step, values)
        if self.entry == "pretrain" and step == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(StageContext, "log", log_and_stop)
        assert main(words) == EXIT_REQUEUE
    assert (tmp_path / "pretrain" / "checkpoints" / "step_00000003").is_dir()
    assert not (tmp_path / "pretrain" / "DONE.json").exists()
    assert not (tmp_path / "convert").exists()
    lines = (tmp_path / "pretrain" / "metrics.jsonl").read_text()
    assert main(words) == 0
    assert (tmp_path / "pretrain" / "metrics.jsonl").read_text() == lines  # no step was repeated
    for stage in ("pretrain", "convert"):
        assert (tmp_path / stage / "DONE.json").is_file()
    assert (tmp_path / "pretrain" / "hf" / "model.safetensors").is_file()
