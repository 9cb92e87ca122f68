"""Commands of a chain, without Slurm: what is submitted, with which options, what is refused."""

from __future__ import annotations

import fcntl
import json
import shlex
import subprocess
from pathlib import Path

import pytest

from pipeline.config import compose
from pipeline.context import folder_name
from pipeline.fingerprint import digest, fingerprint
from pipeline.submit import LOCK, main
from pipeline.submitting.chain import done_stages, make_jobs, words_to_pass_on
from pipeline.submitting.queue import parse
from pipeline.submitting.record import Record, SubmittedJob, read_record, write_record
from pipeline.submitting.settings import JobSettings
from pipeline.submitting.tables import find_log, rows_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without Slurm's commands."""
    monkeypatch.setenv("PATH", str(tmp_path))


def dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """Lines of `--dry-run`."""
    assert main([*words, "--dry-run"]) == 0, capsys.readouterr().err
    return capsys.readouterr().out.splitlines()


def mark_done(words: list[str], run_dir: Path, *entries: str) -> None:
    """Write the marks that finished stages leave."""
    import torch

    config = compose([*words, f"run.dir={run_dir}"])
    for entry in entries:
        flat = fingerprint(config, entry, dtype=torch.bfloat16, device=torch.device("cuda"))
        folder = run_dir / folder_name(entry)
        folder.mkdir(parents=True)
        mark = {"stage": entry, "hash": digest(flat), "config": flat}
        (folder / "DONE.json").write_text(json.dumps(mark))


@pytest.mark.usefixtures("no_slurm")
def test_a_dry_run_is_a_shell_script_whose_jobs_wait_for_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run_dir = tmp_path / "it's a run"
    lines = dry_run(capsys, "recipe=qwen3_8b", f'run.dir="{run_dir}"', "slurm.account=lab")
    assert lines[0] == f"mkdir -p {shlex.quote(str(run_dir / 'logs'))}"
    entries = compose(["recipe=qwen3_8b"]).stages
    assert entries[:5] == ("prepare", "convert", "collect", "convert:on_policy", "sft")
    assert len(lines) == 1 + len(entries)
    before = None
    for entry, line in zip(entries, lines[1:], strict=True):
        name, _, command = line.partition("=")
        assert name == f"job_{folder_name(entry)}"
        words = shlex.split(command.removeprefix("$(").removesuffix(")"))
        words = words[words.index("sbatch") :]
        waits = f"--dependency=afterok:${before}"
        assert (waits in words and "--kill-on-invalid-dep=yes" in words) == (before is not None)
        assert {"--account=lab", "recipe=qwen3_8b", f"stage={entry}"} <= set(words)
        script = next(Path(word) for word in words if word.endswith(".sh"))
        assert script.is_file()
        assert script.name == {
            "prepare": "prepare.sh",
            "convert": "convert_qwen3_8b.sh",
            "convert:on_policy": "convert_qwen3_8b.sh",
            "sft": "sft.sh",
            "evaluate": "evaluate.sh",
        }.get(entry, "stage.sh")
        given = words[words.index(str(script)) + 1 :]
        assert compose([*given, f"stage={entry}"]).run.dir == str(run_dir)
        before = name
    syntax = subprocess.run(["/bin/sh", "-n"], input="\n".join(lines), text=True, check=False)
    assert syntax.returncode == 0


def test_stages_ask_for_their_own_nodes_and_the_rest_as_every(tmp_path: Path):
    words = [
        *("recipe=tiny", "slurm.partition=all", "slurm.every.gpus_per_node=4"),
        *("slurm.every.time=1:00:00", "slurm.every.options=[--exclusive]"),
        *("slurm.on_policy.nodes=2", "slurm.on_policy.partition=big"),
        "slurm.prepare.workers=5",
        "slurm.sft.options=['--mail-type=FAIL']",
    ]
    jobs = make_jobs(compose(words), words, tmp_path)
    on_policy = jobs["convert:on_policy"].options
    assert on_policy.index("--partition=all") < on_policy.index(
        "--partition=big"
    )  # the last counts
    assert {"--nodes=2", "--gpus-per-node=4", "--ntasks-per-node=4"} <= set(on_policy)
    assert not any(option.startswith("--nodes") for option in jobs["convert"].options)
    assert {"--array=0-4", "--time=1:00:00"} <= set(jobs["prepare"].options)
    assert not [o for o in jobs["prepare"].options if "gpus" in o or "ntasks" in o]
    assert {"--exclusive", "--mail-type=FAIL"} <= set(jobs["sft"].options)
    assert jobs["convert@mamba2"].log.endswith("/logs/convert_mamba2-%j.out")


