"""Every job script, submitted to a real Slurm with the tiny recipe on the CPU.

Of the default tests `test_survival` runs the 0.6B and 1.7B scripts on two nodes, and
`tests/pipeline_submit` runs `stage.sh`; here are the others.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT, SlurmCluster, skip_without_slurm
from tests.slurm.conftest import shape

SCRIPTS = sorted(path.name for path in (ROOT / "slurm").glob("*.sh") if path.name != "common.sh")
TINY_STAGES = "stages=[prepare,pretrain,convert,sft,evaluate,export]"
UP_TO_CONVERT = "stages=[prepare,pretrain,convert]"
SHORT = [
    "pretrain.steps=2", "convert.steps=2", "sft.steps=2", "eval.max_samples=2", "eval.kinds=[text]",
    "eval.mixers=[swa,allmem]", "eval.controls=[]",
]  # fmt: skip


def script(name: str) -> str:
    return str(ROOT / "slurm" / name)


def run_words(tiny_words: list[str]) -> list[str]:
    return [*tiny_words, TINY_STAGES, *SHORT, "tracking=none"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that jobs are submitted from; it is not the project's."""
    return tmp_path_factory.mktemp("jobs")


def submit(
    cluster: SlurmCluster, place: Path, name: str, *words: str, nodes: int = 1, **env: str
) -> str:
    """Submit a script, wait for its job, and return what it printed; it must have worked."""
    job = cluster.sbatch(*shape(place, nodes=nodes), script(name), *words, cwd=place, **env)
    ended = cluster.wait(job)
    output = cluster.output(job)
    assert ended["JobState"] == "COMPLETED", output
    return output


@pytest.fixture(scope="module")
def made(cluster: SlurmCluster, place: Path, tiny_words: list[str]) -> Path:
    """A converted run: shards by an array of two, the other stages on two nodes."""
    words = run_words(tiny_words)
    array = cluster.sbatch(
        "--array=3-4", "--cpus-per-task=1", f"--output={place}/%x-%a.out",
        script("prepare.sh"), *words, cwd=place,
    )  # fmt: skip
    for task in (3, 4):
        ended = cluster.wait(f"{array}_{task}")
        assert ended["JobState"] == "COMPLETED", (place / f"prepare-{task}.out").read_text()
    output = submit(cluster, place, "convert_qwen3_8b.sh", *words, UP_TO_CONVERT, nodes=2)
    (place / "convert.out").write_text(output)
    return place / "runs" / "tiny"  # `runs` of the folder of submission, as without Slurm


