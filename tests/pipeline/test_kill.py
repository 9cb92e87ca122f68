"""SIGKILL at random moments: never a half checkpoint, and the result is bit for bit the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

SERVER = Path(__file__).with_name("kill_server.py")
ROOT = Path(__file__).resolve().parents[2]
SAVE_OFTEN = [
    f"{stage}.{setting}"
    for stage in ("pretrain", "convert")
    for setting in ("checkpoint_every=3", "keep_last=2", "keep_best=1")
]


def kill_often(
    folder: Path, tiny: list[str], environment: dict[str, str], **plan: Any
) -> dict[str, Any]:
    """Let the server kill runs of pretrain and convert; what it saw."""
    files = folder / "plan.json", folder / "out.json"
    stages = ["pretrain", "convert"]
    recipe = ["stage=all", "stages=[prepare,pretrain,convert]", *SAVE_OFTEN]
    plan = {"folder": str(folder), "stages": stages, "seed": 0, **plan}
    plan["words"] = [*tiny, *recipe, *plan["words"]]
    files[0].write_text(json.dumps(plan))
    done = subprocess.run(
        [sys.executable, str(SERVER), *map(str, files)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(files[1].read_text())
    result["stderr"] = done.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def one_rank(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_overrides: list[str],
    environment: dict[str, str],
) -> dict[str, Any]:
    """More than fifty kills of one rank."""
    return kill_often(
        tmp_path_factory.mktemp("kill"),
        tiny_overrides,
        environment,
        num_kills=52,
        num_ranks=1,
        longest_s=0.7,
        words=["pretrain.steps=60", "convert.steps=30"],
    )


def test_fifty_kills_leave_no_half_checkpoint_and_change_no_bit(one_rank: dict[str, Any]):
    assert one_rank["wrong"] == [], one_rank["stderr"]
    assert sum(one_rank["kills"].values()) >= 50


def test_some_kills_were_aimed_at_saves_and_some_at_nothing(one_rank: dict[str, Any]):
    assert one_rank["kills"]["aimed"] >= 15
    assert one_rank["kills"]["random"] >= 15


def test_every_process_was_killed_or_came_to_its_end(one_rank: dict[str, Any]):
    assert set(Counter(map(tuple, one_rank["codes"]))) <= {(-9,), (0,)}


@pytest.fixture(scope="module")
def two_ranks(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_overrides: list[str],
    environment: dict[str, str],
) -> dict[str, Any]:
    """Kills of one of two ranks."""
    return kill_often(
        tmp_path_factory.mktemp("kill2"),
        tiny_overrides,
        environment,
        num_kills=30,
        num_ranks=2,
        longest_s=3.0,
        words=["pretrain.steps=60", "convert.steps=30", "parallel.timeout_s=15"],
    )


@pytest.mark.slow
def test_thirty_kills_of_one_of_two_ranks_change_no_bit(two_ranks: dict[str, Any]):
    assert two_ranks["wrong"] == [], two_ranks["stderr"]
    assert sum(two_ranks["kills"].values()) >= 30


@pytest.mark.slow
def test_the_other_rank_ends_too(two_ranks: dict[str, Any]):
    for codes in two_ranks["codes"]:
        assert codes in ([0, 0],) or (-9 in codes and -1000 not in codes), codes
    assert max(two_ranks["others_s"]) < 30
