"""A tokenizer under which the model would read other text is refused before anything is made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.run import main

BASE = Path(__file__).resolve().parents[2] / "models" / "demo_base"


def test_a_tokenizer_that_is_not_the_models_is_refused_by_prepare_and_convert(
    tmp_path: Path, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
):
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    words = [
        *(word for word in tiny_overrides if not word.startswith("data.tokenizer")),
        *("model=demo", f"model.path='{base}'", "mixer.memory.num_heads=4"),
        f"run.dir={tmp_path / 'run'}",
        "stages=[prepare,convert]",
        "convert.steps=2",
    ]
    other = next(word for word in tiny_overrides if word.startswith("data.tokenizer"))
    for stage in ("prepare", "convert"):
        capsys.readouterr()
        assert main([*words, other, f"stage={stage}"]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "the tokenizer of model.path=" in error
        assert "leave data.tokenizer out" in error
    assert not (tmp_path / "run" / "prepare" / "manifest.json").exists()

    # The model's own, with a token and another template: its ids mean the same text.
    extended = tmp_path / "extended"
    shutil.copytree(base, extended)
    file = extended / "tokenizer.json"
    plain = json.loads(file.read_text("utf-8"))
    ids = [*plain["model"]["vocab"].values(), *(token["id"] for token in plain["added_tokens"])]
    added = {**plain["added_tokens"][-1], "id": max(ids) + 1, "content": "<|new|>"}
    file.write_text(json.dumps({**plain, "added_tokens": [*plain["added_tokens"], added]}), "utf-8")
    (extended / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
    assert main([*words, f"data.tokenizer='{extended}'", "stage=prepare"]) == 0

    # Shards of it, then the model's own tokenizer: the hash differs.
    capsys.readouterr()
    assert main([*words, "stage=convert"]) == 2
    error = capsys.readouterr().err
    assert "another tokenizer" in error