def test_what_decides_a_stage_is_passed_on_and_the_rest_is_not():
    words = [
        "recipe=tiny",
        "stage=sft",
        "convert.lr=1",
        "slurm=x",
        "slurm.sft.nodes=2",
        "run.dir=x",
    ]
    assert words_to_pass_on(words) == ("recipe=tiny", "convert.lr=1")
    with pytest.raises(ValueError, match=r"data\.num_workers=2 is set by.*slurm\.prepare\.workers"):
        words_to_pass_on(["recipe=tiny", "data.num_workers=2"])


def test_the_run_is_where_the_job_scripts_would_put_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ALLMEM_RUNS", str(tmp_path))
    assert dry_run(capsys, "recipe=tiny")[0] == f"mkdir -p {tmp_path}/tiny/logs"
    assert dry_run(capsys, "recipe=tiny", "run.dir=/x")[0] == "mkdir -p /x/logs"


def test_one_stage_can_be_submitted_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = dry_run(capsys, "recipe=tiny", "stage=convert@mamba2", f"run.dir={tmp_path}")
    assert len(lines) == 2
    assert "--dependency" not in lines[1]
    assert "stage=convert@mamba2" in lines[1]


def test_a_complete_stage_is_left_out_unless_it_needs_one_that_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["recipe=tiny", "tracking=none"]
    done = ("prepare", "pretrain", "align", "convert", "collect", "evaluate")
    mark_done(words, tmp_path, *done)  # as bfloat16 on a GPU, which this machine need not have
    config = compose([*words, f"run.dir={tmp_path}"])
    assert done_stages(config, tmp_path) == ["prepare", "pretrain", "align", "convert", "collect"]
    lines = dry_run(capsys, *words, f"run.dir={tmp_path}")
    assert lines[:5] == [f"# {entry}: complete, not submitted" for entry in done[:5]]
    names = [line.partition("=")[0] for line in lines[6:]]
    left = ("convert_mamba2", "convert_on_policy", "sft", "evaluate", "export")
    assert names == [f"job_{name}" for name in left]
    assert "--dependency" not in lines[6]


