"""`stage=collect` from the command line: the same set whoever makes it, and after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.loader import ShardLoader
from pipeline.collecting.responses import seed_of
from pipeline.run import main

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "{kind: python_packages, name: files, packages: [rich], max_documents: 20, "
SOURCE += "chat: {too_long: truncate_document}}"
WORDS = [
    *("recipe=tiny", "model=demo", "tracking=none", "parallel.num_threads=1"),
    *("data.seq_length=64", "data.train_samples=16", "data.eval_samples=4"),
    "data.sources=[{kind: python_packages, name: code, packages: [yaml], eval_packages: [rich]}]",
    "stages=[prepare,convert,collect,convert:on_policy,export]",
    *("convert.steps=2", "on_policy.steps=2", "collect.responses_per_prompt=4"),
    *(f"collect.sources=[{SOURCE}]", "collect.batch_size=3", "collect.prompts_per_file=4"),
]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the stages before `collect`."""
    folder = tmp_path_factory.mktemp("converted")
    for stage in ("prepare", "convert"):
        assert main([*WORDS, f"stage={stage}", f"run.dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def collected(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with `collect`, by one rank that nobody disturbed."""
    folder = tmp_path_factory.mktemp("collected") / "run"
    shutil.copytree(converted, folder)
    assert main([*WORDS, "stage=collect", f"run.dir={folder}"]) == 0
    return folder


def contents(run_dir: Path) -> dict[str, bytes]:
    """Responses and shards."""
    folder = run_dir / "collect"
    files = [*folder.glob("responses/part-*"), *folder.glob("train/*")]
    assert len(files) > 8
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def start(run_dir: Path, *launch: str, **variables: str) -> subprocess.Popen[bytes]:
    """`stage=collect` as a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, *launch, "-m", "pipeline.run", *WORDS, "stage=collect"]
    return subprocess.Popen([*command, f"run.dir={run_dir}"], env=environment, cwd=ROOT)


def test_responses_are_a_chat_data_set_in_the_prompts_order(collected: Path):
    folder = collected / "collect" / "responses"
    manifest = json.loads((folder / "manifest.json").read_text())
    rows = [
        json.loads(line)
        for path in sorted(folder.glob("part-*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert len(rows) == manifest["totals"]["num_kept"] == 80
    assert [row["id"] for row in rows] == [
        f"{n:08d}.{draw}" for n in range(20) for draw in range(4)
    ]
    assert all(row["messages"][-1]["role"] == "assistant" for row in rows)
    assert all(row["messages"][-1]["content"] for row in rows)
    assert all(row["prompt_tokens"] <= 32 and row["response_tokens"] <= 16 for row in rows)
    first = [row["messages"][-1]["content"] for row in rows[:4]]
    assert len(set(first)) > 1  # draws of one prompt differ
    assert not (folder / "unfinished").exists()
    speeds = (collected / "collect" / "metrics.jsonl").read_text()
    assert '"tokens_per_s"' in speeds


def test_shards_carry_loss_on_responses_only(collected: Path):
    loader = ShardLoader(collected / "collect", split="train", batch_size=1, shuffle=False)
    rows = [
        json.loads(line)
        for path in sorted((collected / "collect" / "responses").glob("part-*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    # a response that is tokenized again may have other tokens; the turn's end is one more
    least = sum(row["response_tokens"] + 1 for row in rows if row["same_tokens"])
    total = sum(record.num_loss_tokens for record in loader.manifest.splits["train"])
    assert least <= total <= sum(row["response_tokens"] + 1 for row in rows) * 1.5
    batch = next(loader)
    assert 0 < batch.loss_mask.sum() < batch.loss_mask.numel()


def test_two_ranks_collect_the_same_set(converted: Path, collected: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    shutil.copytree(converted, run_dir)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert start(run_dir, *launch).wait(timeout=120) == 0
    assert contents(run_dir) == contents(collected)


def test_after_kill_9_the_same_command_collects_the_same_set(
    converted: Path, collected: Path, tmp_path: Path
):
    run_dir = tmp_path / "run"
    shutil.copytree(converted, run_dir)
    process = start(run_dir)
    unfinished = run_dir / "collect" / "responses" / "unfinished"
    deadline = time.monotonic() + 150
    while not list(unfinished.glob("*.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for path in unfinished.glob("*.jsonl"):
        with path.open("ab") as file:  # as a kill in the middle of a line leaves it
            file.write(b'{"id": "0000')
    assert not (run_dir / "collect" / "DONE.json").exists()
    assert main([*WORDS, "stage=collect", f"run.dir={run_dir}"]) == 0
    assert contents(run_dir) == contents(collected)
    steps = [
        [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run_dir / "collect", collected / "collect")
    ]
    lost = set(steps[1]) - set(steps[0])  # a kill may come between a batch and its line
    assert steps[0] == [step for step in steps[1] if step not in lost]
    assert len(lost) <= 1


def test_conversion_goes_on_from_convert_on_what_was_collected(
    collected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run_dir = tmp_path / "run"
    shutil.copytree(collected, run_dir)
    words = [*WORDS, f"run.dir={run_dir}"]
    assert main([*words, "stage=all"]) == 0
    mark = json.loads((run_dir / "convert_on_policy" / "DONE.json").read_text())
    assert mark["stage"] == "convert:on_policy"
    assert "collect/manifest.json" in mark["inputs"]
    assert "convert/checkpoints/step_00000002/model.safetensors" in mark["inputs"]
    lines = (run_dir / "convert_on_policy" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert all(json.loads(line)["train/kl"] >= 0 for line in lines)
    exported = json.loads((run_dir / "export" / "DONE.json").read_text())["inputs"]
    assert "convert_on_policy/checkpoints/step_00000002/model.safetensors" in exported
    capsys.readouterr()
    assert main([*words, "stage=all"]) == 0
    error = capsys.readouterr().err
    for entry in ("collect", "convert:on_policy"):
        assert f"{entry}: already complete" in error
    assert main([*words, "collect.temperature=0.5"]) == 2
    assert "collect was made with collect.temperature=1.0" in capsys.readouterr().err
    moved = tmp_path / "moved"
    run_dir.rename(moved)
    assert main([*WORDS, "stage=collect", f"run.dir={moved}"]) == 0
    assert "collect: already complete" in capsys.readouterr().err


def test_a_damaged_file_of_responses_is_named(
    collected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run_dir = tmp_path / "run"
    shutil.copytree(collected, run_dir)
    (run_dir / "collect" / "DONE.json").unlink()
    with (run_dir / "collect" / "responses" / "part-00001.jsonl").open("a") as file:
        file.write("x\n")
    assert main([*WORDS, "stage=collect", f"run.dir={run_dir}"]) == 2
    assert "part-00001.jsonl is not as part-00001.json says; delete both" in capsys.readouterr().err


def test_responses_to_other_prompts_are_not_mixed(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run_dir, text = tmp_path / "run", tmp_path / "prompt.txt"
    shutil.copytree(converted, run_dir)
    words = [*WORDS, "stage=collect", f"run.dir={run_dir}"]
    words.append(f"collect.sources=[{{kind: text, path: '{text}'}}]")
    text.write_text("one")
    assert main(words) == 0
    (run_dir / "collect" / "DONE.json").unlink()
    text.write_text("two")
    assert main(words) == 2
    assert "has responses to other prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("collect.max_prompt_tokens=6", "hold no prompt that can be used (20 × longer than"),
        ("collect.sources=[{kind: text, path: no/such}]", "no/such"),
    ],
)
def test_prompts_that_cannot_be_used_are_one_line(
    converted: Path, tmp_path: Path, word: str, part: str, capsys: pytest.CaptureFixture[str]
):
    run_dir = tmp_path / "run"
    shutil.copytree(converted, run_dir)
    assert main([*WORDS, "stage=collect", f"run.dir={run_dir}", word]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1
    assert part in error[0]


def test_seeds_differ_between_prompts_draws_and_runs():
    found = [seed_of(run, n, draw) for run in range(3) for n in range(50) for draw in range(50)]
    assert len(set(found)) == len(found)
