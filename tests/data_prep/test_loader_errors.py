"""What the loader refuses, and how many files it holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from data_prep.loader import ShardLoader
from data_prep.shards import Manifest, write_shard
from tests.data_prep.loader_data import LENGTH, make_sample, numbers, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def drain(folder: Path) -> None:
    numbers(ShardLoader(folder, batch_size=4, epochs=1))


def test_missing_and_corrupt_shards_are_clear_errors(tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data")
    shard = folder / "train" / "shard-00001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-512])
    with pytest.raises(ValueError, match=r"shard-00001.tar has \d+ bytes, the manifest says"):
        drain(folder)
    flipped = bytearray(whole)
    flipped[700] ^= 1
    shard.write_bytes(bytes(flipped))
    with pytest.raises(ValueError, match=r"shard-00001.tar does not match the manifest's sha256"):
        drain(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-00001.tar is missing; run stage=prepare again"):
        drain(folder)
    shard.write_bytes(whole)
    drain(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="run stage=prepare first"):
        drain(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"dp_rank": 2, "dp_size": 2}, "dp_rank=2"),
        ({"split": "eval"}, "no eval samples"),
        ({"kinds": ["poem"]}, "no train samples of kinds"),
        (
            {"weights": {"poem": 1.0}},
            r"^weights\.poem=1\.0 .* none of chat, code, recall, talk, text",
        ),
        (
            {"weights": {"poem": 1.0}, "weights_key": "sft.weights"},
            r"^sft\.weights\.poem=.*; name one",
        ),
        ({"weights": {"code": 0.0}}, r"^weights\.code=0\.0 must be above 0"),
        ({"weights": {"code": 1.0}, "epochs": 1}, "give one of them"),
    ],
)
def test_wrong_arguments_are_refused(data: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardLoader(data, **{"batch_size": 1, **fields})


def test_many_shards_keep_few_files_open(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    records = [
        write_shard(
            tmp_path / "train" / f"shard-{i:05d}.tar",
            [make_sample(2 * i, "code"), make_sample(2 * i + 1, "code")],
            first_key=2 * i,
            source="code",
            kind="text",
        )
        for i in range(100)
    ]
    Manifest(
        tokenizer_hash="t",
        vocab_size=300,
        seq_length=LENGTH,
        config_hash="c",
        config={},
        splits={"train": tuple(records)},
        reports={},
    ).save(tmp_path)
    loader = ShardLoader(tmp_path, batch_size=8, epochs=1)
    assert sorted(numbers(loader)) == list(range(200))
    held = [p for p in os.listdir("/proc/self/fd") if str(tmp_path) in _target(p)]
    assert len(held) <= 64


def _target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""