def test_an_array_prepares_and_two_nodes_convert_from_any_folder(
    cluster: SlurmCluster, made: Path, place: Path
) -> None:
    assert "prepare, worker 1: complete" in (place / "prepare-4.out").read_text()
    assert "prepare: already complete" in (place / "convert.out").read_text()
    assert "nodes node1,node2" in (place / "convert.out").read_text()
    steps = (made / "convert" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == [1, 2]
    assert not list(Path(cluster.env["ALLMEM_SCRATCH"]).iterdir())


@pytest.mark.parametrize(
    ("name", "stage", "nodes"),
    [
        ("sft.sh", "sft", 1),
        ("evaluate.sh", "evaluate", 2),
        pytest.param("stage.sh", "export", 1, marks=pytest.mark.slow),
        pytest.param("convert_qwen3_8b.sh", "convert", 1, marks=pytest.mark.slow),
        pytest.param("convert_qwen3_1_7b.sh", "convert", 1, marks=pytest.mark.slow),
        pytest.param("convert_qwen3_0_6b.sh", "convert", 1, marks=pytest.mark.slow),
        pytest.param("sft.sh", "sft", 2, marks=pytest.mark.slow),
        pytest.param("evaluate.sh", "evaluate", 1, marks=pytest.mark.slow),
    ],
)
def test_a_script_does_its_stage(
    cluster: SlurmCluster,
    made: Path,
    tmp_path: Path,
    tiny_words: list[str],
    name: str,
    stage: str,
    nodes: int,
) -> None:
    run = tmp_path / "my runs" / "tiny"
    shutil.copytree(made, run)
    shutil.rmtree(run / stage, ignore_errors=True)
    words = [*run_words(tiny_words), UP_TO_CONVERT if stage == "export" else TINY_STAGES]
    words += ["stage=" + stage] if name.startswith(("convert", "stage")) else []
    output = submit(cluster, tmp_path, name, *words, nodes=nodes, ALLMEM_RUNS=str(run.parent))
    assert f"{stage}: complete" in output
    assert (run / stage / "DONE.json").is_file()


@pytest.mark.slow
def test_array_tasks_that_run_one_at_a_time_finish_by_giving_way(
    cluster: SlurmCluster, tmp_path: Path, tiny_words: list[str]
) -> None:
    """A worker that waits in vain ends with 75; only its own task is requeued."""
    run = tmp_path / "it's a run"
    words = [*run_words(tiny_words), "data.wait_s=2", f"run.dir='{tmp_path}/it\\'s a run'"]
    array = cluster.sbatch(
        "--array=0-1%1", "--cpus-per-task=1", f"--output={tmp_path}/%a.out",
        script("prepare.sh"), *words, cwd=tmp_path,
    )  # fmt: skip
    restarts = []
    for task in (0, 1):
        ended = cluster.wait(f"{array}_{task}")
        assert ended["JobState"] == "COMPLETED", (tmp_path / f"{task}.out").read_text()
        restarts.append(int(ended["Restarts"]))
    assert restarts[0] >= 1
    assert (run / "prepare" / "DONE.json").is_file()
    assert "requeues itself" in (tmp_path / "0.out").read_text()


def test_a_wrong_setting_fails_the_job_with_its_line(
    cluster: SlurmCluster, tmp_path: Path, tiny_words: list[str]
) -> None:
    words = [*shape(tmp_path, nodes=1), script("evaluate.sh"), *tiny_words, "eval.max_sample=2"]
    job = cluster.sbatch(*words, cwd=tmp_path)
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0")
    assert "did you mean eval.max_samples?" in cluster.output(job)


def test_a_script_finds_its_project_or_says_that_it_cannot(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    """Each job ends at the environment, which is not there: it has then found `common.sh`."""
    copy = tmp_path / "my scripts" / "evaluate.sh"
    copy.parent.mkdir()
    shutil.copy(script("evaluate.sh"), copy)
    words, env = [*shape(tmp_path, nodes=1)], {"ALLMEM_ENV": "/no/such/environment"}
    run_dir = f"run.dir={tmp_path}/slurm/run.sh"  # a word that looks like a script
    jobs = {
        "submitted": cluster.sbatch(*words, script("evaluate.sh"), run_dir, cwd=tmp_path, **env),
        "wrapped": cluster.sbatch(
            *words, "--wrap", f"bash {script('evaluate.sh')} '{run_dir}'", cwd=tmp_path, **env
        ),
        "copied, with ALLMEM_HOME": cluster.sbatch(
            *words, str(copy), run_dir, cwd=ROOT, ALLMEM_HOME=".", **env
        ),
        "copied": cluster.sbatch(*words, str(copy), run_dir, cwd=tmp_path, **env),
    }
    for how, job in jobs.items():
        assert cluster.wait(job)["ExitCode"] == "2:0", how
        output = cluster.output(job)
        if how == "copied":
            assert (
                "is not the project: sbatch PROJECT/slurm/evaluate.sh, or set ALLMEM_HOME" in output
            )
        else:
            assert "ALLMEM_ENV=/no/such/environment is neither" in output, (how, output)


def test_prepare_refuses_an_array_with_gaps(cluster: SlurmCluster, tmp_path: Path) -> None:
    words = ["--array=0-2:2", "--cpus-per-task=1", f"--output={tmp_path}/%a.out"]
    array = cluster.sbatch(*words, script("prepare.sh"), "recipe=tiny", cwd=tmp_path)
    assert cluster.wait(f"{array}_0")["ExitCode"] == "2:0"
    assert "must be consecutive: --array=0-1" in (tmp_path / "0.out").read_text()


def test_a_container_is_asked_of_srun(cluster: SlurmCluster, tmp_path: Path) -> None:
    words = [*shape(tmp_path, nodes=1), script("evaluate.sh"), "recipe=tiny"]
    job = cluster.sbatch(*words, cwd=tmp_path, ALLMEM_CONTAINER="/images/allmem.sqsh")
    ended = cluster.wait(job)  # this Slurm has no plugin for containers
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    assert "unrecognized option '--container-image=/images/allmem.sqsh'" in cluster.output(job)


def test_slurm_would_take_every_script_with_its_gpus(tmp_path: Path) -> None:
    skip_without_slurm()
    with SlurmCluster(8, cpus_per_node=64, gpus_per_node=8) as gpus:
        for name in SCRIPTS:
            told = gpus.run("sbatch", "--test-only", script(name), "recipe=tiny", check=False)
            assert "to start at" in told, (name, told)
        by_type = ["--test-only", "--gpus-per-node=h100:8", script("convert_qwen3_8b.sh")]
        assert "to start at" in gpus.run("sbatch", *by_type, check=False)
        by_type[1] = "--gpus-per-node=a100:8"  # these GPUs are not there
        assert "not available" in gpus.run("sbatch", *by_type, check=False)
        words = ["--test-only", "--nodes=8", script("convert_qwen3_8b.sh")]
        assert "using 512 processors" in gpus.run("sbatch", *words, check=False)
        words = ["--test-only", "--nodes=9", script("convert_qwen3_8b.sh")]
        assert "allocation failure" in gpus.run("sbatch", *words, check=False)


def test_the_scripts_hold_no_hyperparameters_and_are_clean_shell() -> None:
    allowed = {"stage", "recipe", "data.num_workers", "data.worker_rank"}
    for name in SCRIPTS:
        call = (ROOT / "slurm" / name).read_text().partition("\nallmem_run ")[2]
        assert call.endswith('-- "$@"\n'), name
        assert set(re.findall(r"([a-z_.]+)=", call)) <= allowed, name
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    scripts = [script(name) for name in (*SCRIPTS, "common.sh")]
    checked = subprocess.run(
        ["shellcheck", "-x", *scripts], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert checked.returncode == 0, checked.stdout