@pytest.mark.parametrize("change", ["convert.steps=9", "data.seq_length=128", "collect.top_p=0.5"])
def test_results_of_other_settings_are_refused_before_anything_is_submitted(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    mark_done(["recipe=tiny"], tmp_path, "prepare", "pretrain", "align", "convert", "collect")
    assert main(["recipe=tiny", f"run.dir={tmp_path}", change, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert f"this run has {change}" in error
    assert "delete" in error


@pytest.mark.usefixtures("no_slurm")
def test_without_slurm_there_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_dir = tmp_path / "run"
    assert main(["recipe=tiny", f"run.dir={run_dir}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: sbatch is not on this machine's PATH; call this on a login node"
    )
    assert not run_dir.exists()


def test_two_calls_at_a_time_for_one_run_are_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for name in ("sbatch", "scontrol"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 9\n")  # nobody gets as far as calling it
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with (run_dir / LOCK).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(["recipe=tiny", f"run.dir={run_dir}"]) == 2
    assert "another pipeline.submit is at work for" in capsys.readouterr().err
    assert not (run_dir / "submit.json").exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["recipe=tiny", "--dri-run"], ["submit has no --dri-run; it has --dry-run"]),
        (["status"], ["run.dir is not given"]),
        (["status", "run.dir"], ["'run.dir' is not KEY=VALUE; write run.dir=DIR"]),
        (["cancel", "run.dir="], ["'run.dir=' is not KEY=VALUE"]),
        (["status", "run.dir=no/such"], ["no/such has no submit.json"]),
        (["recipe=tiny", "stage=plan"], ["stage=plan is no job"]),
        (["recipe=tiny", "slurm=site"], ["slurm=site is unknown", "configs/slurm/site.yaml"]),
        (["recipe=tiny", "slurm.convert.node=2"], ["did you mean slurm.convert.nodes?"]),
        (["recipe=tiny", "slurm.sft.options=[exclusive]"], ["no option of sbatch", "--exclusive"]),
        (["recipe=tiny", "slurm.every.nodes=0"], ["nodes=0 must be at least 1"]),
        (
            ["recipe=tiny", "slurm.prepare.workers=0"],
            ["slurm.prepare.workers=0 must be at least 1"],
        ),
    ],
)
def test_a_mistake_is_one_line_with_its_mend(
    words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
):
    alone = words[0] in ("status", "cancel")
    assert main(words if alone else [*words, "--dry-run"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    for part in parts:
        assert part in lines[0]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in ("status", "cancel", "--dry-run", "recipe=", "slurm.partition", "docs/slurm.md"):
        assert word in text


def test_settings_of_a_stage_stand_over_those_of_all():
    every = JobSettings(nodes=2, mem="1G", options=("--a",))
    own = JobSettings(nodes=3, options=("--b",)).over(every)
    assert own == JobSettings(nodes=3, mem="1G", options=("--a", "--b"))


ARRAY = (
    "JobId=1 ArrayJobId=1 ArrayTaskId=1 JobName=a b UserId=root(0) JobState={} Reason={} "
    "Restarts=2 ExitCode={}:0 RunTime=00:01:02 NodeList=node1 MinMemoryNode=1G"
)


def test_the_tasks_of_an_array_are_one_state():
    running, failed = (
        ARRAY.format("RUNNING", "None", 0),
        ARRAY.format("FAILED", "NonZeroExitCode", 2),
    )
    complete = ARRAY.format("COMPLETED", "None", 0)
    assert parse(ARRAY.format("PREEMPTED", "None", 0)).has_failed
    state = parse(f"{complete}\n\n{running}\n{failed}\n")
    assert (state.state, state.active, state.restarts) == ("FAILED", True, 2)
    assert state.reason == "NonZeroExitCode (exit code 2)"
    assert state.tasks == "1 COMPLETED, 1 RUNNING, 1 FAILED"
    state = parse(f"{complete}\n{running}\n")
    assert (state.state, state.active, state.run_time, state.nodes) == (
        *("RUNNING", True, "00:01:02", "node1"),
    )
    assert not parse(complete).active


def submitted(entry: str, job: str, after: str | None, log: str = "") -> SubmittedJob:
    return SubmittedJob(entry=entry, job=job, after=after, log=log, command=(), submitted="now")


def test_the_record_is_read_as_it_was_written(tmp_path: Path):
    record = Record(recipe="tiny", words=("a=1",), stages=("prepare", "convert"))
    record = record.with_job(submitted("convert", "7", None)).with_job(
        submitted("prepare", "8", "7")
    )
    record = record.with_job(submitted("convert", "9", "8"))
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record
    assert [job.job for job in record.jobs] == ["8", "9"]
    assert [job.job for job in record.history] == ["7"]
    (tmp_path / "submit.json").write_text('{"jobs": [')
    with pytest.raises(ValueError, match="cannot be read"):
        read_record(tmp_path)


def test_a_job_that_slurm_has_forgotten_is_judged_by_its_mark(tmp_path: Path):
    record = Record(recipe="tiny", words=(), stages=("prepare", "convert"))
    record = record.with_job(submitted("prepare", "1", None)).with_job(
        submitted("convert", "2", "1")
    )
    (tmp_path / "prepare").mkdir()
    (tmp_path / "prepare" / "DONE.json").write_text("{}")
    gone = parse("")
    rows = rows_of(record, {"1": gone, "2": gone}, tmp_path)
    assert [row.state for row in rows] == ["COMPLETED", "UNKNOWN"]


def test_all_stages_behind_one_that_failed_name_it(tmp_path: Path):
    entries = ("convert", "sft", "export")
    record = Record(recipe="tiny", words=(), stages=entries)
    for number, entry in enumerate(entries, start=1):
        record = record.with_job(submitted(entry, str(number), str(number - 1)))
    failed = parse(ARRAY.format("FAILED", "NonZeroExitCode", 2))
    waits = parse(ARRAY.format("PENDING", "Dependency", 0))
    never = parse(ARRAY.format("CANCELLED", "DependencyNeverSatisfied", 0))
    for state, word in ((waits, "will be cancelled, "), (never, "")):
        rows = rows_of(record, {"1": failed, "2": state, "3": state}, tmp_path)
        assert [row.failed for row in rows] == [True, False, False]
        for row in rows[1:]:
            assert row.note.startswith(f"{word}because convert (job 1) is FAILED")


def test_of_an_array_the_log_that_names_an_error_is_shown(tmp_path: Path):
    for task, text in enumerate(("fine", "error: full", "fine")):
        (tmp_path / f"prepare-12_{task}.out").write_text(text)
    assert find_log(f"{tmp_path}/prepare-%A_%a.out", "12") == tmp_path / "prepare-12_1.out"
    assert find_log(f"{tmp_path}/prepare-%A_%a.out", "13") is None
